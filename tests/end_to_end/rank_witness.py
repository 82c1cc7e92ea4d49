"""A callback that each process of a data-parallel run takes along, to be compared afterwards."""

from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from thinned.models import dropout


class RankWitness(Callback):
    """Saves what this process had as `rank<r>.pt`: indices and masks of each batch, weights and fit scores at last."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.indices: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []
        self.spy = mock.patch.object(dropout, "dropout_mask", self.draw(dropout.dropout_mask))
        self.spy.start()

    def draw(self, dropout_mask: Any) -> Any:
        def drawn(*args: Any) -> torch.Tensor:
            self.masks.append(dropout_mask(*args))
            return self.masks[-1]

        return drawn

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.indices.append(batch[2].clone())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.spy.stop()
        weights = [parameter.detach() for parameter in pl_module.parameters()]
        weights = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
        fit = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("fit/")}
        seen = {"fit": fit, "indices": self.indices, "masks": self.masks, "weights": weights}
        torch.save(seen, f"rank{trainer.global_rank}.pt")
