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
    metrics = {way.name: way.settings | scores(rows, f"{way.name}_") for way in ways}
    clean = {way: {k: None if v != v else v for k, v in scored.items()} for way, scored in metrics.items()}
    with whole_file(directory / "metrics.json") as temporary:  # in which a NaN is null
        temporary.write_text(json.dumps(clean, indent=2) + "\n")
    _write_pictures(trainer, rows, directory, {way.name: way.label for way in ways}, split)
    return metrics


def _write_pictures(
    trainer: Trainer, rows: Mapping[str, Tensor], directory: Path, labels: Mapping[str, str], split: Split
) -> None:
    """Draws all that the rows and the data module allow, into files and W&B."""
    data = data_offers(trainer)
    raw_images, names = data.raw_images, data.class_names
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
