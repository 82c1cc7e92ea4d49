"""Pictures of calibration and uncertainty.

`rows` are the columns of N predictions that `thinned.evaluation.rows` describes; they may come from a file, which is
read column by column. `labels` are the ways to predict: name in the columns -> what a person reads. The last of them
orders examples by its uncertainty.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from thinned.uncertainty.calibration import ECE_BINS
from thinned.uncertainty.per_class import confusion_matrix

COLOURS = ("#9aa0a6", "#c2410c", "#3b6fa0", "#3b7a57", "#7b4fa3", "#b08900")  # of ways, in their order
MARKERS = "os^Dvp"
FEW_CLASSES = 10
RIGHT, WRONG = "#3b7a57", "#c2410c"
Rows = Mapping[str, Tensor]
Labels = Mapping[str, str]
Images = Callable[[list[int]], Tensor]  # rows of the split -> (n, C, H, W) uint8


def figures(rows: Rows, labels: Labels, images: Images | None, names: list[str] | None) -> dict[str, Figure]:
    """Draws all pictures that the rows allow, by name."""
    result = {"reliability": reliability_diagram(rows, labels), "entropy": entropy_histograms(rows, labels)}
    if f"{next(iter(labels))}_brier" in rows:  # of examples, not of tokens
        result["confusion"] = confusion_matrices(rows, labels, names)
    if images is not None:
        result["uncertain"] = uncertain_images(rows, labels, images, names)
    return result


def reliability_diagram(rows: Rows, labels: Labels) -> Figure:
    """Draws accuracy against confidence in equal bins; on the diagonal, 90 % sure means 90 % right."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    width = 1 / ECE_BINS / (len(labels) + 0.5)
    for i, (way, label) in enumerate(labels.items()):
        colour = COLOURS[i % len(COLOURS)]
        confidence, right = rows[f"{way}_confidence"], rows[f"{way}_correct"].double()
        bins = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
        number = torch.bincount(bins, minlength=ECE_BINS)
        filled = number > 0
        mean = [torch.bincount(bins, value, ECE_BINS)[filled] / number[filled] for value in (confidence, right)]
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(*(points.numpy() for points in mean), marker=marker, markersize=4, color=colour, label=label)
        centre = (torch.arange(ECE_BINS) + 0.5) / ECE_BINS + (i - (len(labels) - 1) / 2) * width
        counts.bar(centre.numpy(), number.numpy(), width, color=colour)
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    axes.legend(frameon=False)
    counts.set(xlabel="confidence", ylabel="predictions", yscale="log")
    return figure


def entropy_histograms(rows: Rows, labels: Labels) -> Figure:
    """Draws the density of each way's predictive entropy, of right and of wrong predictions; apart is good."""
    figure = Figure(figsize=(1 + 3.6 * len(labels), 3.4), layout="constrained")
    panels = figure.subplots(1, len(labels), sharex=True, sharey=True, squeeze=False).ravel()
    columns = {way: (rows[f"{way}_predictive_entropy"], rows[f"{way}_correct"]) for way in labels}
    top = max(float(entropy.max()) for entropy, _ in columns.values())
    for axes, (way, (entropy, right)) in zip(panels, columns.items(), strict=True):
        for name, chosen, colour in (("right", right, RIGHT), ("wrong", ~right, WRONG)):
            if chosen.any():
                values = entropy[chosen]
                label = f"{name} ({len(values)})"
                axes.hist(values.numpy(), 30, range=(0.0, top), density=True, alpha=0.6, color=colour, label=label)
        axes.set(xlabel="predictive entropy, nats", title=labels[way])
        axes.legend(frameon=False)
    panels[0].set_ylabel("density")
    return figure


def confusion_matrices(rows: Rows, labels: Labels, names: list[str] | None) -> Figure:
    """Draws, for each way, the share of each class (rows, which add up to 1) that is predicted as each class.

    The number of examples stands in the cells if there are few classes.
    """
    K = rows[f"{next(iter(labels))}_probs"].shape[1]
    side = min(10.0, max(3.2, 0.36 * K))
    figure = Figure(figsize=(1 + side * len(labels), side + 0.4), layout="constrained")
    for axes, (way, label) in zip(figure.subplots(1, len(labels), squeeze=False).ravel(), labels.items(), strict=True):
        matrix = confusion_matrix(rows["target"], rows[f"{way}_prediction"], K)
        share = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
        axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="prediction", ylabel="class", title=f"{label}, n = {len(rows['target'])}")
        if K <= 2 * FEW_CLASSES:
            ticks = [_name(k, names) for k in range(K)]
            axes.set_xticks(range(K), ticks, rotation=90 if max(map(len, ticks)) > 2 else 0)
            axes.set_yticks(range(K), ticks)
            for row, column in matrix.nonzero().tolist():
                colour = "white" if share[row, column] > 0.5 else "black"
                number = int(matrix[row, column])
                axes.text(column, row, f"{number}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def uncertain_images(rows: Rows, labels: Labels, images: Images, names: list[str] | None, count: int = 24) -> Figure:
    """Draws the examples of highest predictive entropy with prediction, target and entropy; red if wrong."""
    way = list(labels)[-1]
    order = _most_uncertain_first(rows, way, count)
    index, target, prediction, entropy = (
        rows[name][order].tolist() for name in ("index", "target", f"{way}_prediction", f"{way}_predictive_entropy")
    )
    lines = -(-len(index) // 8)
    figure = Figure(figsize=(8, 1.35 * lines), layout="constrained")
    grid = figure.subplots(lines, 8, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for row, (axes, image) in enumerate(zip(grid, images(index), strict=False)):
        right = prediction[row] == target[row]
        axes.imshow(_picture(image), cmap="gray", vmin=0, vmax=255)
        said = _name(prediction[row], names) + ("" if right else f", is {_name(target[row], names)}")
        axes.set_title(f"{said}\n{entropy[row]:.2f} nats", fontsize=7, color="black" if right else WRONG)
    return figure


def most_uncertain(
    rows: Rows, labels: Labels, images: Images, names: list[str] | None, count: int = 64
) -> tuple[list[str], list[list[Any]]]:
    """Returns names and rows of a table of the most uncertain examples, with pictures as arrays in its first column."""
    order = _most_uncertain_first(rows, list(labels)[-1], count)
    index = rows["index"][order].tolist()
    columns: dict[str, list[Any]] = {
        "image": [_picture(image) for image in images(index)],
        "index": index,
        "target": [_name(target, names) for target in rows["target"][order].tolist()],
    }
    for way in labels:
        columns[f"{way}_prediction"] = [_name(label, names) for label in rows[f"{way}_prediction"][order].tolist()]
        for number in ("confidence", "predictive_entropy", "mutual_information", "std"):
            if (name := f"{way}_{number}") in rows:
                columns[name] = rows[name][order].tolist()
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _most_uncertain_first(rows: Rows, way: str, count: int) -> Tensor:
    """Returns the rows at which a way's predictive entropy is highest, (count,)."""
    return rows[f"{way}_predictive_entropy"].argsort(descending=True, stable=True)[:count]


def _picture(image: Tensor) -> npt.NDArray[np.uint8]:
    """Turns (C, H, W) into (H, W) for one channel, else into (H, W, C)."""
    array: npt.NDArray[np.uint8] = (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()
    return array


def _name(label: int, names: list[str] | None) -> str:
    return names[label] if names else str(label)
