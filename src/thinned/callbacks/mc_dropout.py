"""Monte-Carlo dropout beside the deterministic prediction: a row per example or token, and the scores of all.

Shapes: B examples of a batch, N of the split, T tokens of a sequence, K classes, S samples.
"""

import json
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
from thinned.files import whole_file
from thinned.models.dropout import check_sites, sites_in
from thinned.uncertainty import report, select_sites
from thinned.uncertainty.monte_carlo import Acting, Masks, resolve_masks
from thinned.uncertainty.rows import MCSettings, example_rows, example_scores, token_rows, token_scores
from thinned.wandb_server import dispensable

EXAMPLE_SCORES = {"accuracy", "nll", "ece", "brier"}  # which the task logs for the deterministic network
TOKEN_SCORES = {"nll", "bits_per_byte"}
SELECTION_TARGETS = 25_600  # of the validation split, for the choice of sites


class MCDropout(Callback):
    """Predicts with S networks sampled by dropout, beside the deterministic network, at test and at predict.

    Works with any LightningModule whose `forward` maps the first element of a batch to logits: (B, K), or (B, T, V) for
    targets (B, T), a token each. Where its `net` has `thin(seed, sample, sites, scale)`, a sample is a thinned network,
    the same for every input; otherwise masks are drawn per element. Nothing but dropout is switched on.

    At test: logs `mc/accuracy`, `nll`, `ece`, `auroc_error`, `aurc` (and `brier` of examples, `bits_per_byte` of text),
    under `test/` those of the deterministic network that its task does not log; writes `metrics.json` and pictures;
    with a `WandbLogger`, logs the pictures and the most uncertain examples.
    At test and predict: writes `predictions.parquet`, one row per example or token in dataset order, and for text
    `sequences.parquet`.

    Args:
        num_samples: S, at least 2. None leaves Monte-Carlo dropout out: the deterministic network alone is reported.
        masks: shared (thinned networks), independent (per element), or auto: shared where the net can.
        sites: at which dropout acts: all; a list of sites; or auto, the combination, at its rates or scaled ones, with
            the lowest NLL on the validation split (on its first 25,600 targets, where it has more).
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
        self.selection: dict[Acting, float] = {}  # with sites=auto: validation NLL of each choice
        self._rows: list[dict[str, Tensor]] = []
        self._files: dict[str, PredictionFile] = {}

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
        for file in self._files.values():
            file.discard()

    # Stages

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.selection = {}  # the weights may be others than last time
        self._prepare(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._rows.append(self._predict(trainer, pl_module, batch))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._predict(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = _gather(self._rows)
        self._rows = []
        if "target" not in rows:
            raise ValueError("Expected test batches (inputs, targets, ...), but got inputs alone")
        ways = {"deterministic": "deterministic_"} | ({} if self.num_samples is None else {"mc_dropout": ""})
        scores = example_scores if "probs" in rows else token_scores
        self.metrics = {name: scores(rows, way) for name, way in ways.items()}
        by_task = EXAMPLE_SCORES if "probs" in rows else TOKEN_SCORES
        logged = {f"test/{k}": v for k, v in self.metrics["deterministic"].items() if k not in by_task}
        if self.num_samples is not None:
            logged |= {f"mc/{key}": value for key, value in self.metrics["mc_dropout"].items()}
            masks = resolve_masks(self._net(pl_module), self.masks)
            self.metrics["mc_dropout"] |= {"num_samples": self.num_samples, "masks": masks}
            if self._acting is not None:
                self.metrics["mc_dropout"] |= {"sites": list(self._acting.sites), "scale": self._acting.scale}
            if self.selection:
                self.metrics["sites_nll"] = {str(acting): value for acting, value in self.selection.items()}
        pl_module.log_dict(logged, sync_dist=True)  # equal on all ranks
        if trainer.is_global_zero:
            _write_json(self._directory / "metrics.json", self.metrics)
            self._report(trainer, {name: column.cpu() for name, column in rows.items()})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_files(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_files(trainer)

    # Parts

    def _net(self, pl_module: LightningModule) -> nn.Module:
        """The net where it can be thinned, else the module itself: both map inputs to logits."""
        net = getattr(pl_module, "net", None)
        return net if isinstance(net, nn.Module) and hasattr(net, "thin") else pl_module

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows, self._seen = [], 0
        net = self._net(pl_module)
        resolve_masks(net, self.masks)
        if self.sites == "auto" and self.num_samples is not None and not self.selection:
            self.selection = select_sites(net, lambda acting: self._validation_nll(trainer, pl_module, acting))
            best = next(iter(self.selection))
            rank_zero_info(f"MC dropout at {best}: lowest validation NLL, {self.selection[best]:.4f} nats")
        self._acting: Acting | None = None
        if self.selection:
            self._acting = next(iter(self.selection))
        elif not isinstance(self.sites, str):
            self._acting = Acting(self.sites)
        paths = {"examples": "predictions.parquet", "sequences": "sequences.parquet"}
        self._files = {n: PredictionFile(self._directory / path, trainer.global_rank) for n, path in paths.items()}

    def _finish_files(self, trainer: Trainer) -> None:
        for file in self._files.values():
            file.close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            for file in self._files.values():
                file.merge(trainer.world_size)

    @torch.no_grad()
    def _validation_nll(self, trainer: Trainer, pl_module: LightningModule, acting: Acting) -> float:
        if getattr(trainer, "datamodule", None) is None:
            raise ValueError("Expected a data module for mc_dropout.sites=auto, which needs its validation split")
        sums = torch.zeros(2, device=pl_module.device)
        seen = 0  # examples, which seed independent masks
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            index = torch.arange(seen, seen + len(batch[1]), device=batch[1].device)
            seen += len(index)
            nll = self._sample(trainer, pl_module, batch, index, acting)[0]["nll"]
            sums += torch.stack([nll.sum(), torch.tensor(float(len(nll)), device=nll.device)])
            if sums[1] * trainer.world_size >= SELECTION_TARGETS:
                break
        total, count = trainer.strategy.reduce(sums, reduce_op="sum")
        return (total / count).item()

    @torch.no_grad()
    def _predict(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, Tensor]:
        """The rows of a batch, which are written to the files."""
        index = self._index(trainer, batch)
        rows, sequences = self._sample(trainer, pl_module, batch, index, self._acting)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if sequences and tokenizer is not None:
            rows["bytes"] = tokenizer.token_bytes.to(rows["target"].device)[rows["target"]]
        self._files["examples"].write({n: c for n, c in rows.items() if not n.startswith("deterministic_probs")})
        if sequences:
            self._files["sequences"].write(sequences)
        return rows

    def _sample(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: Tensor, acting: Acting | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The rows of a batch, and those of its sequences where it is text."""
        net, mc = self._net(pl_module), None
        if self.num_samples is not None:
            sites, scale = acting or (None, 1.0)
            mc = MCSettings(self.num_samples, self.masks, self.seed, sites, scale)
        with trainer.precision_plugin.forward_context():
            if not isinstance(batch, Tensor) and len(batch) > 1 and batch[1].dim() == 2:
                return token_rows(net, batch, index, mc)
            return example_rows(net, batch, index, mc), {}

    def _report(self, trainer: Trainer, rows: dict[str, Tensor]) -> None:
        raw_images = getattr(getattr(trainer, "datamodule", None), "raw_images", None)
        images = None if raw_images is None else lambda index: raw_images("test", index)
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        figures = report.figures(rows, images, names)
        for name, figure in figures.items():
            with whole_file(self._directory / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=150)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for name, figure in figures.items():
                    logger.log_image(f"mc/{name}", [figure], step=trainer.global_step)
                if images is not None:
                    columns, data = report.most_uncertain(rows, images, names)
                    for row in data:
                        row[0] = wandb.Image(row[0])
                    with dispensable("the table mc/most_uncertain"):
                        logger.log_table("mc/most_uncertain", columns, data, step=trainer.global_step)

    def _index(self, trainer: Trainer, batch: Any) -> Tensor:
        """Dataset rows of the batch: its third element, else counted on as Lightning's samplers stride over ranks."""
        if not isinstance(batch, Tensor) and len(batch) > 2:
            index: Tensor = batch[2]
            return index
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        position = torch.arange(self._seen, self._seen + len(inputs), device=inputs.device)
        self._seen += len(inputs)
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
    """A NaN becomes null."""
    clean = {row: {k: None if v != v else v for k, v in scores.items()} for row, scores in content.items()}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(clean, indent=2) + "\n")
