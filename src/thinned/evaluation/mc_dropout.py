"""Predicts in several ways at test and at predict: a callback that writes rows, scores, pictures and metrics."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from thinned.data.module import DataOffers, data_offers
from thinned.data.order import Split
from thinned.evaluation.batch import Batch, Validation, trained_net
from thinned.evaluation.prediction_sets import PredictionSets
from thinned.evaluation.prediction_store import PredictionStore
from thinned.evaluation.provenance import of_data, provenance
from thinned.evaluation.report import write_report
from thinned.evaluation.rows import predicted_rows
from thinned.evaluation.ways import Sites, Way, learning_order, standard_ways
from thinned.models.net import Logits
from thinned.offers import task_offers
from thinned.ranks import of_all_ranks
from thinned.uncertainty.calibration import ece
from thinned.uncertainty.monte_carlo import Masks

VALIDATED = ("nll", "confidence", "correct", "mutual_information")  # columns kept of a validation that is scored


class MCDropout(Callback):
    """Predicts with S networks sampled by dropout, beside the deterministic network, at test and at predict.

    Works with any LightningModule whose `forward` maps the first element of a batch to logits: (B, K), or (B, T, V) for
    targets (B, T), a token each. If its `net` has `thin`, a sample is a thinned network, the same for every input;
    otherwise masks are drawn per element, and the net is examined on the first batch of each stage. If `test_step`
    returns `thinned.models.net.Logits`, the deterministic network is not asked again. If all rates are 0, the scores
    of Monte-Carlo dropout are those of the deterministic network.

    Writes `predictions.parquet`, one row per example or token in dataset order, and for text `sequences.parquet`. With
    targets, which a test needs, it also writes and logs what `thinned.evaluation.report` makes of them: the scores
    of Monte-Carlo dropout under `mc/`, and under `test/` those of the deterministic network that its task does not log.
    An interrupted `predict` resumes if the data module can begin with any example (see `DataOffers.predict_start`).

    Args:
        num_samples: S, at least 2. None leaves Monte-Carlo dropout out: the deterministic network alone is reported.
        masks: Shared (thinned networks), independent (per element), or auto: shared if the net can be thinned.
        sites: Where dropout acts: all; a list of sites; or auto, the combination, at its rates or scaled ones, with the
            lowest NLL on half of the validation split (on the first 25,600 targets of it, if it has more).
        seed: Seed of the ensemble.
        coverage: Of conformal prediction sets for images, calibrated on half of the validation split; None for none.
        validate_every: Log `val/mc_nll`, `val/mc_ece` and `val/mc_mutual_information` at every so many validations of a
            training; None never.
        dirpath: Folder of the files; the trainer's `default_root_dir` if None.
        ways: More ways to predict.
    """

    def __init__(
        self,
        num_samples: int | None = 50,
        masks: Masks = "auto",
        sites: Sites = "all",
        seed: int = 0,
        coverage: float | None = None,
        validate_every: int | None = None,
        dirpath: str | None = None,
        ways: Sequence[Way] | None = None,
    ) -> None:
        self.ways = [*standard_ways(num_samples, masks, sites, seed), *(ways or ())]
        names = [way.name for way in learning_order(self.ways)]
        if not all(name.isidentifier() for name in names) or len(set(names)) < len(names):
            raise ValueError(f"Expected mc_dropout.ways to have names, identifiers all different, but got {names}")
        self._sets = None if coverage is None else PredictionSets(coverage, seed)
        if validate_every is not None and validate_every < 1:
            raise ValueError(f"Expected mc_dropout.validate_every to be at least 1 or null, but got {validate_every}")
        self.validate_every, self._validations = validate_every, 0  # that have ended
        self._validated: dict[str, list[Tensor]] = {}  # of one that is scored, by prefix of a way, (N, columns)
        prefixes = [way.metric_prefix("test") for way in self.ways]
        if len(set(prefixes)) < len(prefixes):
            raise ValueError(f"Expected mc_dropout.ways to be logged under names of their own, but got {prefixes}")
        self.dirpath = dirpath
        self.checkpoint: str | None = None  # file that the weights come from, if the trainer has loaded none
        self.split: Split = "test"  # of the latest metrics
        self.evaluation: dict[str, Any] = {}  # what `evaluation.json` holds
        self.directory = Path()  # of the latest files of a test
        self.further_set: str | None = None  # that is predicted after the test, see `thinned.evaluation.sets`
        self.store = PredictionStore(self.directory)  # of the prediction that is under way

    def setup(self, trainer: Trainer, task: LightningModule, stage: str) -> None:
        self._trained = trained_net(task)
        self._examined = False
        for way in learning_order(self.ways):  # what cannot be is known before training, not an hour later
            way.bind(self._trained)
        self.directory = trainer.strategy.broadcast(Path(self.dirpath or trainer.default_root_dir))
        folder = self.directory / "sets" / self.further_set if self.further_set else self.directory
        self.store = PredictionStore(folder, trainer.global_rank)
        limit = trainer.limit_predict_batches
        if stage == "predict" and data_offers(trainer).predict_start is not None:  # before the loader is built
            whole = isinstance(limit, int) or limit == 1  # a part would be one of what is left
            start = self.store.find_interrupted(trainer.strategy.broadcast) if whole else 0
            trainer.datamodule.predict_start = start  # type: ignore[attr-defined]
            if start:
                rank_zero_info(f"The prediction in {self.store.parts} resumes with example {start}")

    def on_exception(self, trainer: Trainer, task: LightningModule, exception: BaseException) -> None:
        (self.store.keep if trainer.predicting else self.store.discard)()

    def on_validation_batch_start(self, trainer: Trainer, task: LightningModule, batch: Any, *_: Any) -> None:
        if trainer.state.fn == "fit":  # as a rule the sanity check
            self._examine(trainer, batch)

    def on_validation_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        every = self.validate_every
        if every is None or not _is_training(trainer) or (self._validations + 1) % every or batch[1] is None:
            return
        inputs, targets, *rest = batch
        index = rest[0] if rest else torch.arange(len(targets), device=targets.device)
        ways = [way for way in self.ways if way.metric_prefix("val") != "val"]  # the task scores the other itself
        with trainer.precision_plugin.forward_context():
            rows = predicted_rows(Batch(inputs, index, targets), self._trained, ways)[0]
        for way in ways:
            columns = [rows[f"{way.name}_{key}"].float() for key in VALIDATED if f"{way.name}_{key}" in rows]
            self._validated.setdefault(way.metric_prefix("val"), []).append(torch.stack(columns, dim=-1).cpu())

    def on_validation_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        self._validations += _is_training(trainer)
        for prefix, parts in self._validated.items():
            nll, confidence, correct, *information = torch.cat(of_all_ranks(torch.cat(parts))).T.contiguous()
            scores = {"nll": nll.double().mean(), "ece": ece(confidence, correct.bool())}
            if information:  # one distribution has none
                scores["mutual_information"] = information[0].double().mean()
            task.log_dict({f"val/{prefix}_{key}": score.item() for key, score in scores.items()})
        self._validated = {}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.validate_every is None else {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict.get("validations", 0)

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, batch: Any, *_: Any) -> None:
        self._examine(trainer, batch)

    def _examine(self, trainer: Trainer, batch: Any) -> None:
        """Lets the ways see the first batch of a stage: before the first step, and before any row is written."""
        if self._examined or not isinstance(batch, Tensor | tuple | list):
            return
        self._examined = True
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            for way in learning_order(self.ways):
                way.examine(batch if isinstance(batch, Tensor) else batch[0])

    def on_test_start(self, trainer: Trainer, task: LightningModule) -> None:
        self._begin(trainer, task, "test")

    def on_predict_start(self, trainer: Trainer, task: LightningModule) -> None:
        if data_offers(trainer).predict_start is not None:
            trainer.datamodule.predict_start = 0  # type: ignore[attr-defined]  # of the next prediction
        self._begin(trainer, task, data_offers(trainer).predict_split)

    def _begin(self, trainer: Trainer, task: LightningModule, split: Split) -> None:
        self.split, self._seen = split, 0
        ways = learning_order(self.ways)
        for net in (net for way in ways for net in way.nets if net is not self._trained):
            net.to(task.device).eval()
        if self.further_set:  # the ways stay as they are fitted
            self._provenance = self.provenance_of_set(trainer, data_offers(trainer))
        else:
            self._learn(trainer, task, ways)
            checkpoint = trainer.ckpt_path or self.checkpoint
            self._provenance = provenance(trainer, task, checkpoint and str(checkpoint), split, ways)
            if self._sets is not None:
                self._provenance["prediction_sets"] = self._sets.settings
        if self._sets is not None and (n := self._provenance["data"].get("examples", 2)) < 2:
            raise ValueError(f"Expected at least two examples of split {split} to evaluate, but got {n}")
        self.store.begin(self._provenance, trainer.strategy.barrier)

    def _learn(self, trainer: Trainer, task: LightningModule, ways: Sequence[Way]) -> None:
        """Lets the ways learn from the validation split, or takes what an interrupted prediction has learned."""
        interrupted = self.store.interrupted
        if self.split == "val" and (self._sets is not None or any(way.builds_on for way in ways)):
            said = "better than they are on the split they are learned from"
            rank_zero_info(f"Temperatures and prediction sets look {said}.")
        for way in ways:
            if interrupted is None:
                way.fit(Validation.of(trainer, task, len(ways), "fit"))
            elif way.name in interrupted["ways"]:  # else the store refuses the other settings
                way.load_settings(interrupted["ways"][way.name])
        if self._sets is None:
            return
        if interrupted is None:
            self._sets.calibrate(Validation.of(trainer, task, len(ways), "calibrate"), self.ways)
        else:
            self._sets.thresholds = interrupted.get("prediction_sets", {}).get("thresholds", {})

    def provenance_of_set(self, trainer: Trainer, data: DataOffers) -> dict[str, Any]:
        """Returns what decides the rows of a further set: what has decided those of the test, on other data."""
        return self._provenance | {"data": of_data(data, data.predict_split, trainer.limit_predict_batches)}

    def on_test_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise ValueError("Expected test batches (inputs, targets, ...), but got inputs alone")
        self._predict(trainer, batch, outputs)

    def on_predict_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        self._predict(trainer, batch, None)

    def _predict(self, trainer: Trainer, batch: Any, outputs: Any) -> None:
        self._examine(trainer, batch)
        inputs, targets, index, *_ = (batch, None, None) if isinstance(batch, Tensor) else (*batch, None, None)
        if index is None:  # counted as Lightning's samplers stride over ranks
            position = torch.arange(self._seen, self._seen + len(inputs), device=inputs.device)
            index = position * trainer.world_size + trainer.global_rank
        self._seen += len(inputs)
        known = (self._trained, outputs) if isinstance(outputs, Logits) else None
        with trainer.precision_plugin.forward_context():
            rows, sequences = predicted_rows(Batch(inputs, index, targets, known), self._trained, self.ways, self._sets)
        data = data_offers(trainer)
        if sequences and data.tokenizer is not None:
            rows["bytes"] = data.tokenizer.token_bytes.to(rows["target"].device)[rows["target"]]
        named: dict[str, Any] = {"index": rows["index"]}
        if not sequences and data.sources is not None:
            named["source"] = data.sources(self.split, index.tolist())
        self.store.write(named | rows, sequences)

    def on_test_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        logged = self._finish(trainer)
        theirs = {f"test/{name}" for name in task_offers(task).test_scores}
        task.log_dict({k: v for k, v in logged.items() if k not in theirs}, sync_dist=True)  # equal on all ranks

    def on_predict_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        logged = self._finish(trainer)
        for logger in trainer.loggers if logged else ():  # a prediction has no `log_dict`
            logger.log_metrics(logged, step=trainer.global_step)

    def _finish(self, trainer: Trainer) -> dict[str, float]:
        """Merges and reports the rows of all processes, and returns to each of them what is to be logged."""
        self.store.flush()
        trainer.strategy.barrier("predictions end")
        evaluation: dict[str, Any] = {}
        if trainer.is_global_zero:
            self.store.merge(self._provenance)
            if not self.further_set:
                coverage = None if self._sets is None else self._sets.coverage
                evaluation = write_report(trainer, self.directory, self.ways, self.split, coverage)
            self.store.discard()
        self.store = PredictionStore(self.directory)  # of none, until the next stage
        if self.further_set:
            return {}
        self.evaluation = trainer.strategy.broadcast(evaluation)
        return {
            f"{way.metric_prefix(self.split)}/{key}": math.nan if score["value"] is None else score["value"]
            for way in (self.ways if self.evaluation else ())
            for key, score in self.evaluation["ways"][way.name]["scores"].items()
        }


def _is_training(trainer: Trainer) -> bool:
    """Returns whether a validation belongs to a training, and is no sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking
