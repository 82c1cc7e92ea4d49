"""However its two processes are started, a run is the same."""

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = 3
RUN = (
    "scripts/train.py", "--config", ROOT / "configs/mlp_digits.yaml", "--trainer.accelerator", "cpu",
    "--trainer.max_steps", STEPS, "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    "--trainer.callbacks+=rank_witness.RankWitness", "--mc_dropout.num_samples", 2,
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run")

Seen = list[dict[str, list[torch.Tensor]]]


def ranks(folder: Path) -> Seen:
    """What each process saw; they have made one run together."""
    assert len(list(folder.glob("runs/mlp_digits/*"))) == 1
    assert len(list(folder.glob("runs/mlp_digits/*/checkpoints/last.ckpt"))) == 1
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def lightnings_own(tmp_path_factory: pytest.TempPathFactory, start_script_in: Callable[..., Any]) -> Seen:
    """Two processes, of which the second is started by the first."""
    folder = tmp_path_factory.mktemp("lightning")
    assert start_script_in(folder, *RUN, "--config", ROOT / "configs/trainer/ddp_cpu.yaml").status == 0
    return ranks(folder)


def assert_same(seen: Seen, expected: Seen) -> None:
    assert len(seen) == len(expected) == 2
    for ours, theirs in zip(seen, expected, strict=True):
        assert len(ours["indices"]) == STEPS
        assert len(ours["masks"]) == 2 * STEPS
        for name in ("indices", "masks", "weights"):
            assert all(a.equal(b) for a, b in zip(ours[name], theirs[name], strict=True)), name


@pytest.mark.slow
def test_torchrun(start_script: Any, free_port: int, tmp_path: Path, lightnings_own: Seen) -> None:
    finished = start_script(*RUN, launcher=(*TORCHRUN, "--nproc_per_node", 2, "--master_port", free_port))
    assert finished.status == 0, finished.err
    assert_same(ranks(tmp_path), lightnings_own)


@pytest.mark.slow
def test_two_nodes(start_script: Any, free_port: int, tmp_path: Path, lightnings_own: Seen) -> None:
    """Two agents with a process each."""
    nodes = (*TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", free_port)
    overlay = ("--config", ROOT / "configs/trainer/multinode.yaml", "--trainer.accelerator", "cpu")
    args = (*RUN, *overlay, "--trainer.precision", "32-true")
    starts = [partial(start_script, *args, launcher=(*nodes, "--node_rank", rank)) for rank in range(2)]
    with ThreadPoolExecutor() as pool:
        finished = [future.result() for future in [pool.submit(start) for start in starts]]
    assert [f.status for f in finished] == [0, 0], finished
    assert_same(ranks(tmp_path), lightnings_own)


@pytest.mark.slow
def test_torchrun_with_another_number_of_devices(start_script: Any, free_port: int, tmp_path: Path) -> None:
    """Which Lightning takes for as many separate runs."""
    launcher = (*TORCHRUN, "--nproc_per_node", 2, "--master_port", free_port)
    finished = start_script(*RUN, "--config", ROOT / "configs/trainer/cpu.yaml", launcher=launcher)
    assert finished.status == 1
    assert "Expected trainer.devices to be 2 or auto, as torchrun has started 2 processes on 1 nodes" in finished.err
    assert not list(tmp_path.glob("runs/*/*"))


class Cluster:
    """Slurm as far as scripts/slurm.sbatch knows it: `srun` and `scontrol` that write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, status in (("srun", '"$SRUN_STATUS"'), ("scontrol", "0")):
            path = folder / name
            path.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> "{folder}/calls"\nexit {status}\n')
            path.chmod(0o755)

    def submit(self, *args: str, status: int = 0, **environment: str) -> tuple[int, list[str]]:
        """Runs the script as a job; its exit status, and the commands that it called."""
        (self.folder / "calls").unlink(missing_ok=True)
        env = {"PATH": f"{self.folder}:/usr/bin:/bin", "SRUN_STATUS": str(status), **environment}
        script = ROOT / "scripts/slurm.sbatch"
        done = subprocess.run(["bash", script, *args], env=env, cwd=self.folder, check=False, timeout=60)
        return done.returncode, (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_sbatch_trains_under_the_id_of_its_job(cluster: Cluster) -> None:
    done = cluster.submit("--config", "a.yaml", "--trainer.max_steps=3", SLURM_JOB_ID="7")
    called = "srun python scripts/train.py --config a.yaml --trainer.max_steps=3 --run_id 7 --resume latest"
    assert done == (0, [called])


@pytest.mark.parametrize("status", [1, 2, 137, 142, 144])
def test_sbatch_that_fails_is_not_requeued(cluster: Cluster, status: int) -> None:
    returned, calls = cluster.submit(status=status, SLURM_JOB_ID="7")
    assert returned == status
    assert [call.split()[0] for call in calls] == ["srun"]


def test_sbatch_that_is_stopped_is_requeued_under_the_same_id(cluster: Cluster) -> None:
    first, second = (cluster.submit(status=143, SLURM_JOB_ID="7") for _ in range(2))
    assert first == second
    assert first[1][1:] == ["scontrol requeue 7"]


def test_tasks_of_an_array_are_runs_of_their_own(cluster: Cluster) -> None:
    """The last task's job id is the array's, under which all tasks would be requeued."""
    tasks = [
        cluster.submit(status=143, SLURM_JOB_ID=job, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID=task)[1]
        for job, task in (("8", "0"), ("9", "1"))
    ]
    own = [f"srun python scripts/train.py --seed_everything {i} --run_id 9-{i} --resume latest" for i in range(2)]
    assert [calls[0] for calls in tasks] == own
    assert [calls[1] for calls in tasks] == ["scontrol requeue 9_0", "scontrol requeue 9_1"]


def test_sbatch_asks_for_a_warning_and_for_its_place_in_the_queue() -> None:
    options = [
        line.split()[1]
        for line in (ROOT / "scripts/slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(options)
    gpus, tasks = (
        next(o.partition("=")[2] for o in options if o.startswith(f"--{name}-per-node")) for name in ("gpus", "ntasks")
    )
    assert gpus == tasks
