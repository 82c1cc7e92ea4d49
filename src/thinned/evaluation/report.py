"""What is left of a prediction beside its rows: the scores of each way, in a file, and pictures, which W&B gets too."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from thinned.data.module import data_offers
from thinned.data.order import Split
from thinned.evaluation import figures
from thinned.evaluation.row_chunks import Columns
from thinned.evaluation.ways import Way
from thinned.files import whole_file
from thinned.uncertainty.per_class import recall_per_class
from thinned.uncertainty.scores import scores


def write_report(trainer: Trainer, directory: Path, ways: Sequence[Way], split: Split) -> dict[str, dict[str, Any]]:
    """Scores the rows that lie in a directory, and writes the scores and pictures beside them.

    Args:
        trainer: Its loggers get the pictures.
        directory: Folder of `predictions.parquet`.
        ways: Those that have columns in it.
        split: The split that was predicted.

    Returns:
        The scores of each way by its name, with the settings that it predicted with; empty without targets.
    """
    rows = Columns(directory / "predictions.parquet")
    if "target" not in rows:
        return {}
    names = _class_names(trainer, rows, ways)
    metrics = {way.name: way.settings | scores(rows, f"{way.name}_") | _recall(rows, way, names) for way in ways}
    clean = {way: {k: None if v != v else v for k, v in scored.items()} for way, scored in metrics.items()}
    with whole_file(directory / "metrics.json") as temporary:  # in which a NaN is null
        temporary.write_text(json.dumps(clean, indent=2) + "\n")
    _write_pictures(trainer, rows, directory, {way.name: way.label for way in ways}, split, names)
    if names is not None:
        columns, table = recall_table(metrics)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(f"{split}/recall", columns, table, step=trainer.global_step)
    return metrics


def _class_names(trainer: Trainer, rows: Columns, ways: Sequence[Way]) -> list[str] | None:
    """Returns the names of the classes, numbers if the data name none; None for tokens."""
    if f"{ways[0].name}_brier" not in rows:
        return None
    return data_offers(trainer).class_names or [str(k) for k in range(rows[f"{ways[0].name}_probs"].shape[1])]


def _recall(rows: Mapping[str, Tensor], way: Way, names: list[str] | None) -> dict[str, Any]:
    """Returns the recall of each class that has examples, with their number n."""
    if names is None:
        return {}
    recalls, counts = recall_per_class(rows["target"], rows[f"{way.name}_correct"], len(names))
    each = zip(names, recalls.tolist(), counts.tolist(), strict=True)
    return {"recall": {name: {"value": recall, "n": n} for name, recall, n in each if n}}


def recall_table(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns names and rows of a table of the recall of each class, with a column for each way."""
    counts = {name: recall["n"] for name, recall in next(iter(metrics.values()))["recall"].items()}
    rows = [[name, n, *(scored["recall"][name]["value"] for scored in metrics.values())] for name, n in counts.items()]
    return ["class", "n", *metrics], rows


def _write_pictures(
    trainer: Trainer,
    rows: Mapping[str, Tensor],
    directory: Path,
    labels: Mapping[str, str],
    split: Split,
    names: list[str] | None,
) -> None:
    """Draws all that the rows and the data module allow, into files and W&B."""
    raw_images = data_offers(trainer).raw_images
    images = None if raw_images is None else lambda index: raw_images(split, index)
    drawn = figures.figures(rows, labels, images, names)
    for name, figure in drawn.items():
        with whole_file(directory / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for name, figure in drawn.items():
                logger.log_image(f"{split}/{name}", [figure], step=trainer.global_step)
            if images is not None:
                columns, table = figures.most_uncertain(rows, labels, images, names)
                for row in table:
                    row[0] = wandb.Image(row[0])
                logger.log_table(f"{split}/most_uncertain", columns, table, step=trainer.global_step)
