"""Classification: cross-entropy for training; accuracy, NLL, Brier score and calibration error for every stage."""

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.data.module import data_offers
from thinned.models.net import Logits, net_offers
from thinned.tasks.task import Task, of_all_ranks
from thinned.uncertainty.scores import brier, nll, scores

COLUMNS = ("correct", "confidence", "nll", "brier")  # The numbers of each example from which scores are computed.
UNMEASURED_BATCHES = 50  # This many are measured at once: Small operations cost more than their arithmetic.


class ClassificationTask(Task):
    """Trains a classifier by cross-entropy.

    Batches are tuples whose first two elements are inputs and targets (B,). Logs `loss`, `accuracy`, `nll`, `brier`
    and `ece` under `train/`, `val/` and `test/`. Labels are smoothed in the training loss alone.

    Args:
        net: Maps inputs to logits (B, K).
        optimizer, warmup_steps, final_lr_fraction, compile: As in `Task`.
        label_smoothing: Share of the target's probability that is spread over all classes, in [0, 1).
    """

    test_scores: ClassVar[frozenset[str]] = frozenset({"accuracy", "nll", "brier", "ece"})

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        final_lr_fraction: float = 0.0,
        label_smoothing: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(net, optimizer, warmup_steps, final_lr_fraction, compile)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected model.label_smoothing in [0, 1), but got {label_smoothing}")
        self.hparams.update(label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing
        self._unmeasured: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
        self._measured: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        self._saved_columns: list[list[Tensor]] = []

    @property  # type: ignore[misc]
    def example_input_array(self) -> Any:
        """An image in the dtype of the weights, from which the model summary takes sizes and FLOPs."""
        shape = net_offers(self.net).input_shape
        return None if shape is None else torch.zeros(1, *shape, dtype=next(self.net.parameters()).dtype)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._saved_columns = []  # Drops those of a checkpoint that was loaded for another stage.
        net, data = net_offers(self.net), data_offers(self.trainer)
        for what, key, expected, got in (
            ("image shape", "input_shape", net.input_shape, data.image_shape),
            ("num classes", "num_classes", net.num_classes, data.num_classes),
        ):
            if expected is not None and got is not None and expected != got:
                raise ValueError(
                    f"Expected data with {what} {expected} (model.net.{key}), but got {got} from "
                    f"data.path={data.path!r}"
                )

    def _logits(self, batch: Any, stage: str) -> Tensor:
        """Returns the logits of a batch, and keeps them for the scores of the stage."""
        logits = self(batch[0]).float()
        self._unmeasured[stage].append((logits.detach(), batch[1]))
        if len(self._unmeasured[stage]) >= UNMEASURED_BATCHES:
            self._measure(stage)
        return logits

    def _measure(self, stage: str) -> list[Tensor]:
        """Returns the `COLUMNS` (4, n) of all examples that this rank has seen in this epoch, in parts."""
        if batches := self._unmeasured[stage]:
            logits, targets = map(torch.cat, zip(*batches, strict=True))
            probs = logits.softmax(-1)
            confidence, prediction = probs.max(-1)
            columns = ((prediction == targets).float(), confidence, nll(probs, targets), brier(probs, targets))
            self._measured[stage].append(torch.stack(columns))
            batches.clear()
        return self._measured[stage]

    def _log_epoch(self, stage: str) -> None:
        own = torch.cat([torch.empty(len(COLUMNS), 0), *(part.cpu() for part in self._measure(stage))], -1)
        self._measured[stage].clear()
        columns = torch.cat(of_all_ranks(own), -1)  # A rank may have seen nothing, if their number has changed.
        if columns.shape[1] == 0:
            return  # A subclass has a step of its own.
        logged = {f"{stage}/{name}": score for name, score in scores(dict(zip(COLUMNS, columns, strict=True))).items()}
        if stage != "train":
            # Lightning 2.6.6 rounds the number of examples down when it takes a mean over ranks.
            logged[f"{stage}/loss"] = logged[f"{stage}/nll"]
        self.log_dict(logged, prog_bar=stage == "val", sync_dist=True, batch_size=1)  # The ranks agree already.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self._logits(batch, "train"), batch[1], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, batch_size=len(batch[1]), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._logits(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Logits:  # type: ignore[override]  # Lightning passes it on
        return Logits(self._logits(batch, "test").detach())

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores what each rank has measured in this epoch of training, so that a resumed run logs the same scores."""
        checkpoint["train_columns"] = of_all_ranks([columns.cpu() for columns in self._measure("train")])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved_columns = checkpoint.get("train_columns", [])

    def on_train_start(self) -> None:
        saved, self._saved_columns = self._saved_columns, []
        if len(saved) == self.trainer.world_size:
            saved = [saved[self.trainer.global_rank]]
        elif self.trainer.global_rank > 0:  # The number of ranks has changed, so the first rank takes all.
            return
        self._measured["train"] = [columns.to(self.device) for of_rank in saved for columns in of_rank]
