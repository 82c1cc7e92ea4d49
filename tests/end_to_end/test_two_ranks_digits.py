"""A data-parallel run on two processes: different masks, equal weights, one run directory, one W&B run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 4


@pytest.mark.slow
def test_two_ranks(start_script: Callable[..., Any], tmp_path: Path) -> None:
    configs = ("--config", CONFIGS / "mlp_digits.yaml", "--config", CONFIGS / "trainer/ddp_cpu.yaml")
    rates = ("--model.net.dropout.embedding", 0.1, "--model.net.dropout.mlp", 0.3)
    options = ("--trainer.max_steps", STEPS, "--trainer.callbacks+=rank_witness.RankWitness")
    run = start_script("scripts/train.py", *configs, *rates, *options).run

    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert len(first["masks"]) == len(second["masks"]) == 3 * STEPS  # one at the input, two at hidden layers
    for one, other in zip(first["masks"], second["masks"], strict=True):
        assert one.shape == other.shape == (32, one.shape[1])  # half of a batch each
        assert not one.equal(other)
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert one.equal(other)

    assert {path.name for path in tmp_path.iterdir()} == {"runs", "rank0.pt", "rank1.pt"}
    assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == STEPS
    assert pq.read_table(run / "predictions.parquet")["index"].to_pylist() == list(range(890))  # half of the digits
