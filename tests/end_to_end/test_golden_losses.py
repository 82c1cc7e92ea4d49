"""The loss of the first 20 steps on the digits, as recorded: an unmeant change of data, net, masks or optimiser shows.

A meant one (another recipe in the config, say) is recorded anew from the failure's message.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"
LOSSES = [
    2.32315, 2.31723, 2.29654, 2.28276, 2.28974, 2.26257, 2.24591, 2.24034, 2.20932, 2.18871,
    2.13173, 2.14188, 2.10445, 2.05566, 2.01777, 1.92678, 1.86339, 1.80863, 1.77245, 1.68419,
]  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_losses(run_script: Callable[..., Any]) -> None:
    configs = ("--config", CONFIGS / "mlp_digits.yaml", "--config", CONFIGS / "logger/csv.yaml")
    steps = ("--trainer.max_steps", 20, "--trainer.log_every_n_steps", 1, "--trainer.accelerator", "cpu")
    run = run_script("train", *configs, *steps, "--mc_dropout.num_samples", "null").run
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses == pytest.approx(LOSSES, rel=1e-4), f"recorded anew: {losses}"
