"""Draws learning curves: what a network has learned, and what it has learned by heart."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from thinned.evaluation.figures import COLOURS
from thinned.evaluation.report import write_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = {  # by the beginning of a metric's key: what it is, colour and marker
    "train/": ("training batches, with dropout", "#999999", ""),
    "fit/": ("training examples, without dropout", COLOURS[0], "s"),
    "val/": ("validation, without dropout", COLOURS[1], "o"),
    "val/mc_": ("validation, MC dropout", COLOURS[2], "^"),
}


class LearningCurves(Callback):
    """Draws `figures/learning_curves` at the end of a training, from the `metrics.csv` of one of our loggers."""

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        metrics = Path(trainer.default_root_dir, "metrics.csv")
        if trainer.fast_dev_run or not metrics.exists():  # type: ignore[attr-defined]
            return
        with metrics.open(newline="", encoding="utf-8") as file:
            figure = learning_curves(list(csv.DictReader(file)))
        write_figures(trainer, metrics.parent, {"learning_curves": figure}, "fit")


def learning_curves(rows: Sequence[Mapping[str, str]]) -> "Figure":
    """Draws NLL, and accuracy if there is one, against the number of optimiser steps, from rows of `metrics.csv`."""
    from matplotlib.figure import Figure

    scores = [score for score in ("nll", "accuracy") if any(row.get(f"val/{score}") for row in rows)] or ["nll"]
    figure = Figure(figsize=(1.4 + 4.2 * len(scores), 4), layout="constrained")
    figure.suptitle("Learning curves")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, score in zip(panels, scores, strict=True):
        for prefix, (label, colour, marker) in SERIES.items():
            key = "train/loss" if prefix == "train/" and score == "nll" else prefix + score
            points = [(int(row["step"]) + 1, float(row[key])) for row in rows if row.get(key)]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, label=label)
        axes.set(xlabel="optimiser steps", ylabel={"nll": "NLL, nats"}.get(score, score))
    panels[0].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
