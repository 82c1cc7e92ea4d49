"""Language modelling: the loss of the next token, over every token of a split."""

import math
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from thinned.data.module import data_offers
from thinned.models.gpt2_weights import load_gpt2
from thinned.models.net import Logits, logits_of, net_offers
from thinned.tasks.task import Task


class LanguageModelingTask(Task):
    """A causal language model trained on the next token.

    Batches are tuples whose first two elements are tokens and targets, (B, T) each; a target of -100 does not count.
    Logs `loss` in nats per token under `train/`, and under `val/` and `test/` `loss`, `perplexity` (its exponential)
    and `bits_per_byte`, whose bytes are those that the data module's `tokenizer.token_bytes` gives each target.

    Args:
        net: maps tokens (B, T) to logits (B, T, V), and tokens with targets to their losses (B, T).
        optimizer, warmup_steps, final_lr_fraction, compile: see `Task`.
        init_from: start from GPT-2's weights: a hub id, such as gpt2, or a folder. Rates are the net's own.
    """

    test_scores: ClassVar[frozenset[str]] = frozenset({"nll", "bits_per_byte"})  # the NLL as `test/loss`

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        final_lr_fraction: float = 0.1,
        compile: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__(net, optimizer, warmup_steps, final_lr_fraction, compile)
        self.hparams.update(init_from=init_from)
        self.init_from = init_from
        # Weights of a run that goes on are not replaced.
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda *_: setattr(self, "init_from", None)
        )
        self.totals = nn.ModuleDict({f"{stage}_totals": Totals() for stage in ("val", "test")})
        self.token_bytes: Tensor | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        net, data = net_offers(self.net), data_offers(self.trainer)
        for key, needed, has, wants in (
            ("vocab_size", "tokens", net.vocab_size, data.vocab_size),
            ("context_length", "positions", net.context_length, data.context_length),
        ):
            if has is not None and wants is not None and wants > has:
                raise ValueError(f"Expected at least {wants} {needed} (model.net.{key}) for this data, but got {has}")
        self.token_bytes = None if data.tokenizer is None else data.tokenizer.token_bytes
        if self.init_from is not None and stage == "fit":
            load_gpt2(self.net, self.init_from)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, targets = self.net(batch[0], batch[1]), batch[1]
        loss = losses.sum() / (targets >= 0).sum()
        self.log("train/loss", loss, batch_size=len(targets), prog_bar=True)
        return loss

    def _measure(self, losses: Tensor, targets: Tensor, stage: str) -> None:
        """Adds targets that count, (n,), and their losses to the totals of a stage."""
        totals = self.totals[f"{stage}_totals"]
        assert isinstance(totals, Totals)
        totals.nll.update(losses)
        if self.token_bytes is not None:
            self.token_bytes = self.token_bytes.to(targets.device)
            totals.bytes.update(self.token_bytes[targets])

    def _log_epoch(self, stage: str) -> None:
        totals = self.totals[f"{stage}_totals"]
        assert isinstance(totals, Totals)
        if not totals.nll.update_called:
            return
        nll = totals.nll.compute()
        logged = {f"{stage}/loss": nll, f"{stage}/perplexity": nll.exp()}
        if totals.bytes.update_called:
            logged[f"{stage}/bits_per_byte"] = nll / (math.log(2) * totals.bytes.compute())
        self.log_dict(logged, prog_bar=stage == "val", sync_dist=True, batch_size=1)  # equal on all ranks
        with torch.inference_mode(False):  # a state made in it could not be updated by a later fit
            totals.nll.reset()
            totals.bytes.reset()

    def _measure_batch(self, batch: Any, stage: str) -> None:
        losses, counted = self.net(batch[0], batch[1]), batch[1] >= 0
        # The losses of the others are left out, as torchmetrics 1.9 ignores weights under nan_strategy="disable".
        self._measure(losses[counted], batch[1][counted], stage)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._measure_batch(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Logits | None:  # type: ignore[override]  # Lightning passes it on
        if net_offers(self.net).features is None or self.device_mesh is not None:
            self._measure_batch(batch, "test")  # a sharded net gathers its weights in `forward` alone
            return None
        output, counted = logits_of(self.net, batch[0]), batch[1] >= 0
        targets = batch[1][counted]
        for rows, log_probs in output.select(counted).log_probs():
            self._measure(-log_probs.gather(-1, targets[rows, None]).squeeze(-1), targets[rows], "test")
        return output

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")


class Totals(nn.Module):
    """Means over all tokens of a split, on all devices: nats per token, and bytes per token."""

    def __init__(self) -> None:
        super().__init__()
        self.nll, self.bytes = MeanMetric("disable"), MeanMetric("disable")
