"""A loss that is not finite stops a run with one line, or costs it the step; on two ranks, both alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Script = Callable[..., Any]

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = ("--config", CONFIGS / "mlp_digits.yaml", "--trainer.accelerator", "cpu")


def broken_loss(batches: str, rank: int = 0) -> tuple[object, ...]:
    """Options that make the loss of some batches NaN."""
    of = ("--trainer.callbacks.batches", batches, "--trainer.callbacks.rank", rank)
    return "--trainer.callbacks+=fault_callbacks.NonFiniteLoss", *of


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_stop_leaves_a_checkpoint_to_resume_from(start_script: Script) -> None:
    options = ("--trainer.max_epochs", 2, "--trainer.logger=false", "--checkpoint.every_n_train_steps", 5)
    first = start_script("scripts/train.py", *BASE, *options, *broken_loss("[8]"))
    assert first.status == 1
    assert "Traceback" not in first.err
    (error,) = errors(first.err)
    for said in ("Expected finite losses at step 8 (epoch 0), but got nan in batch 8 (examples ", "of 64"):
        assert said in error
    (run,) = (first.cwd / "runs/mlp_digits").iterdir()
    last = run / "checkpoints/last.ckpt"
    assert error.endswith(f"on_nonfinite skip leaves such steps out (last checkpoint: {last})")
    stored = torch.load(last, weights_only=True)
    assert stored["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())


@pytest.mark.filterwarnings("ignore:Encountered `nan` values:UserWarning")
def test_skip_ends_with_finite_weights(run_script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    options = ("--trainer.max_epochs", 1, "--finite_steps.on_nonfinite", "skip", "--trainer.log_every_n_steps", 1)
    few = ("--trainer.limit_train_batches", 10, "--mc_dropout.num_samples", "null")
    configs = ("--config", CONFIGS / "logger/csv.yaml")
    run = run_script("train", *BASE, *configs, *options, *few, *broken_loss("[3, 8]")).run
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())
    assert stored["callbacks"]["FiniteSteps"] == {"skipped_steps": 2}
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    counts = [row[header.index("train/skipped_steps")] for row in rows]
    assert [float(count) for count in counts if count] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_both_ranks_stop(launcher: str, start_ranks: Script) -> None:
    options = ("--trainer.logger=false", "--trainer.max_steps", 10)
    finished = start_ranks(launcher, "mlp_digits", *options, *broken_loss("[3]", rank=1))
    assert finished.status == 1
    said = finished.errors
    assert len(said) == 1, finished.err
    (message,) = said
    assert "at step 3 (epoch 0), but got nan in batch 3 (examples " in message
    assert "of 32) of rank 1." in message
    assert finished.seconds < 30


@pytest.mark.slow
def test_skipping_leaves_the_weights_of_both_ranks_equal(start_ranks: Script, tmp_path: Path) -> None:
    options = ("--trainer.max_steps", 6, "--finite_steps.on_nonfinite", "skip", "--mc_dropout.num_samples", "null")
    witness = ("--trainer.callbacks+=rank_witness.RankWitness", "--model.net.dropout.embedding", 0.1)
    finished = start_ranks("lightning", "mlp_digits", *options, *witness, *broken_loss("[1, 4]", rank=1))
    assert finished.status == 0, finished.err
    first, second = (torch.load(tmp_path / f"rank{rank}.pt")["weights"] for rank in range(2))
    assert all(one.isfinite().all() and one.equal(other) for one, other in zip(first, second, strict=True))
