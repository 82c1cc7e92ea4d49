"""Masks in training as a function of seed, rank, epoch and batch, whatever was drawn before."""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from thinned.models import Dropout
from thinned.tasks import StepSeed


class Masks(LightningModule):
    """Learns nothing but keeps the masks of its dropout, one per step, and sums them up in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = Dropout(0.5, "mlp")
        self.weight = torch.nn.Parameter(torch.zeros(40))
        self.masks: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.masks.append(self.dropout(torch.ones(40)))
        return -(self.weight * self.masks[-1]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class ExtraDraws(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        torch.rand(int(module.global_step))


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer]) -> Callable[..., Masks]:
    def run(*callbacks: Callback, history: int = 0) -> Masks:
        torch.manual_seed(history)
        module = Masks()
        make_trainer(max_epochs=2, callbacks=[*callbacks]).fit(module, DataLoader(torch.zeros(3)))
        return module

    return run


def test_two_fits_are_equal_whatever_was_drawn_before(fit: Callable[..., Masks]) -> None:
    first, second = fit(StepSeed(1)), fit(StepSeed(1), ExtraDraws(), history=1)
    assert len(first.masks) == 6
    assert all(map(torch.equal, first.masks, second.masks))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight, sum(first.masks))
    without = fit(ExtraDraws(), history=1)
    assert not torch.equal(without.weight, fit().weight)  # what the callback is for


def test_steps_epochs_and_seeds_draw_different_masks(fit: Callable[..., Masks]) -> None:
    """False failure: below 2^-33 (66 pairs of masks of 40 elements)."""
    masks = [tuple(mask.tolist()) for seed in (1, 2) for mask in fit(StepSeed(seed)).masks]
    assert len(set(masks)) == 12


def test_seed_is_a_function_of_seed_rank_epoch_and_batch() -> None:
    def seed(seed: int, rank: int, epoch: int, batch: int) -> int:
        trainer: Any = SimpleNamespace(global_rank=rank, current_epoch=epoch)
        StepSeed(seed).on_train_batch_start(trainer, Masks(), None, batch)
        return torch.initial_seed()

    combinations = list(product(range(3), repeat=4))
    assert len({seed(*c) for c in combinations}) == len(combinations)
    assert [seed(*c) for c in combinations] == [seed(*c) for c in combinations]
