"""Modules and data of anyone's make, and stages of the Trainer run with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thinned.evaluation import MCDropout


class Plain(LightningModule):
    """Anyone's module: no metrics, no hyperparameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0])


class Splits(LightningDataModule):
    """A validation split, and one for test and prediction."""

    def __init__(self, val: DataLoader[Any], test: DataLoader[Any], tokenizer: Any = None) -> None:
        super().__init__()
        self.val_dataloader = lambda: val
        self.test_dataloader = self.predict_dataloader = lambda: test
        if tokenizer is not None:
            self.tokenizer = tokenizer


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    return Plain


@pytest.fixture(scope="session")
def splits() -> type[Splits]:
    return Splits


@pytest.fixture
def read_rows(tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Reads the columns of a parquet file that a stage wrote."""

    def read(name: str = "predictions") -> dict[str, Tensor]:
        table = pq.read_table(tmp_path / f"{name}.parquet")
        return {column: torch.tensor(table[column].to_pylist()) for column in table.column_names}

    return read


@pytest.fixture
def run(
    make_trainer: Callable[..., Trainer],
    read_rows: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Runs a stage of the Trainer; returns the metrics of `test`, or the rows of `predict`.

    Drawing takes longer than all the rest together, so pictures are left out where nobody asks for them.
    """

    def stage(name: str, net: nn.Module, data: Any, pictures: bool = False, **options: Any) -> dict[str, Any]:
        if not pictures:
            monkeypatch.setattr("thinned.evaluation.figures.figures", lambda *args: {})
        callback = MCDropout(**{"num_samples": 8, "seed": 3} | options)
        trainer = make_trainer(callbacks=[callback])
        if name == "test":
            trainer.test(Plain(net), data, verbose=False)
            metrics = json.loads((tmp_path / "metrics.json").read_text())
            return {"logged": {k: v.item() for k, v in trainer.callback_metrics.items()}, **metrics}
        trainer.predict(Plain(net), data, return_predictions=False)
        return read_rows()

    return stage
