"""Dropout masks in training as a function of (seed, rank, epoch, batch), never of history.

`seed_everything` gives every rank the same random state, so data-parallel replicas would drop the same units.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from thinned.models.dropout import derive_seed


class StepSeed(Callback):
    """Seeds torch before each training batch. Ranks and steps draw different masks; a resumed run draws the same.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = derive_seed(self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        # Not torch.manual_seed: where CUDA is not in use it formats a stack trace, which costs 0.4 ms.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)
