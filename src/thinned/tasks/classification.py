"""Classification: cross-entropy for training; accuracy, NLL, Brier score and calibration error for every stage."""

from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from thinned.data.module import data_offers
from thinned.models.net import Logits, net_offers
from thinned.tasks.task import Task, of_all_ranks
from thinned.uncertainty.scores import ECE_BINS, below_one, brier, nll

UNMEASURED_BATCHES = 50  # The metrics take in this many at once: An update costs more than its arithmetic.


class ClassificationTask(Task):
    """Trains a classifier by cross-entropy.

    Batches are tuples whose first two elements are inputs and targets (B,). Logs `loss`, `accuracy`, `nll`, `brier`
    and `ece` under `train/`, `val/` and `test/`. Labels are smoothed in the training loss alone.

    Args:
        net: Maps inputs to logits (B, K).
        num_classes: K; taken from the net if None.
        optimizer, warmup_steps, final_lr_fraction, compile: As in `Task`.
        label_smoothing: Share of the target's probability that is spread over all classes, in [0, 1).
    """

    test_scores: ClassVar[frozenset[str]] = frozenset({"accuracy", "nll", "brier", "ece"})

    def __init__(
        self,
        net: nn.Module,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        final_lr_fraction: float = 0.0,
        label_smoothing: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(net, optimizer, warmup_steps, final_lr_fraction, compile)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected model.label_smoothing in [0, 1), but got {label_smoothing}")
        num_classes = num_classes or net_offers(net).num_classes
        if num_classes is None:
            raise ValueError(f"Expected model.num_classes for a {type(net).__name__}, but got null")
        self.hparams.update(num_classes=num_classes, label_smoothing=label_smoothing)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "nll": MeanMetric(),
                "brier": MeanMetric(),
                "ece": MulticlassCalibrationError(num_classes, ECE_BINS, validate_args=False),
            },
            compute_groups=False,
        )
        stages = ("train", "val", "test")
        self.metrics: dict[str, MetricCollection] = nn.ModuleDict(  # type: ignore[assignment]
            {f"{stage}_metrics": metrics.clone(prefix=f"{stage}/") for stage in stages}
        )
        self._unmeasured: dict[str, list[tuple[Tensor, Tensor]]] = {stage: [] for stage in stages}
        self._saved_train_metrics: list[dict[str, Any]] = []

    @property  # type: ignore[misc]
    def example_input_array(self) -> Any:
        """An image in the dtype of the weights, from which the model summary takes sizes and FLOPs."""
        shape = net_offers(self.net).input_shape
        return None if shape is None else torch.zeros(1, *shape, dtype=next(self.net.parameters()).dtype)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._saved_train_metrics = []  # Drops those of a checkpoint that was loaded for another stage.
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
        """Returns the logits of a batch, and keeps them for the metrics of the stage."""
        logits = self(batch[0]).float()
        if len(self._unmeasured[stage]) >= UNMEASURED_BATCHES:
            self._measure(stage)
        # A checkpoint thus holds at least one batch: A run that resumes at the end of an epoch updates its metrics.
        self._unmeasured[stage].append((logits.detach(), batch[1]))
        return logits

    def _measure(self, stage: str) -> MetricCollection:
        """Brings the metrics of a stage up to date and returns them."""
        metrics, batches = self.metrics[f"{stage}_metrics"], self._unmeasured[stage]
        if batches:
            logits, targets = map(torch.cat, zip(*batches, strict=True))
            probs = logits.softmax(-1)
            metrics["accuracy"].update(probs, targets)
            metrics["nll"].update(nll(probs, targets))
            metrics["brier"].update(brier(probs, targets))
            metrics["ece"].update(below_one(probs), targets)
            batches.clear()
        return metrics

    def _log_epoch(self, stage: str) -> None:
        metrics = self._measure(stage)
        if not any(metric.update_called for metric in metrics.values()):
            return  # A subclass has a step of its own.
        logged = metrics.compute()
        if stage != "train":
            # Lightning 2.6.6 rounds the number of examples down when it takes a mean over ranks.
            logged[f"{stage}/loss"] = logged[f"{stage}/nll"]
        self.log_dict(logged, prog_bar=stage == "val", sync_dist=True, batch_size=1)  # The ranks agree already.
        with torch.inference_mode(False):  # A later fit could not update a state that was reset in inference mode.
            metrics.reset()

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
        """Stores the training metrics of this epoch, rank by rank, so that a resumed run logs the same numbers."""
        metrics = self.metrics["train_metrics"].items(keep_base=True)
        own = {name: metric.metric_state for name, metric in metrics} | {"unmeasured": self._unmeasured["train"]}
        checkpoint["train_metrics"] = of_all_ranks(move_data_to_device(own, "cpu"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved_train_metrics = checkpoint.get("train_metrics", [])

    def on_train_start(self) -> None:
        saved, self._saved_train_metrics = self._saved_train_metrics, []
        if len(saved) == self.trainer.world_size:
            saved = [saved[self.trainer.global_rank]]
        elif self.trainer.global_rank > 0:  # The number of ranks has changed, so the first rank takes all.
            return
        for states in move_data_to_device(saved, self.device):
            self._unmeasured["train"] += states.pop("unmeasured")
            for name, state in states.items():
                self.metrics["train_metrics"][name].merge_state(state)
