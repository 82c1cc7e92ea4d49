"""Defines what all tasks share: net, optimiser with decay groups, learning rate by step, scores of whole splits."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

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
from torch.optim.lr_scheduler import LambdaLR

from thinned.data.module import data_offers
from thinned.models.net import logits_in, net_offers
from thinned.ranks import of_all_ranks
from thinned.tasks.optimisation import class_spec, decay_groups, optimizer_spec, total_steps, warmup_cosine
from thinned.tasks.throughput import is_logged

FIT_SCORES = ("nll", "accuracy")  # logged for training examples too, to compare with validation


class Task(LightningModule):
    """Trains a net with an optimiser and a schedule. Subclasses add `training_step`, `test_step`, `keep` and `scores`.

    Validation and test steps `keep` numbers of their batch. `scores` turns those of all batches and processes into the
    scores of the whole split, which are logged. A validation in training also scores as many batches of training
    examples if the data module offers them (`DataOffers.fit_dataloader`): the gap between `fit/nll` and `val/nll`, or
    their accuracies, shows what was learned by heart. `train/lr` is the rate of the first group.

    `load_from_checkpoint(path, weights_only=True)` rebuilds the task from its `hparams`, which are primitives. A
    subclass adds its own arguments in `__init__`: `self.hparams.update(margin=margin)`. Unless the command line built
    the task, it needs `net=` for a net without `init_args`, and `optimizer=` if settings are not primitives.

    `test_step` may return the `Logits` of its batch, (B, K) or (B, T, V): evaluation takes the deterministic prediction
    from them. If it returns None, evaluation runs the net again.

    Args:
        net: Maps inputs to logits. Its `constrain_max_norm_`, if it has one, runs after each step.
        optimizer: Called with two parameter groups; the second, gains and biases, has weight_decay 0.
        warmup_steps: Optimiser steps of linear warm-up.
        final_lr_fraction: Share of the peak learning rate that a cosine reaches at the last step; 1 is constant.
        compile: Compile the net (not the LightningModule: torch 2.12 and later cannot log from compiled code).
    """

    net: nn.Module
    test_scores: ClassVar[frozenset[str]] = frozenset()  # logged under `test/` by the task, so not by evaluation

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
        self.net, self.optimizer, self.compile_net = net, optimizer, compile
        self.warmup_steps, self.final_lr_fraction = warmup_steps, final_lr_fraction
        self.hparams.update(warmup_steps=warmup_steps, final_lr_fraction=final_lr_fraction, compile=compile)
        specs = {"net": class_spec(type(net), net_offers(net).init_args), "optimizer": optimizer_spec(optimizer)}
        self.hparams.update({name: spec for name, spec in specs.items() if spec is not None})
        # Lightning builds net and optimiser from their specs with this function.
        self.hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        self.kept: list[Tensor] = []
        self._kept_of_fit: list[Tensor] = []
        self._fit_batches: Iterator[Any] = iter(())

    def setup(self, stage: str) -> None:
        self.kept, self._kept_of_fit = [], []  # drops what an interrupted validation has kept
        if self.compile_net and stage == "fit" and self.device_mesh is None:
            self.net.compile()

    def configure_model(self) -> None:
        """Shards the net over all processes (FSDP2) under a `ModelParallelStrategy`.

        It gathers one of `net.blocks` at a time, or the whole net if it has none.
        """
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        mesh = init_device_mesh(self.device_mesh.device_type, (torch.distributed.get_world_size(),))
        for unit in (*net_offers(self.net).blocks, self.net):
            if self.compile_net and unit is not self.net:  # FSDP's hooks break the graph of the whole net
                unit.compile()
            fully_shard(unit, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        decay, no_decay = decay_groups(self.net)
        sizes = [f"{len(group)} tensors with {sum(p.numel() for p in group):,}" for group in (decay, no_decay)]
        rank_zero_info(f"Weight decay on {sizes[0]} weights, none on {sizes[1]}.")
        optimizer = self.optimizer([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}])
        if (constrain := net_offers(self.net).constrain_max_norm_) is not None:
            optimizer.register_step_post_hook(lambda *_: constrain())

        if self.trainer.max_epochs == self.trainer.max_steps == -1:
            rank_zero_info("Training has no last step: after the warm-up, the learning rate stays at its peak.")

        def fraction(step: int) -> float:
            # Asking for the total builds the data loader, whose workers fetch at once. At step 0 a resumed run does not
            # know its position yet, and the total does not matter.
            total = total_steps(self.trainer) if step else math.inf
            return warmup_cosine(step, self.warmup_steps, total, self.final_lr_fraction)

        scheduler = LambdaLR(optimizer, fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning 2.6.6 refuses a fused optimiser in any mixed precision, though bf16 scales nothing.
        fused = optimizer.defaults.get("fused") and self.trainer.precision == "bf16-mixed"
        if fused and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if is_logged(self.trainer, self.trainer.global_step + 1):
            self.log("train/lr", optimizer.param_groups[0]["lr"], batch_size=1)

    def forward(self, inputs: Any) -> Tensor:
        return logits_in(self.net, inputs)

    def keep(self, batch: Any) -> Any:
        """Appends M numbers for each example of a batch to `kept`: a tensor (M, n). A subclass defines it."""

    def scores(self, kept: Tensor) -> dict[str, Any]:
        """Returns the scores of a split, by name, from all kept numbers, (M, N). A subclass defines them."""
        return {}

    def on_validation_epoch_start(self) -> None:
        loader = data_offers(self.trainer).fit_dataloader if self.trainer.state.fn == "fit" else None
        self._fit_batches = iter(()) if loader is None else iter(loader())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.keep(batch)
        # Here WeightAveraging has its average in the net.
        if (batch := next(self._fit_batches, None)) is not None:
            batch = self.trainer.precision_plugin.convert_input(batch)
            of_validation, self.kept = self.kept, self._kept_of_fit
            self.keep(self.trainer.strategy.batch_to_device(batch, self.device))
            self.kept = of_validation

    def on_validation_epoch_end(self) -> None:
        self._fit_batches = iter(())
        self._log_scores("val", self.kept)
        self._log_scores("fit", self._kept_of_fit)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test", self.kept)

    def _log_scores(self, stage: str, kept: list[Tensor]) -> None:
        # Lightning 2.6.6 rounds weights down when it takes a mean over ranks, so all numbers are gathered.
        own = [torch.cat(kept, -1).cpu()] if kept else []  # a rank may have no example
        kept.clear()
        if parts := [part for of_rank in of_all_ranks(own) for part in of_rank]:
            values = self.scores(torch.cat(parts, -1))
            names = FIT_SCORES if stage == "fit" else values
            scores = {f"{stage}/{name}": float(values[name]) for name in names if name in values}
            self.log_dict(scores, prog_bar=stage == "val", sync_dist=True, batch_size=1)  # the ranks agree already

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the logits of the deterministic network, or an empty tensor if nothing uses them."""
        writers = any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        inputs: Tensor = batch if isinstance(batch, Tensor) else batch[0]
        return self(inputs) if writers or self.trainer.predict_loop.return_predictions else inputs.new_empty(0)
