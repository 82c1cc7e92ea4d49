"""Which checkpoint an error names when it ends a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from thinned.runs.checkpoint_callback import Checkpoints


class Failing(LightningModule):
    """Raises an error at the given batch, or before the first one."""

    def __init__(self, error: Exception, batch: int | None) -> None:
        super().__init__()
        self.error, self.batch = error, batch
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def on_train_start(self) -> None:
        if self.batch is None:
            raise self.error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == self.batch:
            raise self.error
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def notes_after(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., list[str]]:
    """Trains until the error, with a checkpoint after every two of six batches, and returns the error's notes."""

    def run(error: Exception, batch: int | None) -> list[str]:
        checkpoints = Checkpoints(dirpath=tmp_path, every_n_train_steps=2)
        trainer = make_trainer(callbacks=[checkpoints], enable_checkpointing=True, max_epochs=1)
        with pytest.raises(type(error)):
            trainer.fit(Failing(error, batch), DataLoader(torch.zeros(6), batch_size=1))
        return getattr(error, "__notes__", [])

    return run


def test_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every_n_train_steps to be 0 or more, but got -1"):
        Checkpoints(every_n_train_steps=-1)


def test_run_resumed_with_another_number_of_steps_finds_its_best_score() -> None:
    keys = {Checkpoints(every_n_train_steps=steps).state_key for steps in (None, 2, 5)}
    assert len(keys) == 1


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")


@pytest.mark.parametrize(
    ("error", "batch", "expected"),
    [
        (ValueError("bad"), None, []),
        (ValueError("bad"), 1, ["(last checkpoint: none yet)"]),
        (ValueError("bad"), 5, ["(last checkpoint: {folder}/last.ckpt)"]),
        (RuntimeError("a bug"), 5, []),
        (LOST, 1, []),
        (LOST, 5, ["resume from {folder}/last.ckpt"]),
    ],
    ids=["before training", "no checkpoint", "checkpoint", "bug", "lost rank, no checkpoint", "lost rank"],
)
def test_error_names_the_last_checkpoint(
    error: Exception, batch: int | None, expected: list[str], notes_after: Callable[..., list[str]], tmp_path: Path
) -> None:
    fresh = type(error)(*error.args)
    assert notes_after(fresh, batch) == [note.format(folder=tmp_path) for note in expected]
