"""Trains classifiers by cross-entropy, and scores them by accuracy, NLL, Brier score and calibration error."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.data.module import data_offers
from thinned.models.net import Logits, net_offers
from thinned.tasks.task import Task
from thinned.tasks.throughput import is_logged
from thinned.uncertainty.scores import brier, nll, scores

COLUMNS = ("target", "correct", "confidence", "nll", "brier")  # of each example, for its scores


class ClassificationTask(Task):
    """Trains a classifier by cross-entropy.

    Batches are tuples whose first two elements are inputs and targets (B,). Logs `train/loss` and `train/accuracy` of
    single batches, and `accuracy`, `balanced_accuracy`, `nll`, `brier` and `ece` of a whole split under `val/` and
    `test/`. Labels are smoothed in the training loss alone.

    Args:
        net: Maps inputs to logits (B, K).
        args, options: As in `Task`.
        label_smoothing: Share of the target's probability that is spread over all classes, in [0, 1).
    """

    test_scores: ClassVar[frozenset[str]] = frozenset({"accuracy", "balanced_accuracy", "nll", "brier", "ece"})

    def __init__(self, net: nn.Module, *args: Any, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(net, *args, **options)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected model.label_smoothing in [0, 1), but got {label_smoothing}")
        self.hparams.update(label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def setup(self, stage: str) -> None:
        super().setup(stage)
        net, data = net_offers(self.net), data_offers(self.trainer)
        for what, key, expected, got in (
            ("image shape", "input_shape", net.input_shape, data.image_shape),
            ("num classes", "num_classes", net.num_classes, data.num_classes),
        ):
            if None not in (expected, got) and expected != got:
                given = f"{got} from data.path={data.path!r}"
                raise ValueError(f"Expected data with {what} {expected} (model.net.{key}), but got {given}")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, targets = self(batch[0]).float(), batch[1]
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        # A mean over the epoch would lose its first part when a run resumes in the middle. `log` takes 0.4 ms.
        # Callbacks may monitor the last batch of an epoch.
        if is_logged(self.trainer, self.trainer.global_step + 1) or self.trainer.is_last_batch:
            self.log("train/loss", loss, batch_size=len(targets), prog_bar=True)
            self.log("train/accuracy", (logits.argmax(-1) == targets).float().mean(), batch_size=len(targets))
        return loss

    def keep(self, batch: Any) -> Tensor:
        """Returns the logits of a batch, and keeps the `COLUMNS` of its examples if their targets are known."""
        logits, targets = self(batch[0]).float().detach(), batch[1]
        if targets is None:
            return logits
        probs = logits.softmax(-1)
        confidence, prediction = probs.max(-1)
        columns = targets, prediction == targets, confidence, nll(probs, targets), brier(probs, targets)
        self.kept.append(torch.stack([column.float() for column in columns]))
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> Logits:  # type: ignore[override]  # Lightning passes it on
        return Logits(self.keep(batch))

    def scores(self, kept: Tensor) -> dict[str, Any]:
        values = scores(dict(zip(COLUMNS, kept, strict=True)))
        return {name: value for name, value in values.items() if name in self.test_scores}
