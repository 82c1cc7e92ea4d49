"""Runs that are killed at seeded random moments, again and again, end bit by bit as the run that nobody killed."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from thinned.loggers import GLOBAL_STEP, wandb_history

ROOT = Path(__file__).parents[2]
CSV = ("--config", ROOT / "configs/logger/csv.yaml")
TWO = ("--config", ROOT / "configs/trainer/ddp_cpu.yaml", "--trainer.devices", 2)
ONE = ("--config", ROOT / "configs/trainer/cpu.yaml")
DIGITS = (
    "--config", ROOT / "configs/mlp_digits.yaml", "--model.net.dropout.embedding", 0.1, "--model.net.dropout.mlp", 0.3,
    "--trainer.max_epochs", 8, "--trainer.log_every_n_steps", 4, "--mc_dropout.num_samples", 2,
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.callbacks+=killer.Killer",
)  # fmt: skip
# Validation in the middle of an epoch, accumulated gradients, checkpoints between and together with validations.
TEXT = (
    "--config", ROOT / "configs/gpt_pydocs.yaml", "--trainer.max_steps", 60, "--trainer.accumulate_grad_batches", 2,
    "--trainer.val_check_interval", 12, "--checkpoint.every_n_train_steps", 4, "--checkpoint.monitor", "null",
    "--data.eval_batch_size", 8, "--trainer.log_every_n_steps", 3, "--mc_dropout.num_samples", 2,
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.callbacks", "[killer.Killer]",
)  # fmt: skip
MOMENTS = {  # and up to the how manieth of them in a process
    "on_train_batch_start": 25, "on_after_backward": 25, "on_train_batch_end": 25, "on_train_epoch_end": 1,
    "on_validation_start": 1, "on_validation_batch_start": 1, "on_validation_end": 1, "writing": 2, "renamed": 2,
    "any": 0,
}  # fmt: skip
KILLS = 6


def start(*args: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts scripts/train.py in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/train.py", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{Path(__file__).parent}", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what the process said."""
    try:
        err = process.communicate(timeout=200)[1]
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, err


def rows(run: Path) -> dict[tuple[int, str], float]:
    """The logged values by step and key; each step holds a key once."""
    if (run / "metrics.csv").exists():
        with (run / "metrics.csv").open() as file:
            logged = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    else:
        logged = [row for file in sorted(run.glob("wandb/*run-*/*.wandb")) for row in wandb_history(file)]
        logged = [{"step": row[GLOBAL_STEP], **row} for row in logged]
    values: dict[tuple[int, str], float] = {}
    for row in logged:
        for key, value in row.items():
            if isinstance(value, float) and not key.startswith(("throughput/", "step", "epoch", "_", "trainer/")):
                assert (int(row["step"]), key) not in values, f"{key} twice at step {row['step']}"
                values[int(row["step"]), key] = value
    return values


def assert_equal(run: Path, whole: Path) -> None:
    """The same weights, optimiser state, log, metrics and predictions, bit by bit."""
    ended, unbroken = (torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (run, whole))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(ended[key], unbroken[key], key)
    assert rows(run) == rows(whole)
    for name in ("metrics.json", "predictions.parquet"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert not list((run / "checkpoints").glob("*.tmp"))


def assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert one.equal(other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert one == other, where


def killed_at(moment: str, args: tuple[object, ...], cwd: Path, rng: random.Random) -> tuple[int, str]:
    """Runs until the moment, or for a random time after its first checkpoint where the moment is 'any'."""
    if moment != "any":
        return end(start(*args, cwd=cwd, SIGNAL_AT=f"SIGKILL {moment} {rng.randint(1, MOMENTS[moment])}"))
    before = {path: path.stat().st_mtime_ns for path in cwd.rglob("*.ckpt")}
    process = start(*args, cwd=cwd)
    while process.poll() is None and {path: path.stat().st_mtime_ns for path in cwd.rglob("*.ckpt")} == before:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1))
    os.killpg(process.pid, signal.SIGKILL)
    return end(process)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("task", "processes", "seed", "logger"),
    [("digits", ONE, 0, ()), ("digits", TWO, 1, CSV), ("text", ONE, 2, CSV), ("text", TWO, 3, ())],
    ids=["digits, one process", "digits, two processes", "text, one process", "text, two processes"],
)
def test_killed_again_and_again(
    task: str, processes: tuple[object, ...], seed: int, logger: tuple[object, ...],
    text_file: Path, small_gpt: tuple[object, ...], tmp_path: Path,
) -> None:  # fmt: skip
    of_task = DIGITS if task == "digits" else (*TEXT, *small_gpt, "--data.path", text_file)
    args = (*of_task, *processes, *logger, "--resume", "latest", "--run_id")
    status, err = end(start(*args, "whole", cwd=tmp_path))
    assert status == 0, err
    rng = random.Random(seed)
    for moment in rng.sample(list(MOMENTS), KILLS):
        status, err = killed_at(moment, (*args, "killed"), tmp_path, rng)
        assert status == -signal.SIGKILL, (moment, err)
    status, err = end(start(*args, "killed", cwd=tmp_path))
    assert status == 0, err
    runs = next((tmp_path / "runs").iterdir())
    assert_equal(runs / "killed", runs / "whole")
