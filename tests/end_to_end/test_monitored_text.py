"""What is logged of dropout on two processes is of the masks of both."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS, LAYERS, HEADS, T = 3, 2, 2, 32
DRAWN = 1 + 3 * LAYERS  # masks of a step
FSDP = ("--config", ROOT / "configs/trainer/fsdp.yaml", "--trainer.precision", "32-true")
DDP = ("--config", ROOT / "configs/trainer/ddp_cpu.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [DDP, FSDP], ids=["copied", "sharded"])
def test_shares_of_two_ranks(trainer: Any, start_script: Any, text_file: Path, small_gpt: Any, tmp_path: Path) -> None:
    """Masks of a step, of four examples a rank: embedding; attention and two on residuals in each layer."""
    configs = ("--config", ROOT / "configs/gpt_pydocs.yaml", *small_gpt, *trainer, "--trainer.devices", 2)
    data = ("--config", ROOT / "configs/logger/csv.yaml", "--data.path", text_file, "--trainer.accelerator", "cpu")
    steps = ("--trainer.max_steps", STEPS, "--trainer.val_check_interval", STEPS, "--trainer.log_every_n_steps", 1)
    rates = ("--model.net.dropout.attention", 0.3, "--model.net.dropout.embedding", 0.2)
    options = (*rates, "--mc_dropout.num_samples", "null")
    witness = ("--trainer.callbacks=[rank_witness.RankWitness]",)
    run = start_script("scripts/train.py", *configs, *data, *steps, *options, *witness).run

    ranks = [torch.load(tmp_path / f"rank{rank}.pt")["masks"] for rank in range(2)]
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dropout/dropped/residual"]]
    assert len(rows) == STEPS
    assert [len(masks) for masks in ranks] == [STEPS * DRAWN] * 2
    for step, row in enumerate(rows):
        embedding, *others = (torch.cat([masks[step * DRAWN + i] for masks in ranks]) for i in range(DRAWN))
        attention = others[::3]
        below = torch.ones(T, T).tril() > 0
        dropped = {"embedding": embedding, "attention": torch.stack(attention)[..., below]}
        for site, masks in dropped.items():
            assert float(row[f"dropout/dropped/{site}"]) == pytest.approx((masks == 0).double().mean().item(), rel=1e-6)
        for layer, masks in enumerate(attention):
            assert masks.shape == (8, HEADS, T, T)
            empty = (masks.tril() == 0).all(-1).double().mean((0, 2))
            for head in range(HEADS):
                logged = float(row[f"dropout/empty_rows/layer{layer}_head{head}"])
                assert logged == pytest.approx(empty[head].item(), rel=1e-6)
        expected = sum(0.3**t for t in range(1, T + 1)) / T
        assert float(row["dropout/empty_rows/expected"]) == pytest.approx(expected, rel=1e-5)
