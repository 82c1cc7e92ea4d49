"""What is left of a prediction beside its rows: the scores as a file, and pictures, which W&B gets too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from thinned.evaluation import figures
from thinned.evaluation.rows import MCSettings, example_scores, token_scores
from thinned.files import whole_file
from thinned.uncertainty.monte_carlo import Acting


def score(
    rows: Mapping[str, Tensor], mc: MCSettings | None, acting: Acting | None, selection: Mapping[Acting, float]
) -> dict[str, dict[str, Any]]:
    """The scores of the deterministic network, and of Monte-Carlo dropout with what it was done with.

    Args:
        rows: of all examples or tokens, with targets.
        mc: how networks were sampled; None where they were not.
        acting: where dropout acted; None for everywhere.
        selection: validation NLL of each choice that there was.
    """
    scores = example_scores if "probs" in rows else token_scores
    metrics: dict[str, dict[str, Any]] = {"deterministic": scores(rows, "deterministic_")}
    if mc is not None:
        metrics["mc_dropout"] = scores(rows) | {"num_samples": mc.num_samples, "masks": mc.masks}
        if acting is not None:
            metrics["mc_dropout"] |= {"sites": list(acting.sites), "scale": acting.scale}
        if selection:
            metrics["sites_nll"] = {str(choice): nll for choice, nll in selection.items()}
    return metrics


def write_metrics(path: Path, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes scores as JSON, in which a NaN becomes null."""
    clean = {row: {k: None if v != v else v for k, v in scores.items()} for row, scores in metrics.items()}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(clean, indent=2) + "\n")


def write_pictures(trainer: Trainer, rows: Mapping[str, Tensor], split: str, directory: Path) -> None:
    """Draws all that the rows and the data module allow, into files and W&B."""
    data = getattr(trainer, "datamodule", None)
    raw_images = getattr(data, "raw_images", None)
    images = None if raw_images is None else lambda index: raw_images(split, index)
    names = getattr(data, "class_names", None)
    drawn = figures.figures(rows, images, names)
    for name, figure in drawn.items():
        with whole_file(directory / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for name, figure in drawn.items():
                logger.log_image(f"mc/{name}", [figure], step=trainer.global_step)
            if images is not None:
                columns, table = figures.most_uncertain(rows, images, names)
                for row in table:
                    row[0] = wandb.Image(row[0])
                logger.log_table("mc/most_uncertain", columns, table, step=trainer.global_step)
