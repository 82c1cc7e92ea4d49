"""A run that is told to end writes a checkpoint, ends in time with the signal's status, and goes on where it was."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import ROOT, assert_equal, end, start

KILLER = ("--trainer.max_epochs", 3, "--trainer.callbacks+=killer.Killer", "--run_id", "told")
MOMENTS = {  # and the step of the checkpoint; an epoch has 19
    "SIGTERM on_train_batch_start 5": 5,
    "SIGTERM on_train_batch_end 25": 25,
    "SIGINT on_after_backward 7": 7,
    "SIGTERM on_validation_start 1": 19,
    "SIGTERM on_validation_batch_start 2": 38,
    "SIGTERM on_validation_end 1": 19,
    "SIGTERM on_train_epoch_end 2": 38,
}


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_told_run_goes_on_as_if_nothing_had_happened(
    moment: str, trained: Any, trained_args: tuple[object, ...], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    status, err = end(start(*trained_args, *KILLER, cwd=tmp_path, SIGNAL_AT=moment))
    signum = signal.Signals[moment.split()[0]]
    assert status == 128 + signum, err
    assert time.time() - (tmp_path / "told").stat().st_mtime < 30
    run = tmp_path / "runs/mlp_digits/told"
    assert f"{signum.name} at step {MOMENTS[moment]}: wrote {run}/checkpoints/last.ckpt" in err
    assert checkpoint(run)["global_step"] == MOMENTS[moment]
    assert "Traceback" not in err

    again = run_script("train", *trained_args, *KILLER, "--resume", "latest")
    assert again.status == 0, again.err
    assert_equal(run, trained.run)


@pytest.mark.slow
def test_second_ctrl_c_ends_at_once(trained_args: tuple[object, ...], tmp_path: Path) -> None:
    process = start(*trained_args, *KILLER, cwd=tmp_path, SIGNAL_AT="SIGINT on_train_batch_start 5", TIMES="2")
    assert end(process)[0] == 130
    assert not list(tmp_path.rglob("*.ckpt"))  # which the first one alone would have written


@pytest.mark.slow
def test_told_in_the_test(trained: Any, trained_args: tuple[object, ...], tmp_path: Path) -> None:
    status, err = end(start(*trained_args, *KILLER, cwd=tmp_path, SIGNAL_AT="SIGTERM on_test_batch_end 1"))
    assert status == 143, err
    run = tmp_path / "runs/mlp_digits/told"
    assert f"error: SIGTERM: resume from {run / 'checkpoints/last.ckpt'}\n" in err
    assert checkpoint(run)["global_step"] == 57
    assert not (run / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_any_of_two_ranks_is_told_and_one_goes_on(rank: int, run_script: Callable[..., Any], tmp_path: Path) -> None:
    """Without dropout, whose masks differ between ranks, one process ends where two would have, but for rounding."""
    args = (
        "--config", ROOT / "configs/mlp_digits.yaml", "--model.net.dropout.mlp", 0, "--mc_dropout.num_samples", "null",
        "--trainer.accelerator", "cpu", "--trainer.logger", "false",  # in fp64 Lightning restores weights as fp32
        *KILLER[:-1],
    )  # fmt: skip
    two = ("--config", ROOT / "configs/trainer/ddp_cpu.yaml")
    moment = "SIGTERM on_train_batch_end 25"
    status, err = end(start(*args, "told", *two, cwd=tmp_path, SIGNAL_AT=moment, RANK_TOLD=str(rank)))
    assert status == 143, err
    run = tmp_path / "runs/mlp_digits/told"
    assert checkpoint(run)["global_step"] == 25
    assert run_script("train", *args, "told", "--resume", "latest").status == 0
    assert run_script("train", *args, "whole").status == 0
    ended, unbroken = (checkpoint(r)["state_dict"] for r in (run, run.with_name("whole")))
    for name in unbroken:
        torch.testing.assert_close(ended[name], unbroken[name], rtol=0, atol=1e-6)


TOLD = """
import os, signal, time
from types import SimpleNamespace
import thinned.runs.interruption as interruption
interruption.PATIENCE = interruption.FINISH = 0.2
strategy = SimpleNamespace(launcher=None, barrier=lambda name: time.sleep(120))
trainer = SimpleNamespace(strategy=strategy, world_size=1)
told = interruption.Interruption(trainer, graceful=True)
told.listen()
os.kill(os.getpid(), signal.SIGTERM)
assert told.told(trainer) == signal.SIGTERM
"""
STUCK = "time.sleep(120)"
WRITES_LONG = """
told.hold()
time.sleep(1)
print("written", flush=True)
told.end(trainer, signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("then", "out", "err"),
    [
        (STUCK, "", "error: SIGTERM, but no step ended within 0.2 s: checkpoints are unchanged\n"),
        (WRITES_LONG, "written\n", ""),
    ],
    ids=["no step ends", "the checkpoint takes long, and so does W&B"],
)
def test_told_process_ends_in_time(then: str, out: str, err: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOLD + then],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,  # before which the sleep would not end
    )
    assert (done.returncode, done.stdout) == (143, out), done.stderr
    assert done.stderr.endswith(err)
    assert err or "error" not in done.stderr
