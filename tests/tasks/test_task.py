"""The learning rate as a table of steps, which parameters decay, and what a checkpoint builds again."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path  # mlp only
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thinned.models import MLP  # mlp only
from thinned.tasks.optimisation import (
    decay_groups,  # mlp only
    warmup_cosine,
)
from thinned.tasks.task import Task

QUARTER = 0.5 * (1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("warmup_steps", "total_steps", "final_fraction", "expected"),
    [
        (4, 12, 0.0, {0: 1 / 5, 1: 2 / 5, 3: 4 / 5, 4: 1, 6: QUARTER, 8: 1 / 2, 10: 1 - QUARTER, 12: 0, 99: 0}),
        (4, 12, 0.2, {0: 1 / 5, 4: 1, 8: 0.6, 12: 0.2, 99: 0.2}),
        (0, 8, 0.0, {0: 1, 4: 1 / 2, 8: 0}),
        (2, 10, 1.0, {0: 1 / 3, 1: 2 / 3, 2: 1, 7: 1, 10: 1}),
        (5, 3, 0.1, {0: 1 / 6, 2: 1 / 2}),  # training ends during warm-up
        (3, 3, 0.1, {2: 3 / 4, 3: 1, 4: 0.1}),
    ],
)
def test_warmup_and_cosine_by_steps(
    warmup_steps: int, total_steps: int, final_fraction: float, expected: dict[int, float]
) -> None:
    got = {step: warmup_cosine(step, warmup_steps, total_steps, final_fraction) for step in expected}
    assert got == pytest.approx(expected, abs=1e-15)


# mlp only: begin
def test_matrices_decay_and_vectors_do_not() -> None:
    net = MLP((1, 4, 4), 3, (5,), layer_norm=True, width=6, patch_size=2)
    net.stages.linear0.requires_grad_(False)
    names = {id(parameter): name.removeprefix("stages.") for name, parameter in net.named_parameters()}
    decay, no_decay = ([names[id(parameter)] for parameter in group] for group in decay_groups(net))
    assert decay == [
        "embedding.position", "embedding.projection.weight", "pooling.key_value.weight", "head.weight",
    ]  # fmt: skip
    assert no_decay == [
        "embedding.projection.bias", "pooling.query", "pooling.key_value.bias", "norm0.weight", "norm0.bias",
        "head.bias",
    ]  # fmt: skip


# mlp only: end
class Squares(Task):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()


def test_optimiser_follows_the_schedule_step_by_step(make_trainer: Callable[..., Trainer]) -> None:
    rates: list[float] = []

    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            first, second = trainer.optimizers[0].param_groups
            assert first["lr"] == second["lr"]
            assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0)
            assert ([p.dim() for p in first["params"]], [p.dim() for p in second["params"]]) == ([2], [1])
            rates.append(first["lr"])

    task = Squares(nn.Linear(2, 1), partial(torch.optim.SGD, lr=3.0, weight_decay=0.5), 2, final_lr_fraction=0.1)
    trainer = make_trainer(max_epochs=3, callbacks=[Record()])
    trainer.fit(task, DataLoader(torch.zeros(8, 2), batch_size=4))
    assert rates == pytest.approx([3 * warmup_cosine(step, 2, 6, 0.1) for step in range(6)])


class Rates(Callback):
    """Keeps the settings with which each step is taken."""

    def __init__(self) -> None:
        self.groups: list[list[dict[str, Any]]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


def test_schedule_counts_the_steps_of_an_accumulation_that_changes(make_trainer: Callable[..., Trainer]) -> None:
    """Of four batches an epoch: 4 steps in the first, then 1 in each of two more."""
    rates = Rates()
    task = Squares(nn.Linear(2, 1), partial(torch.optim.SGD, lr=1.0))
    trainer = make_trainer(max_epochs=3, callbacks=[rates, GradientAccumulationScheduler({1: 4})])
    trainer.fit(task, DataLoader(torch.zeros(8, 2), batch_size=2))
    got = [groups[0]["lr"] for groups in rates.groups]
    assert got == pytest.approx([warmup_cosine(step, 0, 6, 0.0) for step in range(6)])


def test_learning_rate_is_constant_if_training_has_no_end(
    make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    rates: list[float] = []

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            trainer.should_stop = len(rates) == 5

    task = Squares(nn.Linear(2, 1), partial(torch.optim.SGD, lr=3.0), 2)
    with caplog.at_level("INFO"):
        make_trainer(max_epochs=-1, callbacks=[Stop()]).fit(task, DataLoader(torch.zeros(8, 2), batch_size=4))
    assert rates == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0])
    assert any("the learning rate stays at its peak" in message for message in caplog.messages)


def test_only_fitting_compiles_and_only_the_net() -> None:
    for compile, stage, compiled in ((True, "fit", 1), (True, "test", 0), (False, "fit", 0)):
        task = Task(nn.Linear(2, 1), compile=compile)
        with mock.patch.object(nn.Module, "compile", autospec=True) as called:
            task.setup(stage)
        assert [call.args[0] for call in called.mock_calls] == [task.net] * compiled
        assert isinstance(task, LightningModule)


@pytest.mark.parametrize(
    ("key", "value"), [("warmup_steps", -1), ("final_lr_fraction", 1.5), ("final_lr_fraction", float("nan"))]
)
def test_setting_outside_its_range_is_refused_by_its_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected model\.{key} .*but got {value}"):
        Task(nn.Linear(2, 1), **{key: value})


# mlp only: begin
# Checkpoints of a plain Trainer


class Margin(Squares):
    """A task with an argument of its own."""

    def __init__(self, net: nn.Module, margin: float = 1.0, **options: Any) -> None:
        super().__init__(net, **options)
        self.hparams.update(margin=margin)
        self.margin = margin


@pytest.fixture
def saved(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[[Task], Path]:
    """Trains for a step and returns the path of the checkpoint."""

    def save(task: Task) -> Path:
        trainer = make_trainer(max_steps=1)
        trainer.fit(task, DataLoader(torch.ones(4, 2), batch_size=4))
        trainer.save_checkpoint(tmp_path / "task.ckpt")
        return tmp_path / "task.ckpt"

    return save


def built(task: Task) -> tuple[type, dict[str, Any]]:
    """The class of the optimiser that a task makes, and its settings."""
    optimizer = task.optimizer([nn.Parameter(torch.zeros(1))])
    return type(optimizer), optimizer.defaults


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        torch.optim.SGD,  # whose weight decay is 0, and that of the default optimiser 0.01
        partial(torch.optim.AdamW, lr=0.1, betas=(0.5, 0.9)),
        partial(partial(torch.optim.SGD, lr=0.1), momentum=0.9),
        lambda groups: torch.optim.SGD(groups, lr=0.2),
    ],
)
def test_optimiser_comes_back_with_its_class_and_arguments(optimizer: Any, saved: Callable[[Task], Path]) -> None:
    task = Squares(MLP((2,), 2), optimizer)
    twin = Squares.load_from_checkpoint(saved(task), weights_only=True)
    assert built(twin) == built(task)
    again = Squares.load_from_checkpoint(saved(twin), weights_only=True)  # of the task that a checkpoint has built
    assert built(again) == built(task)


def test_optimiser_that_primitives_cannot_describe_is_passed_on(saved: Callable[[Task], Path]) -> None:
    optimizer = partial(torch.optim.SGD, lr=torch.tensor(0.2))
    task = Squares(MLP((2,), 2), optimizer)
    path = saved(task)
    assert "optimizer" not in torch.load(path, weights_only=True)["hyper_parameters"]
    twin = Squares.load_from_checkpoint(path, weights_only=True, optimizer=optimizer)
    assert built(twin) == built(task)


def test_subclass_adds_its_own_argument(saved: Callable[[Task], Path]) -> None:
    task = Margin(MLP((2,), 2), margin=0.25, warmup_steps=3, final_lr_fraction=0.5)
    twin = Margin.load_from_checkpoint(saved(task), weights_only=True)
    assert (twin.margin, twin.warmup_steps, twin.final_lr_fraction, twin.compile_net) == (0.25, 3, 0.5, False)
    assert twin.hparams == task.hparams


def test_a_class_that_cannot_be_imported_is_not_stored() -> None:
    class Local(MLP):
        """A net that nobody else can import."""

    assert "net" not in Task(Local((2,), 2)).hparams


# mlp only: end
