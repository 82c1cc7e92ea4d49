"""A callback that each process of a data-parallel run takes along, to be compared afterwards."""

from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from thinned.models import dropout


class RankWitness(Callback):
    """Saves the masks that this process drew and the weights with which it ended as `rank<r>.pt`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.masks: list[torch.Tensor] = []
        self.spy = mock.patch.object(dropout, "dropout_mask", self.draw(dropout.dropout_mask))
        self.spy.start()

    def draw(self, dropout_mask: Any) -> Any:
        def drawn(*args: Any) -> torch.Tensor:
            self.masks.append(dropout_mask(*args))
            return self.masks[-1]

        return drawn

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.spy.stop()
        weights = [parameter.detach() for parameter in pl_module.parameters()]
        torch.save({"masks": self.masks, "weights": weights}, f"rank{trainer.global_rank}.pt")
