"""Keeps losses and gradients that are not finite out of the weights."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from thinned.ranks import of_all_ranks
from thinned.tasks.throughput import is_logged


class FiniteSteps(Callback):
    """Stops the run, or skips the step, if the gradients of an optimiser step are not finite.

    The check takes the norm of the gradients after they are reduced over all ranks, so that these decide alike, and
    before they are clipped. In fp16-mixed, the scaler handles infinite gradients unless a loss is not finite either.

    Args:
        on_nonfinite: `stop` raises ValueError on all ranks before the step is taken. `skip` leaves weights, momentum
            and decay as they were, and logs the number of skipped steps as `train/skipped_steps`.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"] = "stop") -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"Expected finite_steps.on_nonfinite to be stop or skip, but got {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.skipped_steps = 0
        self._losses: list[tuple[int, Any, Tensor]] = []  # number, batch and loss, since the last step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx, batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((*self._batch, loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for order in (2.0, torch.inf):  # squares can overflow; the largest element cannot, but takes longer to find
            norm: Any = get_total_norm(gradients, order)
            if (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite():  # of sharded gradients
                return
        own = [_described(trainer.global_rank, *item) for item in losses if not item[2].isfinite()]
        wrong = [text for of_rank in of_all_ranks(own) for text in of_rank]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and not wrong:
            return
        kind, got = ("losses", "; ".join(wrong)) if wrong else ("gradients", "others, though every loss is finite")
        message = f"Expected finite {kind} at step {trainer.global_step} (epoch {trainer.current_epoch}), but got {got}"
        if self.on_nonfinite == "stop":
            raise ValueError(f"{message}. --finite_steps.on_nonfinite skip leaves such steps out")
        self.skipped_steps += 1
        rank_zero_info(f"{message}. This step is left out.")
        if not scaled:  # a scaler skips the step itself
            optimizer.zero_grad()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.on_nonfinite == "skip" and is_logged(trainer, trainer.global_step):
            pl_module.log("train/skipped_steps", float(self.skipped_steps), batch_size=1)

    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]


def _described(rank: int, batch_idx: int, batch: Any, loss: Tensor) -> str:
    """Names a batch with a loss that is not finite, and its first examples if it has their indices."""
    has_index = isinstance(batch, tuple | list) and len(batch) > 2
    examples = f" (examples {batch[2][:8].tolist()} of {len(batch[2])})" if has_index else ""
    return f"{loss.item()} in batch {batch_idx}{examples} of rank {rank}"
