"""A callback that ends its own run, or tells it to end, at an exact moment; without SIGNAL_AT it does nothing."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import Callback, LightningModule, Trainer

HOOKS = (
    "on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_train_epoch_end",
    "on_validation_start", "on_validation_batch_start", "on_validation_end", "on_test_batch_end",
)  # fmt: skip


class Killer(Callback):
    """Sends a signal at the n-th call of a hook: SIGNAL_AT="SIGKILL on_train_batch_end 7", to the rank RANK_TOLD (0).

    "writing" stands for a checkpoint of which half is on the disk, "renamed" for one that has just got its name.
    SIGKILL is for the whole process group, as if the machine had failed.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        signum, self.hook, left = os.environ.get("SIGNAL_AT", "SIGKILL never 0").split()
        self.signum, self.left = signal.Signals[signum], int(left)
        self.is_it = trainer.global_rank == int(os.environ.get("RANK_TOLD", "0"))
        if stage == "fit" and self.hook in ("writing", "renamed"):
            mock.patch.object(os, "fsync", self.fsync).start()

    def at(self, hook: str, trainer: Trainer) -> None:
        if hook == self.hook and self.is_it and not trainer.sanity_checking:
            self.left -= 1
            if self.left == 0:
                self.send()

    def fsync(self, descriptor: int) -> None:
        synced = os.path.realpath(f"/dev/fd/{descriptor}")
        is_file = synced.endswith(".tmp.ckpt")
        self.left -= is_file
        if self.left == 0 and is_file and self.hook == "writing":
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            self.send()
        if self.left == 0 and synced.endswith("checkpoints") and self.hook == "renamed":
            self.send()

    def send(self) -> None:
        Path("told").touch()
        if self.signum == signal.SIGKILL:
            os.killpg(0, self.signum)
        else:
            for _ in range(int(os.environ.get("TIMES", "1"))):
                os.kill(os.getpid(), self.signum)


def _hook(name: str) -> Any:
    return lambda self, trainer, *_: self.at(name, trainer)


for name in HOOKS:
    setattr(Killer, name, _hook(name))
