"""Trains language models on the next token, and scores them over all tokens of a split."""

import math
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.data.module import data_offers
from thinned.models.gpt2_weights import load_gpt2
from thinned.models.net import Logits, logits_of, net_offers
from thinned.tasks.task import Task
from thinned.tasks.throughput import is_logged


class LanguageModelingTask(Task):
    """Trains a causal language model on the next token.

    Batches are tuples whose first two elements are tokens and targets, (B, T) each; a target of -100 does not count.
    Logs `train/loss` of single batches in nats per token, and of a whole split, under `val/` and `test/`, `nll`,
    `perplexity` (its exponential) and, if the data module's tokenizer has `token_bytes`, `bits_per_byte`.

    Args:
        net: Maps tokens (B, T) to logits (B, T, V), and tokens with targets to their losses (B, T).
        optimizer, final_lr_fraction, options: As in `Task`.
        init_from: Hub id, such as gpt2, or folder of GPT-2 weights to start from. Dropout rates are the net's own.
    """

    test_scores: ClassVar[frozenset[str]] = frozenset({"nll", "perplexity", "bits_per_byte"})

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        *,
        final_lr_fraction: float = 0.1,
        init_from: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(net, optimizer, final_lr_fraction=final_lr_fraction, **options)
        self.hparams.update(init_from=init_from)
        self.init_from, self.token_bytes = init_from, None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        net, data = net_offers(self.net), data_offers(self.trainer)
        for key, needed, has, wants in (
            ("vocab_size", "tokens", net.vocab_size, data.vocab_size),
            ("context_length", "positions", net.context_length, data.context_length),
        ):
            if (wants or 0) > (has or math.inf):
                raise ValueError(f"Expected at least {wants} {needed} (model.net.{key}) for this data, but got {has}")
        self.token_bytes = None if data.tokenizer is None else data.tokenizer.token_bytes
        if self.init_from is not None and stage == "fit":
            load_gpt2(self.net, self.init_from)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        self.init_from = None  # GPT-2's weights do not replace those of a checkpoint
        return super().load_state_dict(*args, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, targets = self.net(batch[0], batch[1]), batch[1]
        loss = losses.sum() / (targets >= 0).sum()
        if is_logged(self.trainer, self.trainer.global_step + 1) or self.trainer.is_last_batch:
            self.log("train/loss", loss, batch_size=len(targets), prog_bar=True)
        return loss

    def _keep_sums(self, losses: Tensor, targets: Tensor) -> None:
        """Keeps the nats, tokens and bytes of a batch, whose losses have the shape of their targets."""
        counted = targets >= 0
        sums = [losses[counted].float().sum(), counted.sum()]
        if self.token_bytes is not None:
            sums.append(self.token_bytes.to(targets.device)[targets[counted]].sum())
        self.kept.append(torch.stack(sums)[:, None])

    def scores(self, kept: Tensor) -> dict[str, Any]:
        nats, tokens, *num_bytes = kept.double().sum(-1)
        scores = {"nll": nats / tokens, "perplexity": (nats / tokens).exp()}
        if num_bytes:
            scores["bits_per_byte"] = nats / math.log(2) / num_bytes[0]
        return scores

    def keep(self, batch: Any) -> None:
        self._keep_sums(self.net(batch[0], batch[1]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> Logits | None:  # type: ignore[override]  # Lightning passes it on
        if net_offers(self.net).features is None or self.device_mesh is not None:
            self.keep(batch)  # A sharded net gathers its weights in `forward` alone.
            return None
        output, counted = logits_of(self.net, batch[0]), batch[1] >= 0
        targets = batch[1][counted]
        parts = output.select(counted).log_probs()  # (n, V) each
        losses = [F.nll_loss(log_probs, targets[rows], reduction="none") for rows, log_probs in parts]
        self._keep_sums(torch.cat(losses), targets)
        return output
