"""predict.py is killed without a chance to clean up, and goes on: alone, or on two processes under torchrun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import thinned

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "scripts/predict.py",)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *SCRIPT)
HALT_AT = 20

Start = Callable[..., "subprocess.Popen[str]"]


# The fixture of a run with a few hundred examples, and the size of batches that take some to fill a chunk.
RUNS = [
    pytest.param(("trained", 16), id="images"),  # mlp only
    pytest.param(("trained_text", 1), id="text"),  # gpt only
]


@pytest.fixture(params=RUNS)
def checkpoint(request: pytest.FixtureRequest) -> tuple[object, ...]:
    """Options for the checkpoint of a run."""
    fixture, size = request.param
    run = request.getfixturevalue(fixture).run
    small = ("--data.eval_batch_size", size, "--mc_dropout.num_samples", 3)
    return "--ckpt_path", run / "checkpoints/best.ckpt", *small


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts predict.py, the files of which go to a folder; ends those that are left."""
    importable = os.pathsep.join([str(Path(thinned.__file__).parents[1]), str(ROOT / "tests/end_to_end")])
    witness = ("--trainer.callbacks+=prediction_witness.PredictionWitness", "--trainer.enable_progress_bar=false")
    started = []

    def popen(how: tuple[object, ...], folder: str, *options: object, **env: str) -> "subprocess.Popen[str]":
        cwd = tmp_path / f"in {folder}"
        cwd.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, *map(str, (*how, *options)), "--mc_dropout.dirpath", str(tmp_path / folder), *witness],
            env={**os.environ, "PYTHONPATH": importable, **env},
            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def finish(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def kill(process: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """With two chunks on the disk."""
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("killed/*.parts/predictions-*.parquet"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def predicted(tmp_path: Path, folder: str) -> list[int]:
    """How many examples each process has predicted."""
    files = sorted((tmp_path / f"in {folder}").glob("predicted*"))
    return [sum(map(int, file.read_text().split())) for file in files]


def tables(folder: Path) -> dict[str, Any]:
    assert not list(folder.glob("*.parts"))
    return {path.stem: pq.read_table(path) for path in folder.glob("*.parquet")}


@pytest.mark.slow
def test_killed_prediction_goes_on(checkpoint: Any, start: Start, tmp_path: Path) -> None:
    killed = start(SCRIPT, "killed", *checkpoint, HALT_AT=str(HALT_AT))
    finish(start(SCRIPT, "whole", *checkpoint))
    kill(killed, tmp_path)
    assert not (tmp_path / "killed/predictions.parquet").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "shared")

    out = finish(start(SCRIPT, "killed", *checkpoint))
    assert "resumes with example" in out
    for name in ("metrics.json", "predictions.parquet", *(["sequences.parquet"] if "text" in str(checkpoint) else [])):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, alone = (sum(predicted(tmp_path, folder)) for folder in ("whole", "killed"))
    (before,) = [int(line.split()[-1]) for line in out.splitlines() if "resumes with example" in line]
    size = checkpoint[3]
    assert 0 < before <= HALT_AT * size
    assert alone <= HALT_AT * size + whole - before // size * size  # in both attempts

    two = ("--config", ROOT / "configs/trainer/ddp_cpu.yaml", "--data.eval_batch_size", 6)
    finish(start(TORCHRUN, "shared", *checkpoint, *two))
    counts = predicted(tmp_path, "shared")
    assert len(counts) == 2
    assert abs(counts[0] - counts[1]) <= whole // 6 + 1
    assert sum(counts) == whole - before // 6 * 6
    got, expected = tables(tmp_path / "shared"), tables(tmp_path / "whole")
    assert got.keys() == expected.keys()
    for name, table in expected.items():
        assert got[name]["index"].to_pylist() == list(range(len(table)))
        assert got[name].schema.metadata[b"thinned"] == table.schema.metadata[b"thinned"]
        if "source" in table.column_names:
            assert got[name]["source"] == table["source"]
        for column in {*table.column_names} - {"source"}:
            pair = (torch.tensor(t[column].to_pylist(), dtype=torch.float64) for t in (got[name], table))
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
    scores = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("shared", "whole")]
    for way in ("deterministic", "mc_dropout"):
        numbers = ({k: v for k, v in s[way].items() if isinstance(v, float)} for s in scores)
        assert next(numbers) == pytest.approx(next(numbers), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", RUNS[:1], indirect=True)
def test_other_settings_are_one_line(checkpoint: Any, start: Start, tmp_path: Path) -> None:
    killed = start(SCRIPT, "killed", *checkpoint, HALT_AT=str(HALT_AT))
    kill(killed, tmp_path)
    refused = start(SCRIPT, "killed", *checkpoint, "--mc_dropout.seed", 4)
    out, _ = refused.communicate(timeout=300)
    assert refused.returncode == 1
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    expected = "error: Expected the settings of the interrupted prediction, but got mc_dropout.seed = 4 instead of 0"
    assert line.startswith(expected)
