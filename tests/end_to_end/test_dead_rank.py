"""A rank that dies takes the others along, with one line and without a process left over."""

import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def dying(rank: int, stage: str, by: str) -> tuple[object, ...]:
    short = ("--trainer.max_epochs", 1, "--data.eval_batch_size", 64, "--mc_dropout.num_samples", 2)
    rank_stage = ("--trainer.callbacks.rank", rank, "--trainer.callbacks.stage", stage)
    return *short, "--trainer.callbacks+=fault_callbacks.DyingRank", *rank_stage, "--trainer.callbacks.by", by


@pytest.mark.parametrize(
    ("launcher", "rank", "stage"),
    [("lightning", 0, "test"), ("lightning", 1, "train"), ("torchrun", 0, "train"), ("torchrun", 1, "test")],
)
def test_killed(launcher: str, rank: int, stage: str, start_ranks: Callable[..., Any]) -> None:
    finished = start_ranks(launcher, "mlp_digits", *dying(rank, stage, "kill"))
    assert finished.status == (-9 if launcher == "lightning" and rank == 0 else 1)  # of the one that was killed itself
    (error,) = finished.errors
    noticed = "Expected all ranks to answer, but got .+"
    if launcher == "torchrun" and stage == "test":  # torchrun may notice first, and tell the other rank to end
        noticed += "|SIGTERM"
    assert re.match(f"error: ({noticed})", error)
    assert re.search(": resume from .*/checkpoints/last.ckpt$", error) or stage == "train"
    assert not re.search(r'File ".*/scripts/train\.py"', finished.err)  # no traceback but torchrun's own
    assert finished.seconds < 60


def test_exception_of_one_rank(start_ranks: Callable[..., Any]) -> None:
    """Each rank says in one line what it knows: where the error is, or that the other one does not answer."""
    finished = start_ranks("lightning", "mlp_digits", *dying(1, "train", "exception"))
    assert finished.status == 1
    own, other = sorted(finished.errors, reverse=True)
    assert own.startswith("error: ZeroDivisionError: a bug in this rank alone (fault_callbacks.py, line ")
    assert other.startswith("error: Expected all ranks to answer, but got ")
    assert "Traceback" not in finished.err
    assert finished.seconds < 60


def test_rank_that_waits_for_ever_ends_with_its_launcher(start_ranks: Callable[..., Any]) -> None:
    """As one does that waits in NCCL, which does not notice."""
    finished = start_ranks("lightning", "mlp_digits", *dying(0, "train", "kill_unnoticed"))
    assert finished.status == -9
    assert finished.errors == {
        "error: Expected all ranks to answer, but got rank 1 without the process that launched it"
    }
    assert finished.seconds < 60
