"""Scores the rows of a prediction, and writes the scores of each way and pictures, which W&B gets too."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from thinned.data.module import data_offers
from thinned.data.order import Split
from thinned.evaluation import figures
from thinned.evaluation.prediction_store import Columns
from thinned.evaluation.rows import blocks_of
from thinned.evaluation.score_tables import plain_scores, recall_rows, score_rows
from thinned.evaluation.ways import Way
from thinned.files import whole_file
from thinned.uncertainty.conformal import KINDS
from thinned.uncertainty.estimates import wilson
from thinned.uncertainty.intervals import Difference, Interval, score_intervals
from thinned.uncertainty.scores import recall_per_class, scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def evaluation_of(
    rows: Mapping[str, Tensor],
    ways: Sequence[Way],
    split: Split,
    names: list[str] | None,
    coverage: float | None = None,
) -> dict[str, Any]:
    """Returns the content of `evaluation.json`, see `score_tables`; without targets, it has no scores.

    The ways are compared with the first of them; `names` of the classes are None for tokens.
    """
    n = len(rows["target" if "target" in rows else "index"])
    of_ways: dict[str, dict[str, Any]] = {
        way.name: {"label": way.label, "details": way.details, "settings": way.settings, "scores": {}} for way in ways
    }
    evaluation = {"split": split, "n": n, "baseline": ways[0].name, "coverage": coverage, "ways": of_ways}
    if "target" not in rows:
        return evaluation
    columns, blocks = {way.name: Columns(rows, way.name) for way in ways}, blocks_of(rows)
    if (n if blocks is None else int(blocks.max()) + 1) > 1:
        intervals, differences = score_intervals(columns, ways[0].name, blocks)
    else:
        why = "there is one independent prediction"
        values = {way: scores(of_way) for way, of_way in columns.items()}
        intervals = {w: {k: Interval(v, math.nan, math.nan, n, why) for k, v in of.items()} for w, of in values.items()}
        differences = {}
    for name, of_way in of_ways.items():
        covered = {kind: f"{name}_{kind}_covered" for kind in KINDS if f"{name}_{kind}_covered" in rows}
        of_way["scores"] = scored(intervals[name], differences.get(name, {}))
        of_way["recall"] = {} if names is None else _recall(rows, f"{name}_correct", names)
        of_way["coverage"] = {kind: _recall(rows, column, names or []) for kind, column in covered.items()}
    return evaluation


def scored(intervals: Mapping[str, Interval], differences: Mapping[str, Difference]) -> dict[str, Any]:
    """Returns the scores of a way with their differences, as JSON."""
    return {
        key: as_json(interval) | ({"difference": as_json(differences[key])} if key in differences else {})
        for key, interval in intervals.items()
    }


def as_json(result: Interval | Difference) -> dict[str, Any]:
    """Returns what a result holds, with null for NaN, and without what is empty."""

    def nulled(value: Any) -> Any:
        if isinstance(value, tuple):
            return [nulled(each) for each in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    values = asdict(result) | ({"told_apart": result.told_apart} if isinstance(result, Difference) else {})
    return {key: nulled(value) for key, value in values.items() if key not in ("why", "runs") or value}


def _recall(rows: Mapping[str, Tensor], column: str, names: list[str]) -> dict[str, Any]:
    """Returns the share of each class with examples for which a column is true: `value`, `low`, `high` and `n`."""
    recalls, counts = recall_per_class(rows["target"], rows[column], len(names))
    result = {}
    for name, recall, n in zip(names, recalls.tolist(), counts.tolist(), strict=True):
        if n:
            low, high = wilson(recall * n, n)
            result[name] = {"value": recall, "low": low, "high": high, "n": n}
    return result


def write_report(
    trainer: Trainer, directory: Path, ways: Sequence[Way], split: Split, coverage: float | None
) -> dict[str, Any]:
    """Writes scores and pictures beside the rows in a directory; returns `evaluation.json`, empty without targets."""
    rows = Columns(directory / "predictions.parquet")
    if "target" not in rows:
        return {}
    names = class_names_of(trainer, rows, ways)
    evaluation = evaluation_of(rows, ways, split, names, coverage)
    write_scores(directory, evaluation)
    raw_images = data_offers(trainer).raw_images
    images = None if raw_images is None else lambda index: raw_images(split, index)
    write_figures(trainer, directory, figures.figures(rows, evaluation, images, names), split)
    for logger in wandb_loggers(trainer):
        tables = {"scores": score_rows(evaluation)} | ({} if names is None else {"recall": recall_rows(evaluation)})
        if images is not None and names is not None:
            import wandb

            columns, lines = figures.most_uncertain(rows, list(evaluation["ways"]), images, names)
            tables["most_uncertain"] = columns, [[wandb.Image(image), *rest] for image, *rest in lines]
        for key, table in tables.items():
            logger.log_table(f"{split}/{key}", *table, step=trainer.global_step)
    return evaluation


def write_scores(directory: Path, evaluation: dict[str, Any]) -> None:
    """Writes `evaluation.json`, `metrics.json` and `evaluation.csv`."""
    for file, content in (("evaluation", evaluation), ("metrics", plain_scores(evaluation))):
        with whole_file(directory / f"{file}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    columns, table = score_rows(evaluation)
    with whole_file(directory / "evaluation.csv") as temporary, temporary.open("w", newline="") as opened:
        csv.writer(opened).writerows([columns, *table])


def class_names_of(trainer: Trainer, rows: Columns, ways: Sequence[Way]) -> list[str] | None:
    """Returns the names of the classes, numbers if the data name none; None for tokens."""
    if f"{ways[0].name}_brier" not in rows:
        return None
    return data_offers(trainer).class_names or [str(k) for k in range(rows[f"{ways[0].name}_probs"].shape[1])]


def write_figures(trainer: Trainer, directory: Path, drawn: "Mapping[str, Figure]", prefix: str) -> None:
    """Writes figures into a folder's `figures/`, and to W&B as `<prefix>/<name>`."""
    for name, figure in drawn.items():
        image = str(figures.save(figure, directory / "figures", name))
        for logger in wandb_loggers(trainer):
            logger.log_image(f"{prefix}/{name}", [image], step=trainer.global_step)


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Returns the loggers of a trainer that take pictures and tables."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
