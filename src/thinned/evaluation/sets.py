"""Evaluates on more sets than the test: shifted data, each at several severities, and foreign data.

A set is an entry of a yaml, settings of the data module that replace those of the test:

    rotation: {distortion: rotation, severities: [15, 30, 45]}
    letters: {path: letters}

Each is predicted through the Trainer in the ways that the test was, as they have been fitted, into `sets/<name>`. What
is there already, with the same provenance, is not predicted again, so a killed evaluation resumes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from thinned.data.module import DataOffers
from thinned.data.order import Split
from thinned.evaluation import figures, report
from thinned.evaluation.mc_dropout import MCDropout
from thinned.evaluation.prediction_store import Columns
from thinned.evaluation.provenance import differences, stored_provenance
from thinned.evaluation.rows import blocks_of
from thinned.evaluation.score_tables import score_rows
from thinned.evaluation.ways import Way
from thinned.offers import Offers
from thinned.uncertainty.detection import MEASURES, detection_intervals


class EvaluationSet(NamedTuple):
    """Holds a set to evaluate on."""

    name: str  # of its folder, and in files and tables
    entry: str  # name of the entry that it comes from
    severity: float | None  # one of those of the entry; None if it has none
    settings: dict[str, Any]  # of the data module, in place of those of the test

    @property
    def is_foreign(self) -> bool:
        """Whether it holds other data than the test, which uncertainty should recognise."""
        return not {"path", "name"}.isdisjoint(self.settings)


def sets_of(entries: Mapping[str, Mapping[str, Any]]) -> list[EvaluationSet]:
    """Returns a set for each entry, or for each severity of it; ValueError if an entry has no severity to use.

    >>> [of_severity.name for of_severity in sets_of({"roll": {"distortion": "roll", "severities": [2, 4]}})]
    ['roll_2', 'roll_4']
    """
    found = []
    for entry, given in entries.items():
        if not re.fullmatch(r"\w[\w.-]*", entry):
            raise ValueError(f"Expected names of sets that a folder can have, but got {entry!r}")
        settings = dict(given)
        if "severities" not in settings:
            found.append(EvaluationSet(entry, entry, None, settings))
            continue
        severities = settings.pop("severities")
        numbers = isinstance(severities, list) and all(type(severity) in (int, float) for severity in severities)
        if not severities or not numbers or not isinstance(settings.get("distortion"), str):
            got = f"{severities} of {settings.get('distortion')}"
            raise ValueError(f"Expected sets.{entry} with a distortion and a list of its severities, but got {got}")
        for severity in severities:
            changed = settings | {"distortion": f"{settings['distortion']}:{severity}"}
            found.append(EvaluationSet(f"{entry}_{severity:g}", entry, severity, changed))
    names = [each.name.lower() for each in found]  # as folders have them on some systems
    if twice := sorted({name for name in names if names.count(name) > 1} | {*get_args(Split)} & {*names}):
        raise ValueError(f"Expected sets with names of their own, which no split has, but got {', '.join(twice)}")
    return found


def evaluate_sets(
    trainer: Trainer,
    task: LightningModule,
    predictor: MCDropout,
    sets: Sequence[EvaluationSet],
    data_of: Callable[[EvaluationSet], LightningDataModule],
) -> list[str]:
    """Predicts sets after the test, and adds their scores to `evaluation.json`, its table and W&B.

    The trainer has just predicted the test with the predictor, one of its callbacks. `data_of` builds the data of a
    set, which are held no longer than they are predicted. Returns a line for each set that cannot be predicted and is
    left out. A ValueError says that the test has no targets.
    """
    if not predictor.evaluation:
        raise ValueError("Expected examples with targets to evaluate, but got none in data.path")
    left_out = {}
    for each in sets:
        rank_zero_info(f"Set {each.name}")
        try:
            _predict(trainer, task, predictor, data_of(each), each.name)
        except (ValueError, OSError) as error:
            if trainer.world_size > 1 and predictor.store.has_begun:  # the other processes would wait for this one
                raise
            left_out[each.name] = str(error).splitlines()[0]
    if trainer.is_global_zero and sets:
        _report(trainer, predictor, sets, left_out)
    return [f"{name}: {why}" for name, why in left_out.items()]


def _predict(
    trainer: Trainer, task: LightningModule, predictor: MCDropout, data: LightningDataModule, name: str
) -> None:
    """Predicts a set in the ways as they are fitted, unless its rows are there already."""
    data.prepare_data()
    data.setup("predict")
    expected = predictor.provenance_of_set(trainer, cast(DataOffers, Offers(data, DataOffers)))
    found = stored_provenance(predictor.directory / "sets" / name / "predictions.parquet")
    if trainer.strategy.broadcast(found is not None and not differences(expected, found)):
        return
    predictor.further_set = name
    try:
        trainer.predict(task, datamodule=data, return_predictions=False)
    finally:
        predictor.further_set = None


def _report(trainer: Trainer, predictor: MCDropout, sets: Sequence[EvaluationSet], left_out: Mapping[str, str]) -> None:
    """Adds the sets to the evaluation of the test, in files, figures and W&B."""
    folder, evaluation, ways = predictor.directory, predictor.evaluation, predictor.ways
    known = Columns(folder / "predictions.parquet")
    names = report.class_names_of(trainer, known, ways)
    evaluation["sets"], foreign = {}, {}
    for each in sets:
        of_set: dict[str, Any] = {"entry": each.entry, "severity": each.severity, "settings": each.settings}
        if each.name in left_out:
            of_set["left_out"] = left_out[each.name]
        else:
            rows = Columns(folder / "sets" / each.name / "predictions.parquet")
            of_set |= report.evaluation_of(rows, ways, predictor.split, names, evaluation["coverage"])
            if each.is_foreign:
                foreign[each.name] = rows
                _add_detection(of_set["ways"], ways, known, rows)
        evaluation["sets"][each.name] = of_set
    report.write_scores(folder, evaluation)
    report.write_figures(trainer, folder, figures.figures_of_sets(known, evaluation, foreign), predictor.split)
    for logger in report.wandb_loggers(trainer):
        logger.log_table(f"{predictor.split}/sets", *score_rows(evaluation), step=trainer.global_step)


def _add_detection(of_ways: dict[str, Any], ways: Sequence[Way], known: Columns, foreign: Columns) -> None:
    """Adds how well each way tells foreign examples from known ones."""
    (ours, groups), (theirs, other_groups) = (_examples(part, ways) for part in (known, foreign))
    both = None if groups is None or other_groups is None else (groups, other_groups)
    intervals, differences = detection_intervals(ours, theirs, ways[0].name, both)
    for name, of_way in of_ways.items():
        of_way["scores"] |= report.scored(intervals[name], differences.get(name, {}))


def _examples(rows: Columns, ways: Sequence[Way]) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
    """Returns what tells examples apart, by way, and the group of each; of text, means over each sequence."""
    wanted, blocks = (*MEASURES, "correct"), blocks_of(rows)
    columns = {
        way.name: {key: rows[f"{way.name}_{key}"] for key in wanted if f"{way.name}_{key}" in rows} for way in ways
    }
    if blocks is None:
        return columns, None
    _, sequence = torch.unique(rows["index"] - rows["position"], return_inverse=True)
    number = sequence.bincount()

    def means(column: Tensor) -> Tensor:
        return torch.zeros(len(number), dtype=torch.float64).index_add_(0, sequence, column.double()) / number

    of_sequences = {way: {key: means(of[key]) for key in MEASURES if key in of} for way, of in columns.items()}
    return of_sequences, torch.zeros_like(number).scatter_(0, sequence, blocks)
