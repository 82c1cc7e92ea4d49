"""What a test changes of its process does not reach the next one; what runs on fails the test that started it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.fabric.utilities.data import _replace_dunder_methods
from torch.utils.data import DataLoader

Start = Callable[[], AbstractContextManager[None]]


def ask_for_data_that_raise() -> None:
    with suppress(ZeroDivisionError), _replace_dunder_methods(DataLoader, "dataset"):  # as Lightning asks
        _ = 1 / 0


CHANGES: dict[str, Callable[[], object]] = {
    "W&B run": lambda: wandb.init(mode="offline", project="thinned"),
    "W&B service that has ended": lambda: os.environ.update(WANDB_SERVICE="3-1-unix-/no/such/socket"),
    "variable": lambda: os.environ.pop("HF_HOME"),
    "signal": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients": lambda: torch.set_grad_enabled(False),
    "algorithms": lambda: torch.use_deterministic_algorithms(True),
    "random numbers": lambda: torch.rand(1),
    "data loader": ask_for_data_that_raise,
}


def state() -> tuple[Any, ...]:
    settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    algorithms, numbers = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist()
    replaced = sys.exit, sys.excepthook, signal.getsignal(signal.SIGTERM), DataLoader.__init__, DataLoader.__setattr__
    return dict(os.environ), *settings, algorithms, numbers, *replaced, wandb.run, threading.active_count()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_is_undone(change: Callable[[], object], same_start: Start, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = state()
    with same_start():
        change()
        assert state() != before
    assert state() == before


@pytest.mark.parametrize("run_on", ["process", "thread", "timer", "directory"])
def test_what_runs_on_fails(run_on: str, same_start: Start, tmp_path: Path) -> None:
    done, directory = threading.Event(), Path.cwd()
    timer = threading.Timer(60, done.set)
    timer.daemon = True
    processes: list[subprocess.Popen[bytes]] = []
    starts = {
        "process": lambda: processes.append(subprocess.Popen(["sleep", "60"])),
        "thread": threading.Thread(target=done.wait).start,
        "timer": timer.start,
        "directory": lambda: os.chdir(tmp_path),
    }
    with pytest.raises(pytest.fail.Exception, match=f"(?i)nothing to be left behind, but got .*{run_on}"):  # noqa: SIM117
        with same_start():
            starts[run_on]()
    assert Path.cwd() == directory
    done.set()
    timer.cancel()
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shared() -> None:
    os.environ["SHARED"] = "by the tests of a module"


@pytest.mark.usefixtures("shared")
def test_every_test_and_shared_fixture_starts_the_same(request: pytest.FixtureRequest) -> None:
    assert "SHARED" not in os.environ
    assert all("starts_the_same" in test.fixturenames for test in request.session.items)


def test_run_of_a_script_leaves_no_service_behind(run_script: Callable[..., Any], tmp_path: Path) -> None:
    """Not even one of before, which ends with the script's."""
    wandb.init(mode="offline", project="thinned", dir=tmp_path)
    assert run_script("predict").status
    assert "WANDB_SERVICE" not in os.environ
    wandb.init(mode="offline", project="thinned", dir=tmp_path)
