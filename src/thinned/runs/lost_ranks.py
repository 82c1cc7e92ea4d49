"""If one process of a data-parallel run dies, the others say so and end."""

import os
import sys
import time
from threading import Thread

from lightning.pytorch import Callback, LightningModule, Trainer

from thinned.runs.checkpoint_io import last_checkpoint

INTERVAL = 2.0  # seconds


class LostRanks(Callback):
    """Ends a rank whose launcher has died and names the checkpoint to resume from; NCCL would wait for half an hour."""

    _watched = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if not self._watched and trainer.world_size > 1 and (by_torchrun or trainer.local_rank > 0):
            self._watched = True
            Thread(target=_end_with, args=(os.getppid(), trainer), daemon=True).start()


def _end_with(launcher: int, trainer: Trainer) -> None:
    while os.getppid() == launcher:
        time.sleep(INTERVAL)
    lost = f"Expected all ranks to answer, but got rank {trainer.global_rank} without the process that launched it"
    path = last_checkpoint(trainer)
    print(f"error: {lost}" + (f": resume from {path}" if path else ""), file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may wait in a collective for ever
