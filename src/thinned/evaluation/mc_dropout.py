"""Monte-Carlo dropout beside the deterministic prediction: a row per example or token, and the scores of all.

Shapes: B examples of a batch, N of the split, T tokens of a sequence, K classes, S samples.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from thinned.evaluation import figures
from thinned.evaluation.prediction_store import PredictionFiles
from thinned.evaluation.provenance import differences, provenance
from thinned.evaluation.report import score, write_metrics, write_pictures
from thinned.evaluation.row_chunks import Columns
from thinned.evaluation.rows import MCSettings, example_rows, token_rows
from thinned.models.dropout import check_sites, sites_in
from thinned.uncertainty import select_sites
from thinned.uncertainty.monte_carlo import Acting, Masks, resolve_masks

EXAMPLE_SCORES = {"accuracy", "nll", "ece", "brier"}  # which the task logs for the deterministic network
TOKEN_SCORES = {"nll", "bits_per_byte"}
SELECTION_TARGETS = 25_600  # of the validation split, for the choice of sites


class MCDropout(Callback):
    """Predicts with S networks sampled by dropout, beside the deterministic network, at test and at predict.

    Works with any LightningModule whose `forward` maps the first element of a batch to logits: (B, K), or (B, T, V) for
    targets (B, T), a token each. Where its `net` has `thin(seed, sample, sites, scale)`, a sample is a thinned network,
    the same for every input; otherwise masks are drawn per element. Nothing but dropout is switched on.

    Writes `predictions.parquet`, one row per example or token in dataset order, and for text `sequences.parquet`. Where
    there are targets, which a test needs: logs `mc/accuracy`, `nll`, `ece`, `auroc_error`, `aurc` (and `brier` of
    examples, `bits_per_byte` of text), under `test/` those of the deterministic network that its task does not log;
    writes `metrics.json` and pictures; with a `WandbLogger`, logs the pictures and the most uncertain examples.

    Rows go to the disk from time to time, to `predictions.parts/`. A `predict` that finds what an interrupted one has
    left there goes on with the first example that is missing, if the data module can begin with it (`predict_start`),
    and anew otherwise. The number of processes and the size of batches may have changed, the settings not.

    Args:
        num_samples: S, at least 2. None leaves Monte-Carlo dropout out: the deterministic network alone is reported.
        masks: shared (thinned networks), independent (per element), or auto: shared where the net can.
        sites: at which dropout acts: all; a list of sites; or auto, the combination, at its rates or scaled ones, with
            the lowest NLL on the validation split (on its first 25,600 targets, where it has more).
        seed: of the ensemble.
        dirpath: where the files go; the trainer's `default_root_dir` when None.

    Raises:
        ValueError: a setting outside its range; no dropout in the network that acts; an interrupted prediction with
            other settings.
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
        self.checkpoint: str | None = None  # file that the weights come from, where the trainer has loaded none
        self.split = "test"  # of the latest metrics
        self.metrics: dict[str, dict[str, Any]] = {}  # what `metrics.json` holds
        self.selection: dict[Acting, float] = {}  # with sites=auto: validation NLL of each choice
        self._files: PredictionFiles | None = None
        self._refusal: str | None = None  # why an interrupted prediction cannot go on

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        net = self._net(pl_module)
        if self.num_samples is not None and net is not pl_module:  # known before training, not an hour later
            droppable = sites_in(net)
            if not droppable or (not isinstance(self.sites, str) and set(self.sites) - set(droppable)):
                raise ValueError(
                    f"Expected mc_dropout.sites among those of the net with a rate above 0, {list(droppable)}, but got "
                    f"{self.sites!r}: raise a rate, or set mc_dropout.num_samples to null to leave MC dropout out"
                )
        if self.masks == "shared" and pl_module.device_mesh is not None:
            raise ValueError(
                "Expected mc_dropout.masks to be auto or independent for a net that is sharded, but got 'shared', "
                "which scripts/predict.py has on one device"
            )
        directory = Path(self.dirpath or trainer.default_root_dir)
        self._directory: Path = trainer.strategy.broadcast(directory)
        self._files, self._attempt, self._refusal = None, 0, None
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "predict" and hasattr(data, "predict_start"):
            data.predict_start = partial(self._go_on, trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._files is not None and trainer.predicting:
            self._files.keep()
        elif self._files is not None:
            self._files.discard()

    # Stages

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.selection = {}  # the weights may be others than last time
        self._prepare(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "predict_start"):
            data.predict_start = None
        if self._refusal:  # not while the loader is asked for: Lightning 2.6.6 would leave DataLoader patched
            raise ValueError(self._refusal)
        self._prepare(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise ValueError("Expected test batches (inputs, targets, ...), but got inputs alone")
        self._predict(trainer, pl_module, batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._predict(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = self._finish(trainer, pl_module)
        by_task = EXAMPLE_SCORES if "brier" in self.metrics["deterministic"] else TOKEN_SCORES
        theirs = {f"test/{name}" for name in by_task}
        pl_module.log_dict({k: v for k, v in logged.items() if k not in theirs}, sync_dist=True)  # equal on all ranks

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = self._finish(trainer, pl_module)
        for logger in trainer.loggers if logged else ():  # a prediction has no `log_dict`
            logger.log_metrics(logged, step=trainer.global_step)

    # Parts

    def _net(self, pl_module: LightningModule) -> nn.Module:
        """The net where it can be thinned, else the module itself: both map inputs to logits."""
        net, sharded = getattr(pl_module, "net", None), pl_module.device_mesh is not None
        return net if isinstance(net, nn.Module) and hasattr(net, "thin") and not sharded else pl_module

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = 0
        net = self._net(pl_module)
        if self.sites == "auto" and self.num_samples is not None and not self.selection:
            self.selection = select_sites(net, lambda acting: self._validation_nll(trainer, pl_module, acting))
            best = next(iter(self.selection))
            rank_zero_info(f"MC dropout at {best}: lowest validation NLL, {self.selection[best]:.4f} nats")
        self._mc = self._settings(net, self._acting)
        self.split = self._split(trainer)
        files = PredictionFiles(self._directory, trainer.global_rank, self._attempt)
        if trainer.is_global_zero:
            self._provenance = self._provenance_of(trainer, pl_module)
            selection = [[*acting, nll] for acting, nll in self.selection.items()]
            settings = {"provenance": self._provenance, "selection": selection, "attempt": self._attempt}
            files.begin(settings, anew=not self._attempt)
        trainer.strategy.barrier("predictions begin")
        self._files = files

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """The first example to predict: 0, or the first that an interrupted prediction lacks."""
        found: dict[str, Any] = {}
        limit = trainer.limit_predict_batches
        if trainer.is_global_zero and (isinstance(limit, int) or limit == 1):  # a part would be one of what is left
            found = self._interrupted(trainer, pl_module)
        found = trainer.strategy.broadcast(found)
        self._refusal = found.get("error")
        self._attempt = found.get("attempt", 0)
        self.selection = found.get("selection", self.selection)
        return found.get("start", 0)

    def _interrupted(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What all processes have to know of a prediction that was interrupted; empty where there is none."""
        files = PredictionFiles(self._directory)
        settings = files.interrupted()
        if settings is None:
            return {}
        selection = {}
        if self.sites == "auto":
            selection = {Acting(tuple(sites), scale): nll for sites, scale, nll in settings["selection"]}
        self.selection = selection
        changed = differences(self._provenance_of(trainer, pl_module), settings["provenance"])
        if changed:
            said = f"Expected the settings of the interrupted prediction, but got {', '.join(changed)}"
            return {"error": f"{said}: to predict anew, remove {files.parts}"}
        start = files.first_missing()
        rank_zero_info(f"The prediction in {files.parts} goes on with example {start}")
        return {"start": start, "attempt": settings["attempt"] + 1, "selection": selection}

    @property
    def _acting(self) -> Acting | None:
        """Where dropout acts; None for everywhere."""
        if self.selection:
            return next(iter(self.selection))
        return None if isinstance(self.sites, str) else Acting(self.sites)

    def _settings(self, net: nn.Module, acting: Acting | None) -> MCSettings | None:
        sites, scale = acting or (None, 1.0)
        if self.num_samples is None:
            return None
        return MCSettings(self.num_samples, resolve_masks(net, self.masks), self.seed, sites, scale)

    def _provenance_of(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        net = self._net(pl_module)
        acting = self._acting or Acting(sites_in(net))
        checkpoint = trainer.ckpt_path or self.checkpoint
        mc = self._settings(net, acting)
        return provenance(trainer, pl_module, checkpoint and str(checkpoint), self._split(trainer), mc)

    def _split(self, trainer: Trainer) -> str:
        hparams = getattr(getattr(trainer, "datamodule", None), "hparams", {})
        return "test" if trainer.testing else hparams.get("predict_split", "test")

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Merges the rows of all processes and reports them; returns what is to be logged, the same to all."""
        assert self._files is not None
        self._files.flush()
        trainer.strategy.barrier("predictions end")
        self.metrics = {}
        if trainer.is_global_zero:
            self._files.merge(self._provenance)
            rows = Columns(self._directory / "predictions.parquet")
            if "target" in rows:
                self.metrics = score(rows, self._mc, self._acting, self.selection)
                write_metrics(self._directory / "metrics.json", self.metrics)
                write_pictures(trainer, rows, self.split, self._directory)
            self._files.discard()
        self._files = None
        self.metrics = trainer.strategy.broadcast(self.metrics)
        prefixes = {"deterministic": self.split, "mc_dropout": "mc"}
        return {
            f"{prefix}/{key}": value
            for way, prefix in prefixes.items()
            for key, value in self.metrics.get(way, {}).items()
            if key in figures.SCORES
        }

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
            mc = self._settings(self._net(pl_module), acting)
            nll = self._sample(trainer, pl_module, batch, index, mc)[0]["nll"]
            sums += torch.stack([nll.sum(), torch.tensor(float(len(nll)), device=nll.device)])
            if trainer.strategy.reduce(sums.clone(), reduce_op="sum")[1] >= SELECTION_TARGETS:  # for all ranks
                break
        total, count = trainer.strategy.reduce(sums, reduce_op="sum")
        return (total / count).item()

    @torch.no_grad()
    def _predict(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Writes the rows of a batch to the files."""
        assert self._files is not None
        index = self._index(trainer, batch)
        rows, sequences = self._sample(trainer, pl_module, batch, index, self._mc)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if sequences and tokenizer is not None:
            rows["bytes"] = tokenizer.token_bytes.to(rows["target"].device)[rows["target"]]
        self._files.write({n: c for n, c in rows.items() if n != "deterministic_probs"}, sequences)

    def _sample(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: Tensor, mc: MCSettings | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The rows of a batch, and those of its sequences where it is text."""
        net = self._net(pl_module)
        with trainer.precision_plugin.forward_context():
            if not isinstance(batch, Tensor) and len(batch) > 1 and batch[1].dim() == 2:
                return token_rows(net, batch, index, mc)
            return example_rows(net, batch, index, mc), {}

    def _index(self, trainer: Trainer, batch: Any) -> Tensor:
        """Dataset rows of the batch: its third element, else counted on as Lightning's samplers stride over ranks."""
        if not isinstance(batch, Tensor) and len(batch) > 2:
            index: Tensor = batch[2]
            return index
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        position = torch.arange(self._seen, self._seen + len(inputs), device=inputs.device)
        self._seen += len(inputs)
        return position * trainer.world_size + trainer.global_rank
