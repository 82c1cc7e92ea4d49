"""Runs that are killed at seeded random moments, again and again, end bit by bit as the run that nobody killed."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from killed_runs import ROOT, assert_equal, end, in_csv, start

CSV = ("--config", ROOT / "configs/logger/csv.yaml")
TWO = ("--config", ROOT / "configs/trainer/ddp_cpu.yaml", "--trainer.devices", 2)
ONE = ("--config", ROOT / "configs/trainer/cpu.yaml")
MOMENTS = {  # and up to the how manieth of them in a process
    "on_train_batch_start": 25, "on_after_backward": 25, "on_train_batch_end": 25, "on_train_epoch_end": 1,
    "on_validation_start": 1, "on_validation_batch_start": 1, "on_validation_end": 1, "writing": 2, "renamed": 2,
    "any": 0,
}  # fmt: skip
KILLS = 6


def killed_at(moment: str, args: tuple[object, ...], cwd: Path, rng: random.Random) -> tuple[int, str]:
    """Runs until the moment, or for a random time after its first checkpoint where the moment is 'any'."""
    if moment != "any":
        return end(start(*args, cwd=cwd, SIGNAL_AT=f"SIGKILL {moment} {rng.randint(1, MOMENTS[moment])}"))
    before = {path: path.stat().st_mtime_ns for path in cwd.rglob("*.ckpt")}
    process = start(*args, cwd=cwd)
    while process.poll() is None and {path: path.stat().st_mtime_ns for path in cwd.rglob("*.ckpt")} == before:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    return end(process)


# mlp only: begin
DIGITS = (
    "--config", ROOT / "configs/mlp_digits.yaml", "--model.net.dropout.embedding", 0.1, "--model.net.dropout.mlp", 0.3,
    "--trainer.max_epochs", 8, "--trainer.log_every_n_steps", 4, "--mc_dropout.num_samples", 2,
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.callbacks+=killer.Killer",
)  # fmt: skip


@pytest.fixture
def digits() -> tuple[object, ...]:
    return DIGITS


# mlp only: end
# gpt only: begin
# Validation in the middle of an epoch, accumulated gradients, checkpoints between and together with validations.
TEXT = (
    "--config", ROOT / "configs/gpt_pydocs.yaml", "--trainer.max_steps", 60, "--trainer.accumulate_grad_batches", 2,
    "--trainer.val_check_interval", 12, "--checkpoint.every_n_train_steps", 4,
    "--data.eval_batch_size", 8, "--trainer.log_every_n_steps", 3, "--mc_dropout.num_samples", 2,
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.callbacks", "[killer.Killer]",
)  # fmt: skip


@pytest.fixture
def text(text_file: Path, small_gpt: tuple[object, ...]) -> tuple[object, ...]:
    return *TEXT, *small_gpt, "--data.path", text_file


# gpt only: end
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "processes", "seed", "logger"),
    [
        pytest.param("digits", ONE, 0, (), id="digits, one process"),  # mlp only
        pytest.param("digits", TWO, 1, CSV, id="digits, two processes"),  # mlp only
        pytest.param("text", ONE, 2, CSV, id="text, one process"),  # gpt only
        pytest.param("text", TWO, 3, (), id="text, two processes"),  # gpt only
    ],
)
def test_killed_again_and_again(
    task: str, processes: tuple[object, ...], seed: int, logger: tuple[object, ...],
    request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    args = (*request.getfixturevalue(task), *processes, *logger, "--resume", "latest", "--run_id")
    status, err = end(start(*args, "whole", cwd=tmp_path))
    assert status == 0, err
    rng = random.Random(seed)
    for moment in rng.sample(list(MOMENTS), KILLS):
        status, err = killed_at(moment, (*args, "killed"), tmp_path, rng)
        assert status == -signal.SIGKILL or (moment == "any" and status == 0), (moment, err)
    status, err = end(start(*args, "killed", cwd=tmp_path))
    assert status == 0, err
    (whole,) = tmp_path.glob("runs/*/whole")
    assert any("fit/nll" in row for row in in_csv(whole))
    assert_equal(whole.with_name("killed"), whole)
