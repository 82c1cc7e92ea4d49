"""What every task shares: the net, its optimiser with decay groups, and a learning rate by step."""

import inspect
import math
import warnings
from functools import cache
from types import FrameType
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer


def warmup_cosine(step: int, warmup_steps: int, total_steps: float, final_fraction: float) -> float:
    """The learning rate at a step, as a fraction of its peak.

    Linear from 1 / (warmup_steps + 1) at step 0 to 1 at step `warmup_steps`, then half a cosine (Loshchilov and
    Hutter 2017) to `final_fraction` at `total_steps`, and constant from there on. It stays at 1 if the total is inf.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that decay (matrices: two dimensions or more) and those that do not (gains and biases)."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]


class Task(LightningModule):
    """A net with its optimiser and schedule. Subclasses add the loss and the metrics.

    Args:
        net: maps inputs to logits. Any module; when it has `constrain_max_norm_`, that runs after each step.
        optimizer: called with two parameter groups; the second, gains and biases, has weight_decay 0.
        warmup_steps: optimiser steps of linear warm-up.
        final_lr_fraction: of the peak learning rate, reached at the last step by a cosine; 1 keeps it constant.
        compile: compile the net (not the LightningModule: torch 2.12 and later cannot log from compiled code).
    """

    net: nn.Module

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        final_lr_fraction: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"Expected model.warmup_steps to be 0 or more, but got {warmup_steps}")
        if not 0 <= final_lr_fraction <= 1:
            raise ValueError(f"Expected model.final_lr_fraction in [0, 1], but got {final_lr_fraction}")
        self.net = net
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr_fraction = final_lr_fraction
        self.compile_net = compile

    def save_settings(self) -> None:
        """Stores the arguments of the subclass's `__init__`, which calls this, so that its checkpoints stand alone.

        A net of this package is stored as class path and `config`. Any other net, and the optimiser, are given to
        `load_from_checkpoint`: `weights_only=True` opens no pickles.
        """
        caller = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
        with warnings.catch_warnings():  # of a module among the hyperparameters, which goes at once
            warnings.simplefilter("ignore")
            self.save_hyperparameters(logger=False, frame=caller)
        if "_instantiator" in self.hparams:  # built from a config
            return
        self.save_hyperparameters(ignore=["net", "optimizer"], logger=False, frame=caller)
        config = getattr(self.net, "config", None)
        if config is not None:
            class_path = f"{type(self.net).__module__}.{type(self.net).__qualname__}"
            self.hparams["net"] = {"class_path": class_path, "init_args": config}
            self.hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"

    def forward(self, inputs: Any) -> Tensor:
        """The logits."""
        logits: Tensor = self.net(inputs)
        return logits

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The logits of the deterministic network; none where nobody is there to take them (`return_predictions`)."""
        writers = any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        inputs: Tensor = batch[0]
        return self(inputs) if writers or self.trainer.predict_loop.return_predictions else inputs.new_empty(0)

    def setup(self, stage: str) -> None:
        if self.compile_net and stage == "fit" and self.device_mesh is None:
            self.net.compile()

    def configure_model(self) -> None:
        """Shards the net over all processes (FSDP2) where the strategy is a `ModelParallelStrategy`.

        The unit that is gathered at a time is one of `net.blocks`, where the net has them; else the whole net.
        """
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        mesh = init_device_mesh(self.device_mesh.device_type, (torch.distributed.get_world_size(),))
        for unit in (*getattr(self.net, "blocks", ()), self.net):
            if self.compile_net and unit is not self.net:  # FSDP's own hooks break the graph of the whole
                unit.compile()
            fully_shard(unit, mesh=mesh)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning 2.6.6 refuses a fused optimiser in any mixed precision, though in bf16 nothing was scaled.
        fused = optimizer.defaults.get("fused") and self.trainer.precision == "bf16-mixed"
        if fused and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        decay, no_decay = decay_groups(self.net)
        sizes = [f"{len(group)} tensors with {sum(p.numel() for p in group):,}" for group in (decay, no_decay)]
        rank_zero_info(f"Weight decay on {sizes[0]} weights, none on {sizes[1]}.")
        optimizer = self.optimizer([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}])
        constrain = getattr(self.net, "constrain_max_norm_", None)
        if constrain is not None:
            optimizer.register_step_post_hook(lambda *_: constrain())

        @cache
        def total_steps() -> float:
            return self.trainer.estimated_stepping_batches

        def fraction(step: int) -> float:
            # Step 0 does not depend on the total, which is asked for later: it builds the data loader, whose workers
            # fetch at once, and a resumed run does not know yet where it is.
            total = total_steps() if step else math.inf
            return warmup_cosine(step, self.warmup_steps, total, self.final_lr_fraction)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
