"""Makes dropout masks in training a function of (seed, rank, epoch, batch), never of history."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from thinned.models.dropout import derive_seed


class StepSeed(Callback):
    """Seeds torch before each training batch with the run's seed, so that a resumed run draws the same masks.

    Ranks draw different masks: after `seed_everything` alone, data-parallel replicas would drop the same units.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = derive_seed(self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        # Not torch.manual_seed: if CUDA is not in use, that formats a stack trace, which costs 0.4 ms.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)
