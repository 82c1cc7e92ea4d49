"""Callbacks with which a test breaks a run in all its processes: a rank that dies, a loss that is not finite."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def note_time() -> None:
    """Writes down when the fault was."""
    Path("fault").write_text(str(time.time()))


class DyingRank(Callback):
    """One rank ends at the third batch of a stage.

    Args:
        rank: which.
        stage: train or test.
        by: kill (SIGKILL), exception, or kill_unnoticed, while the other rank waits for something else.
    """

    def __init__(self, rank: int, stage: str, by: str) -> None:
        self.rank, self.stage, self.by = rank, stage, by

    def _end(self, trainer: Trainer, stage: str, batch_idx: int) -> None:
        if (stage, batch_idx) != (self.stage, 2):
            return
        if trainer.global_rank == self.rank:
            note_time()
            if self.by == "exception":
                raise ZeroDivisionError("a bug in this rank alone")
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.by == "kill_unnoticed":
            time.sleep(600)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end(trainer, "train", batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._end(trainer, "test", batch_idx)


class NonFiniteLoss(Callback):
    """Makes the loss of some batches NaN, on one rank, by their first input.

    Args:
        batches: which.
        rank: on which.
    """

    def __init__(self, batches: list[int], rank: int = 0) -> None:
        self.batches, self.rank = batches, rank

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx in self.batches:
            note_time()
            batch[0].view(-1)[0] = torch.nan


class Vanishing(Callback):
    """At the second training batch, a file or folder is deleted, or a file cut off.

    Args:
        path: of it.
        cut: whether the file stays, without its content.
    """

    def __init__(self, path: str, cut: bool = False) -> None:
        self.path, self.cut = Path(path), cut

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and self.cut:
            os.truncate(self.path, 0)
        elif batch_idx == 1 and self.path.exists():
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()
