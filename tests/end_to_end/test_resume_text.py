"""A GPT that resumes within an epoch ends where it would have ended without the break."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL_GPT = (
    "--config", CONFIGS / "gpt_pydocs.yaml", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
    "--model.net.num_layers", 1, "--model.net.width", 16, "--model.net.num_heads", 2,
    "--model.net.dropout.embedding", 0.1, "--model.net.dropout.attention", 0.1, "--model.net.dropout.mlp", 0.1,
    "--model.warmup_steps", 2, "--model.final_lr_fraction", 1,  # which does not depend on the number of steps
    "--data.cache_dir", "cache", "--data.val_fraction", 0.01, "--data.test_fraction", 0.005,
    "--mc_dropout.num_samples", "null", "--trainer.callbacks", "[]",
)  # fmt: skip


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dicts are, bit by bit."""
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("options", "broken_at"),
    [
        (("--trainer.val_check_interval", 3), 3),
        (("--trainer.val_check_interval", 4, "--trainer.accumulate_grad_batches", 2), 2),
        (("--trainer.val_check_interval", 6, "--checkpoint.every_n_train_steps", 2), 4),
    ],
    ids=["at a validation", "with accumulated gradients", "between validations"],
)
def test_gpt_resumed_within_an_epoch_is_the_unbroken_run(
    options: tuple[object, ...], broken_at: int, run_script: Callable[..., Any]
) -> None:
    steps = 4 if broken_at == 2 else 6
    whole = run_script("train", *SMALL_GPT, *options, "--trainer.max_steps", steps)
    first = run_script("train", *SMALL_GPT, *options, "--trainer.max_steps", broken_at)
    broken = checkpoint(first.run)
    assert (broken["epoch"], broken["global_step"]) == (0, broken_at)
    last = first.run / "checkpoints/last.ckpt"
    resumed = run_script("train", *SMALL_GPT, *options, "--resume", last, "--trainer.max_steps", steps)
    assert resumed.status == 0, resumed.err
    ended, unbroken = checkpoint(first.run), checkpoint(whole.run)
    assert (ended["epoch"], ended["global_step"]) == (unbroken["epoch"], unbroken["global_step"]) == (0, steps)
    assert not equal(ended["state_dict"], broken["state_dict"])
    assert equal(ended["state_dict"], unbroken["state_dict"])
    assert (first.run / "metrics.json").read_bytes() == (whole.run / "metrics.json").read_bytes()
