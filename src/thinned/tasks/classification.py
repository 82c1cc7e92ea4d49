"""Classification: cross-entropy for training; accuracy, NLL, Brier score and calibration error for every stage."""

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from thinned.data.module import data_offers
from thinned.models.net import Logits, net_offers
from thinned.tasks.task import Task
from thinned.uncertainty.scores import ECE_BINS, below_one, brier, nll

UNMEASURED_BATCHES = 50  # whose logits are kept before the metrics take them in


class NLL(MeanMetric):
    """Mean negative log-likelihood of the targets, in nats."""

    def update(self, probs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update(nll(probs, targets))


class Brier(MeanMetric):
    """Mean Brier score."""

    def update(self, probs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update(brier(probs, targets))


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error over 15 bins, a confidence of exactly 1 counted in the last of them."""

    def update(self, probs: Tensor, targets: Tensor) -> None:
        super().update(below_one(probs), targets)


class ClassificationTask(Task):
    """A classifier trained by cross-entropy.

    Batches are tuples whose first two elements are inputs and targets (B,). Logs `loss`, `accuracy`, `nll`, `brier`
    and `ece` under `train/`, `val/` and `test/`; the loss alone has label smoothing in it, in training.

    Args:
        net: maps inputs to logits (B, K).
        num_classes: K; taken from the net when None.
        optimizer, warmup_steps, final_lr_fraction, compile: see `Task`.
        label_smoothing: share of the target's probability spread over all classes, in [0, 1).
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
        self._unmeasured: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
        self._saved_train_metrics: list[dict[str, Any]] = []
        self.label_smoothing = label_smoothing
        self.metrics = nn.ModuleDict({f"{stage}_metrics": self._metrics(stage) for stage in ("train", "val", "test")})

    def _metrics(self, stage: str) -> MetricCollection:
        metrics: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro", validate_args=False),
            "nll": NLL(),
            "brier": Brier(),
            "ece": CalibrationError(self.num_classes, ECE_BINS, validate_args=False),
        }
        return MetricCollection(metrics, prefix=f"{stage}/", compute_groups=False)  # type: ignore[arg-type]

    @property  # type: ignore[misc]  # nobody sets it
    def example_input_array(self) -> Any:
        """An image in the precision of the weights, for sizes and FLOPs in the model summary."""
        shape = net_offers(self.net).input_shape
        return None if shape is None else torch.zeros(1, *shape, dtype=next(self.net.parameters()).dtype)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._saved_train_metrics = []  # of a checkpoint that was loaded for another stage
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
        """The logits of a batch, which the metrics of the stage take in too."""
        logits = self(batch[0]).float()
        if len(self._unmeasured[stage]) >= UNMEASURED_BATCHES:
            self._measure(stage)
        self._unmeasured[stage].append((logits.detach(), batch[1]))  # one is left when a run resumes at an epoch's end
        return logits

    def _measure(self, stage: str) -> MetricCollection:
        """Brings the metrics up to date: many batches at once, since an update costs more than its arithmetic."""
        metrics = self.metrics[f"{stage}_metrics"]
        assert isinstance(metrics, MetricCollection)
        if batches := self._unmeasured[stage]:
            logits, targets = map(torch.cat, zip(*batches, strict=True))
            metrics.update(logits.softmax(-1), targets)
            batches.clear()
        return metrics

    def _log_epoch(self, stage: str) -> None:
        metrics = self._measure(stage)
        if any(metric.update_called for metric in metrics.values()):  # not where a subclass has a step of its own
            logged = metrics.compute()
            if stage != "train":
                # Lightning 2.6.6 rounds the number of examples down when it takes a mean over ranks.
                logged[f"{stage}/loss"] = logged[f"{stage}/nll"]
            self.log_dict(logged, prog_bar=stage == "val", sync_dist=True, batch_size=1)  # equal on all ranks
            with torch.inference_mode(False):  # a state made in it could not be updated by a later fit
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
        """Keeps what each rank has of the epoch's training metrics, for a run that resumes."""
        metrics = self.metrics["train_metrics"]
        assert isinstance(metrics, MetricCollection)
        own: dict[str, Any] = {"logits": [], "targets": []}
        for logits, targets in self._unmeasured["train"]:
            own["logits"].append(logits.cpu())
            own["targets"].append(targets.cpu())
        for name, metric in metrics.items(keep_base=True):
            for key, value in metric.metric_state.items():
                cpu = [part.cpu() for part in value] if isinstance(value, list) else value.cpu()
                own[f"{name}.{key}"] = cpu
        checkpoint["train_metrics"] = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            checkpoint["train_metrics"] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(checkpoint["train_metrics"], own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved_train_metrics = checkpoint.get("train_metrics", [])

    def on_train_start(self) -> None:
        of_ranks, self._saved_train_metrics = self._saved_train_metrics, []
        if len(of_ranks) == self.trainer.world_size:
            of_ranks = [of_ranks[self.trainer.global_rank]]
        elif self.trainer.global_rank > 0:  # of another number of ranks: the first one takes them all
            return
        metrics = self.metrics["train_metrics"]
        assert isinstance(metrics, MetricCollection)
        for own in of_ranks:
            batches = zip(own["logits"], own["targets"], strict=True)
            self._unmeasured["train"] += [(x.to(self.device), y.to(self.device)) for x, y in batches]
            for name, metric in metrics.items(keep_base=True):
                for key, value in metric.metric_state.items():
                    saved = own[f"{name}.{key}"]
                    if isinstance(value, list):
                        value += [part.to(metric.device) for part in saved]
                    else:
                        setattr(metric, key, value + saved.to(metric.device))
