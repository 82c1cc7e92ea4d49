"""Steps that are not finite: stopped before they are taken, or left out without a trace."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from thinned.tasks import FiniteSteps

BATCHES = 8


class Batch(NamedTuple):
    factor: Tensor  # of the loss
    target: Tensor
    index: Tensor  # type: ignore[assignment]


class Factors(Dataset[Batch]):
    """Batches of ten examples; the loss of batch i is multiplied by factors[i]."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors = factors

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, i: int) -> Batch:
        return Batch(torch.tensor(self.factors.get(i, 1.0)), torch.tensor(0), torch.arange(10 * i, 10 * i + 10))


class Quadratic(LightningModule):
    """Two weights that AdamW draws to 3; keeps them as they are after each batch."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.history: list[Tensor] = []
        self.moments: list[Tensor] = []
        self.fused = fused

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return batch.factor * self.loss(self.weight)

    def loss(self, weight: Tensor) -> Tensor:
        return (weight - 3).square().sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(self.weight.detach().clone())
        state = self.trainer.optimizers[0].state[self.weight]
        self.moments.append(state["exp_avg"].clone() if state else torch.zeros(2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5, fused=self.fused)


class SteepRoot(Quadratic):
    """Its loss is finite, and its gradient is infinite where a weight is 0."""

    def loss(self, weight: Tensor) -> Tensor:
        return weight.abs().sqrt().sum()


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer]) -> Callable[..., Quadratic]:
    def run(
        callback: FiniteSteps, factors: dict[int, float], module: Quadratic | None = None, **options: Any
    ) -> Quadratic:
        module = module or Quadratic()
        callbacks = [callback, *options.pop("callbacks", [])]
        trainer = make_trainer(callbacks=callbacks, max_epochs=1, **options)
        trainer.fit(module, DataLoader(Factors(factors), batch_size=None), weights_only=True)
        return module

    return run


def test_finite_steps_are_untouched(fit: Callable[..., Quadratic]) -> None:
    with mock.patch.object(FiniteSteps, "on_before_optimizer_step"):
        without = fit(FiniteSteps(), {})
    assert torch.equal(torch.stack(fit(FiniteSteps(), {}).history), torch.stack(without.history))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_stop_names_batch_and_examples(value: float, fit: Callable[..., Quadratic]) -> None:
    module = Quadratic()
    message = (
        rf"Expected finite losses at step 5 \(epoch 0\), but got {value} in batch 5 \(examples \[50, .*, 57\] of 10\) "
        r"of rank 0\. --finite_steps\.on_nonfinite skip leaves such steps out$"
    )
    with pytest.raises(ValueError, match=message):
        fit(FiniteSteps(), {5: value}, module)
    assert len(module.history) == 5
    assert torch.equal(module.weight, module.history[-1])


def test_stop_names_all_batches_of_an_accumulated_step(fit: Callable[..., Quadratic]) -> None:
    with pytest.raises(ValueError, match=r"at step 1 .* but got nan in batch 4 .*; inf in batch 6 \(ex[^;]* --fin"):
        fit(FiniteSteps(), {4: math.nan, 6: math.inf}, accumulate_grad_batches=4)


def test_infinite_gradients_of_a_finite_loss_are_said_as_such(fit: Callable[..., Quadratic]) -> None:
    with pytest.raises(ValueError, match=r"finite gradients at step 0 .* but got others, though every loss is finite"):
        fit(FiniteSteps(), {}, SteepRoot())


def test_large_gradients_are_finite_though_their_squares_are_not(fit: Callable[..., Quadratic]) -> None:
    assert len(fit(FiniteSteps(), {3: 1e30}).history) == BATCHES


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}, {"fused": True}], ids=str)
def test_skip_leaves_weights_and_momentum(
    options: dict[str, Any], fit: Callable[..., Quadratic], capfd: pytest.CaptureFixture[str]
) -> None:
    callback = FiniteSteps("skip")
    module = Quadratic(options.pop("fused", False))
    fit(callback, {2: math.nan, 5: math.inf}, module, **options)
    moved = [not torch.equal(*pair) for pair in zip(module.history, module.history[1:], strict=False)]
    assert moved == [True, False, True, True, False, True, True]
    assert torch.equal(module.moments[1], module.moments[2])
    assert callback.skipped_steps == 2
    assert "step 2 (epoch 0), but got nan in batch 2 (examples [20, 21" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")  # here no ModelCheckpoint
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning")
def test_count_of_skipped_steps_is_logged_and_resumed(
    fit: Callable[..., Quadratic], make_trainer: Callable[..., Trainer], tmp_path: Any
) -> None:
    first = ModelCheckpoint(tmp_path, "first", every_n_train_steps=4)
    fit(FiniteSteps("skip"), {1: math.nan}, callbacks=[first], enable_checkpointing=True, max_steps=4)
    resumed = FiniteSteps("skip")
    trainer = make_trainer(callbacks=[resumed], max_steps=8, max_epochs=2, log_every_n_steps=1)
    data = DataLoader(Factors({2: math.nan}), batch_size=None)
    trainer.fit(Quadratic(), data, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert resumed.skipped_steps == 2
    assert trainer.logged_metrics["train/skipped_steps"] == 2


@pytest.mark.parametrize(("loss", "stops"), [(1.0, False), (math.nan, True)])
def test_infinite_gradients_of_scaled_losses_are_left_to_the_scaler(loss: float, stops: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, math.inf])
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=object()), strategy=None, world_size=1, global_rank=0, global_step=7,
        current_epoch=0,
    )  # fmt: skip
    callback = FiniteSteps()
    callback.on_train_batch_start(trainer, Quadratic(), weight, 3)
    callback.on_before_backward(trainer, Quadratic(), torch.tensor(loss))
    optimizer = torch.optim.SGD([weight])
    if stops:
        with pytest.raises(ValueError, match=r"but got nan in batch 3 of rank 0\. "):
            callback.on_before_optimizer_step(trainer, Quadratic(), optimizer)
    else:
        callback.on_before_optimizer_step(trainer, Quadratic(), optimizer)
        assert weight.grad is not None


def test_gradients_are_judged_before_clipping(fit: Callable[..., Quadratic]) -> None:
    """Clipping by value would make an infinite gradient a finite one."""
    with pytest.raises(ValueError, match="Expected finite losses"):
        fit(FiniteSteps(), {0: math.inf}, gradient_clip_val=0.5, gradient_clip_algorithm="value")


def test_setting() -> None:
    with pytest.raises(ValueError, match=r"Expected finite_steps\.on_nonfinite to be stop or skip, but got 'go'"):
        FiniteSteps("go")  # type: ignore[arg-type]
