"""Runs of two processes, whose last one is waited for; folders that cannot be written, and files that vanish."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import thinned

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ranks:
    """What a run of two processes did.

    `seconds` is the time from the fault, whose callback writes it down, to the end of the last process.
    """

    status: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> set[str]:
        return {line for line in self.err.splitlines() if line.startswith("error: ")}


def processes(mark: str) -> dict[int, str]:
    """Pid and command of the processes with the mark in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.fixture
def start_ranks(tmp_path: Path, free_port: int) -> Callable[..., Ranks]:
    """Trains an experiment on two processes, started by Lightning or torchrun, until no process of theirs is left."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("there is no /proc to find the processes in")

    def start(launcher: str, experiment: str, *options: object, **environment: str) -> Ranks:
        port = str(free_port)
        python = [sys.executable]
        if launcher == "torchrun":
            python += ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", port]
        configs = ("--config", ROOT / f"configs/{experiment}.yaml", "--config", ROOT / "configs/trainer/ddp_cpu.yaml")
        quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
        mark = uuid.uuid4().hex
        importable = os.pathsep.join([str(Path(thinned.__file__).parents[1]), str(Path(__file__).parent)])
        with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:
            process = subprocess.Popen(
                [*python, ROOT / "scripts/train.py", *map(str, (*configs, *quiet, *options))],
                env={**os.environ, "MASTER_PORT": port, "PYTHONPATH": importable, "MARK": mark, **environment},
                cwd=tmp_path,
                stdout=out,
                stderr=err,
            )
            deadline = time.monotonic() + 400
            try:
                status = process.wait(400)
                while processes(mark) and time.monotonic() < deadline:
                    time.sleep(0.1)
                ended = time.time()
                assert processes(mark) == {}
            finally:
                for pid in processes(mark):
                    os.kill(pid, 9)
                process.wait()
            for file in (out, err):
                file.seek(0)
            fault = tmp_path / "fault"
            seconds = ended - (float(fault.read_text()) if fault.exists() else ended)
            return Ranks(status, out.read(), err.read(), seconds)

    return start


@pytest.fixture(scope="session")
def with_other_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Copies a checkpoint, with noise on the weights whose names begin with something."""

    def copy(checkpoint: Path, beginning: str) -> Path:
        content = torch.load(checkpoint, weights_only=True)
        generator = torch.Generator().manual_seed(0)
        for name, value in content["state_dict"].items():
            if name.startswith(beginning):
                value += 0.3 * value.std() * torch.randn(value.shape, generator=generator)
        path = tmp_path_factory.mktemp("other") / "other.ckpt"
        torch.save(content, path)
        return path

    return copy


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Runs a script that cannot write to its folder, apart from the folder `own` in it, not even as root."""
    (tmp_path / "own").mkdir()
    drop: list[str] = []
    if os.geteuid() == 0:
        drop = ["setpriv", "--bounding-set", "-dac_override"]
        if shutil.which("setpriv") is None or subprocess.run([*drop, "true"]).returncode:
            pytest.skip("root could write there, and there is no setpriv that works")
    tmp_path.chmod(0o555)

    def run(script: str, *options: object) -> Any:
        environment = {**os.environ, "PYTHONPATH": str(Path(thinned.__file__).parents[1])}
        command = [*drop, sys.executable, str(ROOT / f"scripts/{script}.py"), *map(str, options)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return SimpleNamespace(status=done.returncode, err=done.stderr)

    yield run
    tmp_path.chmod(0o700)


@pytest.fixture
def vanishing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[object, ...]]:
    """Options with which something is deleted, or cut off, during training."""
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def options(path: Path, cut: bool = False) -> tuple[object, ...]:
        which = ("--trainer.callbacks.path", path, "--trainer.callbacks.cut", str(cut).lower())
        return "--trainer.callbacks+=fault_callbacks.Vanishing", *which

    return options
