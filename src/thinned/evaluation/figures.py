"""What a person looks at: the table of scores, and pictures of calibration and uncertainty.

`rows` are the columns of N predictions that `thinned.evaluation.rows` describes. Those of numbers alone are asked
for, one or two at a time, so that they may come from a file.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from thinned.uncertainty.monte_carlo import Acting
from thinned.uncertainty.scores import ECE_BINS

SCORES = {
    "accuracy": "accuracy ↑",
    "nll": "NLL, nats ↓",
    "bits_per_byte": "bits per byte ↓",
    "brier": "Brier ↓",
    "ece": "ECE ↓",
    "auroc_error": "AUROC of errors ↑",
    "aurc": "AURC ↓",
}
TITLES = {"train": "Training split", "val": "Validation split", "test": "Test"}
COLOURS = {"deterministic": "#9aa0a6", "MC dropout": "#c2410c"}
Images = Callable[[list[int]], Tensor]  # rows of the split -> (n, C, H, W) uint8


def scores_table(metrics: Mapping[str, Mapping[str, Any]], split: str = "test") -> Table:
    """One column per way to predict, one line per score."""
    mc = metrics.get("mc_dropout")
    table = Table(title=TITLES.get(split, split), title_justify="left")
    table.add_column("")
    table.add_column("deterministic", justify="right")
    if mc:
        sites = f" at {Acting(tuple(mc['sites']), mc['scale'])}" if "sites" in mc else ""
        table.add_column(f"MC dropout, S = {mc['num_samples']}, {mc['masks']} masks{sites}", justify="right")
    for key, label in SCORES.items():
        if key not in metrics["deterministic"]:
            continue
        cells = [metrics["deterministic"][key], *([mc[key]] if mc else [])]
        table.add_row(label, *("–" if value is None or value != value else f"{value:.4f}" for value in cells))
    return table


def figures(rows: Mapping[str, Tensor], images: Images | None, names: list[str] | None) -> dict[str, Figure]:
    """All pictures that the rows allow, by name."""
    result = {"reliability": reliability_diagram(rows), "entropy": entropy_histogram(rows)}
    if images is not None:
        result["uncertain"] = uncertain_images(rows, images, names)
    return result


def reliability_diagram(rows: Mapping[str, Tensor]) -> Figure:
    """Accuracy against confidence in equal bins; on the diagonal, 90 % sure means 90 % right."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    ways = {"deterministic": "deterministic_"} | ({"MC dropout": ""} if "mutual_information" in rows else {})
    width = 1 / ECE_BINS / (len(ways) + 0.5)
    for i, (name, way) in enumerate(ways.items()):
        confidence, right = rows[f"{way}confidence"], rows[f"{way}correct"].double()
        bins = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
        number = torch.bincount(bins, minlength=ECE_BINS)
        filled = number > 0
        mean = [torch.bincount(bins, value, ECE_BINS)[filled] / number[filled] for value in (confidence, right)]
        axes.plot(*(points.numpy() for points in mean), marker="o", markersize=4, color=COLOURS[name], label=name)
        centre = (torch.arange(ECE_BINS) + 0.5) / ECE_BINS + (i - (len(ways) - 1) / 2) * width
        counts.bar(centre.numpy(), number.numpy(), width, color=COLOURS[name])
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    axes.legend(frameon=False)
    counts.set(xlabel="confidence", ylabel="examples", yscale="log")
    return figure


def entropy_histogram(rows: Mapping[str, Tensor]) -> Figure:
    """Density of the predictive entropy, split by right and wrong predictions; apart is good."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    wrong = ~rows["correct"]
    top = float(rows["predictive_entropy"].max())
    for name, chosen, colour in (("right", ~wrong, "#3b7a57"), ("wrong", wrong, "#c2410c")):
        if chosen.any():
            values = rows["predictive_entropy"][chosen]
            label = f"{name} ({len(values)})"
            axes.hist(values.numpy(), 30, range=(0.0, top), density=True, alpha=0.6, color=colour, label=label)
    axes.set(xlabel="predictive entropy, nats", ylabel="density", title="Entropy of right and wrong predictions")
    axes.legend(frameon=False)
    return figure


def uncertain_images(rows: Mapping[str, Tensor], images: Images, names: list[str] | None, count: int = 24) -> Figure:
    """The examples of highest predictive entropy with prediction, target and entropy; red where wrong."""
    rows = _most_uncertain(rows, ["index", "prediction", "target", "predictive_entropy"], count)
    lines = -(-len(rows["index"]) // 8)
    figure = Figure(figsize=(8, 1.35 * lines), layout="constrained")
    grid = figure.subplots(lines, 8, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for row, (axes, image) in enumerate(zip(grid, images(rows["index"].tolist()), strict=False)):
        prediction, target = int(rows["prediction"][row]), int(rows["target"][row])
        axes.imshow(_picture(image), cmap="gray", vmin=0, vmax=255)
        said = f"{_name(prediction, names)}" + (f", is {_name(target, names)}" if prediction != target else "")
        colour = "black" if prediction == target else "#c2410c"
        axes.set_title(f"{said}\n{rows['predictive_entropy'][row]:.2f} nats", fontsize=7, color=colour)
    return figure


def most_uncertain(
    rows: Mapping[str, Tensor], images: Images, names: list[str] | None, count: int = 64
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of most uncertain examples, pictures as arrays in its first column."""
    numbers = [n for n in ("confidence", "predictive_entropy", "mutual_information", "std") if n in rows]
    rows = _most_uncertain(rows, ["index", "target", "prediction", *numbers], count)
    data = [
        [
            _picture(image),
            int(rows["index"][row]),
            _name(int(rows["target"][row]), names),
            _name(int(rows["prediction"][row]), names),
            *(float(rows[name][row]) for name in numbers),
        ]
        for row, image in enumerate(images(rows["index"].tolist()))
    ]
    return ["image", "index", "target", "prediction", *numbers], data


def _most_uncertain(rows: Mapping[str, Tensor], columns: list[str], count: int) -> dict[str, Tensor]:
    """The rows of highest predictive entropy, (count,) each."""
    order = rows["predictive_entropy"].argsort(descending=True, stable=True)[:count]
    return {name: rows[name][order] for name in columns}


def _picture(image: Tensor) -> npt.NDArray[np.uint8]:
    """(C, H, W) as (H, W) for one channel, else (H, W, C)."""
    array: npt.NDArray[np.uint8] = (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()
    return array


def _name(label: int, names: list[str] | None) -> str:
    return names[label] if names else str(label)
