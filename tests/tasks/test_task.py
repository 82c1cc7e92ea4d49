"""The learning rate as a table of steps, and which parameters decay."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thinned.models import MLP
from thinned.tasks.task import Task, decay_groups, warmup_cosine

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


def test_learning_rate_is_constant_if_training_has_no_end(make_trainer: Callable[..., Trainer]) -> None:
    rates: list[float] = []

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            trainer.should_stop = len(rates) == 5

    task = Squares(nn.Linear(2, 1), partial(torch.optim.SGD, lr=3.0), 2)
    make_trainer(max_epochs=-1, callbacks=[Stop()]).fit(task, DataLoader(torch.zeros(8, 2), batch_size=4))
    assert rates == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0])


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
