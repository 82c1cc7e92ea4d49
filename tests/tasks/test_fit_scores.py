"""Scores of training examples (`fit/*`): those of the deterministic network, and training does not notice them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from thinned.models import Dropout
from thinned.tasks.task import Task

MakeTrainer = Callable[..., Trainer]
EXAMPLES = 24


def examples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(EXAMPLES, 5, generator=generator), torch.randint(3, (EXAMPLES,), generator=generator)


def batches(seed: int, size: int, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(seed)), size, shuffle=shuffle, generator=torch.Generator().manual_seed(0))


class Data(LightningDataModule):
    """Training examples in an order that shows whether something else draws from the global generator."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*examples(0)), 4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return batches(1, 8)


class FitData(Data):
    fit_batch_size = 10  # in batches of 10, 10 and 4

    def fit_dataloader(self) -> DataLoader[Any]:
        return batches(0, self.fit_batch_size)


class Small(Task):
    """A classifier without a thinned network, whose mean of means would be another number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), Dropout(0.5, site="mlp"), nn.Linear(16, 3))
        super().__init__(net, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.keep(batch)

    def keep(self, batch: Any) -> None:
        logits = self(batch[0])
        losses = F.cross_entropy(logits, batch[1], reduction="none")
        self.kept.append(torch.stack([losses, (logits.argmax(-1) == batch[1]).float()]))

    def scores(self, kept: Tensor) -> dict[str, Any]:
        return {"nll": kept[0].mean(), "accuracy": kept[1].mean(), "other": kept[0].max()}


class Record(Callback):
    """What is logged at each validation, and what the deterministic network says of the training examples then."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.expected: list[float] = []

    def on_validation_batch_end(self, trainer: Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 0 and not trainer.sanity_checking:
            inputs, targets = examples(0)
            self.expected.append(F.cross_entropy(task.net(inputs), targets).item())

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        if not trainer.sanity_checking:
            self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def fit(make_trainer: MakeTrainer, data: Data, *callbacks: Callback, **options: Any) -> tuple[Small, Record]:
    task, record = Small(), Record()
    make_trainer(max_epochs=3, callbacks=[*callbacks, record], **options).fit(task, datamodule=data)
    return task, record


def test_they_are_those_of_the_deterministic_network(make_trainer: MakeTrainer) -> None:
    _, record = fit(make_trainer, FitData())
    assert len(record.logged) == 3
    assert [row["fit/nll"] for row in record.logged] == pytest.approx(record.expected, rel=1e-6)
    assert {key for key in record.logged[0] if key.startswith("fit/")} == {"fit/nll", "fit/accuracy"}
    assert record.logged[0]["fit/nll"] != pytest.approx(record.logged[0]["val/nll"], rel=1e-3)


def test_training_does_not_notice_them(make_trainer: MakeTrainer) -> None:
    """The same weights, running statistics, masks and order of examples, bit by bit, without a seed for each step."""
    task, record = fit(make_trainer, FitData())
    generator = torch.get_rng_state()
    plain, without = fit(make_trainer, Data())
    assert torch.get_rng_state().equal(generator)
    for (name, one), other in zip(task.state_dict().items(), plain.state_dict().values(), strict=True):
        assert one.equal(other), name
    fits = {"fit/nll", "fit/accuracy"}
    assert [{k: v for k, v in row.items() if k not in fits} for row in record.logged] == without.logged


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_with_an_average_they_are_those_of_the_average(make_trainer: MakeTrainer) -> None:
    _, record = fit(make_trainer, FitData(), EMAWeightAveraging(decay=0.9))
    _, plain = fit(make_trainer, FitData())
    assert [row["fit/nll"] for row in record.logged] == pytest.approx(record.expected, rel=1e-6)
    assert record.expected[-1] != pytest.approx(plain.expected[-1], rel=1e-2)


@pytest.mark.parametrize(("size", "limit", "scored"), [(10, 2, 20), (2, 1.0, 6)])
def test_there_are_as_many_batches_as_of_validation_at_most(
    size: int, limit: float, scored: int, make_trainer: MakeTrainer
) -> None:
    data = FitData()
    data.fit_batch_size = size
    _, record = fit(make_trainer, data, limit_val_batches=limit)
    task, _ = fit(make_trainer, Data())
    inputs, targets = (part[:scored] for part in examples(0))
    expected = F.cross_entropy(task.net.eval()(inputs), targets).item()
    assert record.logged[-1]["fit/nll"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_there_are_none_after_training(stage: str, make_trainer: MakeTrainer) -> None:
    class Tested(FitData):
        test_dataloader = Data.val_dataloader

    trainer = make_trainer()
    getattr(trainer, stage)(Small(), datamodule=Tested(), verbose=False)
    assert {key.split("/")[0] for key in trainer.callback_metrics} == {stage.removesuffix("idate")}
