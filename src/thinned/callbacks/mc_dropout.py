"""Monte-Carlo dropout beside the deterministic prediction: scores at test, a row per example at predict.

Shapes: B examples of a batch, N of the split, K classes, S samples.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from thinned.callbacks.prediction_file import PredictionFile
from thinned.models.dropout import check_sites, derive_seed, sites_in
from thinned.uncertainty import MCPrediction, classification_scores, mc_predict, report, select_sites
from thinned.uncertainty.monte_carlo import Masks, resolve_masks
from thinned.uncertainty.scores import nll
from thinned.uncertainty.statistics import entropy


class MCDropout(Callback):
    """Predicts with S networks sampled by dropout, beside the deterministic network, at test and at predict.

    Works with any LightningModule whose `forward` maps the first element of a batch to logits (B, K). Where its
    `net` has `thin(seed, sample, sites)`, a sample is a thinned network, the same for every input; otherwise masks
    are drawn per element. Nothing but dropout is switched on.

    At test: logs `mc/accuracy`, `nll`, `brier`, `ece`, `auroc_error`, `aurc` and the last two under `test/`; writes
    `metrics.json` and pictures; with a `WandbLogger`, logs the pictures and the most uncertain examples.
    At predict: writes `predictions.parquet`, one row per example in dataset order.

    Args:
        num_samples: S, at least 2. None leaves Monte-Carlo dropout out: the deterministic network alone is reported.
        masks: shared (thinned networks), independent (per element), or auto: shared where the net can.
        sites: at which dropout acts: all; auto, the combination with the lowest NLL on the validation split; or a
            list of sites.
        seed: of the ensemble.
        dirpath: where the files go; the trainer's `default_root_dir` when None.

    Raises:
        ValueError: a setting outside its range; no dropout in the network that acts.
    """

    def __init__(
        self,
        num_samples: int | None = 50,
        masks: Masks = "auto",
        sites: Literal["all", "auto"] | list[str] = "all",
        seed: int = 0,
        dirpath: str | None = None,
    ) -> None:
        if num_samples is not None and num_samples < 2:
            raise ValueError(f"Expected mc_dropout.num_samples to be at least 2 or null, but got {num_samples}")
        if masks not in ("auto", "shared", "independent"):
            raise ValueError(f"Expected mc_dropout.masks to be auto, shared or independent, but got {masks!r}")
        if isinstance(sites, str) and sites not in ("all", "auto"):
            raise ValueError(f"Expected mc_dropout.sites to be all, auto or a list of sites, but got {sites!r}")
        self.num_samples = num_samples
        self.masks: Masks = masks
        self.sites = sites if isinstance(sites, str) else check_sites(sites)
        self.seed = seed
        self.dirpath = dirpath
        self.metrics: dict[str, dict[str, Any]] = {}  # what `metrics.json` holds
        self.selection: dict[tuple[str, ...], float] = {}  # with sites=auto: validation NLL by combination
        self._rows: list[dict[str, Tensor]] = []
        self._file: PredictionFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        net = self._net(pl_module)
        if self.num_samples is not None and net is not pl_module:  # known before training, not an hour later
            droppable = sites_in(net)
            if not droppable or (not isinstance(self.sites, str) and set(self.sites) - set(droppable)):
                raise ValueError(
                    f"Expected mc_dropout.sites among those of the net with a rate above 0, {list(droppable)}, but got "
                    f"{self.sites!r}: raise a rate, or set mc_dropout.num_samples to null to leave MC dropout out"
                )
        directory = Path(self.dirpath or trainer.default_root_dir)
        self._directory: Path = trainer.strategy.broadcast(directory)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._file is not None:
            self._file.discard()

    # Test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = []
        self.selection = {}  # the weights may be others than last time
        self._prepare(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._rows.append(self._predict(trainer, pl_module, batch))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = _gather(self._rows)
        self._rows = []
        if "target" not in rows:
            raise ValueError("Expected test batches (inputs, targets, ...), but got inputs alone")
        deterministic = classification_scores(rows["deterministic_probs"], rows["target"])
        self.metrics = {"deterministic": deterministic}
        logged = {f"test/{key}": deterministic[key] for key in ("auroc_error", "aurc")}
        if self.num_samples is not None:
            scores = classification_scores(rows["probs"], rows["target"])
            logged |= {f"mc/{key}": value for key, value in scores.items()}
            masks = resolve_masks(self._net(pl_module), self.masks)
            self.metrics["mc_dropout"] = {**scores, "num_samples": self.num_samples, "masks": masks}
            if self._active_sites is not None:
                self.metrics["mc_dropout"]["sites"] = list(self._active_sites)
            if self.selection:
                self.metrics["sites_nll"] = {"+".join(s): value for s, value in self.selection.items()}
        pl_module.log_dict(logged, sync_dist=True)  # equal on all ranks
        if trainer.is_global_zero:
            self._directory.mkdir(parents=True, exist_ok=True)
            _write_json(self._directory / "metrics.json", self.metrics)
            self._report(trainer, {name: column.cpu() for name, column in rows.items()})

    def _report(self, trainer: Trainer, rows: dict[str, Tensor]) -> None:
        raw_images = getattr(getattr(trainer, "datamodule", None), "raw_images", None)
        images = None if raw_images is None else lambda index: raw_images("test", index)
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        figures = report.figures(rows, images, names)
        for name, figure in figures.items():
            figure.savefig(self._directory / f"{name}.png", dpi=150)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for name, figure in figures.items():
                    logger.log_image(f"mc/{name}", [figure], step=trainer.global_step)
                if images is not None:
                    columns, data = report.most_uncertain(rows, images, names)
                    for row in data:
                        row[0] = wandb.Image(row[0])
                    logger.log_table("mc/most_uncertain", columns, data, step=trainer.global_step)

    # Predict

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module)
        self._file = PredictionFile(self._directory / "predictions.parquet", trainer.global_rank)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        rows = self._predict(trainer, pl_module, batch)
        rows.pop("deterministic_probs")
        assert self._file is not None
        self._file.write(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._file is not None
        self._file.close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            self._file.merge(trainer.world_size)

    # Both

    def _net(self, pl_module: LightningModule) -> nn.Module:
        """The net where it can be thinned, else the module itself: both map inputs to logits."""
        net = getattr(pl_module, "net", None)
        return net if isinstance(net, nn.Module) and hasattr(net, "thin") else pl_module

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = 0
        net = self._net(pl_module)
        resolve_masks(net, self.masks)
        if self.sites == "auto" and self.num_samples is not None and not self.selection:
            self.selection = select_sites(net, lambda sites: self._validation_nll(trainer, pl_module, sites))
            best = next(iter(self.selection))
            rank_zero_info(f"MC dropout at {'+'.join(best)}: lowest validation NLL, {self.selection[best]:.4f} nats")
        self._active_sites: Collection[str] | None = None if self.sites == "all" else self.sites
        if self.selection:
            self._active_sites = next(iter(self.selection))

    @torch.no_grad()
    def _validation_nll(self, trainer: Trainer, pl_module: LightningModule, sites: tuple[str, ...]) -> float:
        if getattr(trainer, "datamodule", None) is None:
            raise ValueError("Expected a data module for mc_dropout.sites=auto, which needs its validation split")
        sums = torch.zeros(2, dtype=torch.float32, device=pl_module.device)
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            with trainer.precision_plugin.forward_context():
                mean = self._mc_predict(pl_module, batch[0], sites, self.seed).mean
            sums += torch.stack([nll(mean, batch[1]).sum(), torch.tensor(len(mean), device=mean.device)])
        total, count = trainer.strategy.reduce(sums, reduce_op="sum")
        return (total / count).item()

    def _mc_predict(
        self, pl_module: LightningModule, inputs: Any, sites: Collection[str] | None, seed: int
    ) -> MCPrediction:
        assert self.num_samples is not None
        net = self._net(pl_module)
        return mc_predict(net, inputs, num_samples=self.num_samples, masks=self.masks, seed=seed, sites=sites)

    @torch.no_grad()
    def _predict(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, Tensor]:
        """The rows of a batch, by column: (B,) each, (B, K) for probabilities."""
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        with trainer.precision_plugin.forward_context():
            logits = pl_module(inputs)
        rows = {"index": self._index(trainer, batch, len(logits))}
        if not isinstance(batch, Tensor) and len(batch) > 1:
            rows["target"] = batch[1]
        deterministic = probs = torch.softmax(logits.float(), dim=-1)
        if self.num_samples is not None:
            shared = resolve_masks(self._net(pl_module), self.masks) == "shared"
            seed = self.seed if shared else derive_seed(self.seed, int(rows["index"][0]))
            with trainer.precision_plugin.forward_context():
                mc = self._mc_predict(pl_module, inputs, self._active_sites, seed)
            probs = mc.mean
        rows["prediction"] = probs.argmax(-1)
        rows["confidence"] = probs.amax(-1)
        rows["predictive_entropy"] = entropy(probs)
        if self.num_samples is not None:
            rows["expected_entropy"] = mc.expected_entropy
            rows["mutual_information"] = mc.mutual_information
            rows["variation_ratio"] = mc.variation_ratio
            rows["std"] = mc.variance.gather(-1, rows["prediction"][:, None]).squeeze(-1).sqrt()
        return rows | {"probs": probs, "deterministic_probs": deterministic}

    def _index(self, trainer: Trainer, batch: Any, count: int) -> Tensor:
        """Dataset rows of the batch: its third element, else counted on as Lightning's samplers stride over ranks."""
        if not isinstance(batch, Tensor) and len(batch) > 2:
            index: Tensor = batch[2]
            return index
        position = torch.arange(self._seen, self._seen + count)
        self._seen += count
        return position * trainer.world_size + trainer.global_rank


def _gather(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' rows in dataset order, each example once (test samplers repeat some to fill up the last batch)."""
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rows = {name: torch.cat(gather_all_tensors(column.contiguous())) for name, column in rows.items()}
    index, order = rows["index"].sort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    return {name: column[order[first]] for name, column in rows.items()}


def _write_json(path: Path, content: Any) -> None:
    """Writes to a temporary name and renames; a NaN becomes null."""
    clean = {row: {k: None if v != v else v for k, v in scores.items()} for row, scores in content.items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(clean, indent=2) + "\n")
    os.replace(temporary, path)
