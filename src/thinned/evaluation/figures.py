"""Draws figures of calibration and uncertainty, fit for a paper. Bands and bars are 95 % intervals.

Each is a function of `rows`, columns as in `thinned.evaluation.rows`, and of `evaluation`, the content of
`evaluation.json`. To add one, write the function, its line in `figures` and its caption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thinned.evaluation.rows import blocks_of
from thinned.evaluation.score_tables import Evaluation, shifted_sets
from thinned.files import whole_file
from thinned.uncertainty.calibration import ECE_BINS, equal_mass_bins
from thinned.uncertainty.estimates import share_interval
from thinned.uncertainty.intervals import score_intervals
from thinned.uncertainty.scores import SCORES
from thinned.uncertainty.weighting import last_of_ties

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By the name of a figure's files, in the order of a report: how to read it, and what is good.
CAPTIONS = {
    "learning_curves": "Scores in training: a net overfits if validation gets worse while training gets better.",
    "reliability": "Accuracy by confidence: a calibrated net is on the diagonal, an overconfident one below it.",
    "risk_coverage": "Errors left if the most uncertain predictions are left out: as close to the oracle as possible.",
    "entropy": "The total uncertainty: it should be low for right predictions, high for wrong and foreign ones.",
    "mutual_information": "What sampled networks disagree on: it should be highest for foreign examples.",
    "nll_by_samples": "NLL of the first s sampled networks together: from the star on, the rest of them does not help.",
    "severity": "Scores by severity of a shift: all get worse, and good ones slowly.",
    "confusion": "Share of each class (rows) that is predicted as each class: all on the diagonal is perfect.",
    "uncertain": "Examples of the highest entropy, red if wrong: they should be hard for a person too.",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito (2008)
LINES = ("-", "--", ":", "-.")
MARKERS = "os^DvpX"  # one more than colours, so that more ways than colours differ
FEW_CLASSES = 20  # whose names and numbers are readable
Rows = Mapping[str, Tensor]
Images = Callable[[list[int]], Tensor]  # rows of the split -> (n, C, H, W) uint8
Point = tuple[float, float, float]  # a value with its 95 % interval


def figures(rows: Rows, evaluation: Evaluation, images: Images | None, names: list[str] | None) -> dict[str, Figure]:
    """Returns every figure that the rows of a test allow, by name; `names` are those of classes, None for tokens."""
    drawn = {"reliability": reliability(rows, evaluation), "risk_coverage": risk_coverage(rows, evaluation)}
    drawn |= uncertainty_histograms(rows, evaluation, {})
    has_interval = evaluation["ways"][evaluation["baseline"]]["scores"]["nll"]["low"] is not None
    if has_interval and any(f"{way}_nll_at" in rows for way in evaluation["ways"]):
        drawn["nll_by_samples"] = nll_by_samples(rows, evaluation)
    if names is not None:
        drawn["confusion"] = confusion(rows, evaluation, names)
        if images is not None:
            drawn["uncertain"] = uncertain_images(rows, evaluation, images, names)
    return drawn


def figures_of_sets(rows: Rows, evaluation: Evaluation, foreign: Mapping[str, Rows]) -> dict[str, Figure]:
    """Draws what further sets add to a test, by name; `foreign` has the rows of foreign sets by their names."""
    drawn = uncertainty_histograms(rows, evaluation, foreign) if foreign else {}
    shifts = {title: sets for title, sets in shifted_sets(evaluation).items() if sets[-1][1]["severity"] is not None}
    return drawn | ({"severity": severity(evaluation, shifts)} if shifts else {})


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes `<name>.svg`, and `<name>.png`, whose path it returns; equal figures make equal files."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "thinned"}):
        for kind, metadata in (("svg", {"Date": None}), ("png", None)):
            with whole_file(folder / f"{name}.{kind}") as temporary:
                figure.savefig(temporary, dpi=150, metadata=metadata)
    return folder / f"{name}.png"


def reliability(rows: Rows, evaluation: Evaluation) -> Figure:
    """Draws accuracy against mean confidence in bins of equally many predictions, and how confidences are spread."""
    figure, (axes, counts) = _figure(evaluation, "Reliability", (5.2, 2.6), 2, 1, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], "k:", linewidth=0.8)
    blocks, lowest = blocks_of(rows), 1.0
    for i, (way, style) in enumerate(_styles(evaluation, "ece")):
        confidence, right = rows[f"{way}_confidence"], rows[f"{way}_correct"]
        bins = equal_mass_bins(confidence)
        means = [confidence[of_bin].double().mean().item() for of_bin in bins]
        accuracy, low, high = np.array([share_interval(right, of_bin, blocks) for of_bin in bins]).T
        axes.errorbar(means, accuracy, (accuracy - low, high - accuracy), **style)
        counts.hist(confidence.numpy(), ECE_BINS, range=(0, 1), histtype="step", log=True, **_colour(i))
        lowest = min(lowest, *means, *low)
    start = math.floor(10 * lowest) / 10
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(start, 1), ylim=(start, 1.05 - 0.05 * start))
    counts.set(xlabel="confidence", ylabel="predictions", xlim=(0, 1))
    _legend(figure, axes)
    return figure


def risk_coverage(rows: Rows, evaluation: Evaluation) -> Figure:
    """Draws the share of errors among the predictions of lowest entropy, ties together, against their share of all."""
    figure, (axes,) = _figure(evaluation, "Risk and coverage", (5.2, 4))
    blocks, n = blocks_of(rows), evaluation["n"]
    for way, style in _styles(evaluation, "aurc"):
        entropy, wrong = rows[f"{way}_predictive_entropy"], ~rows[f"{way}_correct"]
        order = entropy.argsort()
        ends = last_of_ties(entropy[order]) + 1
        kept = sorted({int(ends[torch.searchsorted(ends, -(-i * n // 50))]) for i in range(5, 51)})
        points = [share_interval(wrong, order[:end], blocks) for end in kept]
        _line(axes, [end / n for end in kept], points, style | {"markevery": 5})
    first = evaluation["ways"][evaluation["baseline"]]
    coverage, errors = np.linspace(0.01, 1, 100), 1 - first["scores"]["accuracy"]["value"]
    axes.plot([0, 1], [errors, errors], "k:", linewidth=0.8, label=f"{first['label']} in random order")
    oracle = ((coverage - 1 + errors) / coverage).clip(0)
    axes.plot(coverage, oracle, "k-.", linewidth=0.8, label=f"{first['label']} with an oracle")
    axes.set(xlabel="coverage: share of predictions that is kept", ylabel="risk: share of errors")
    axes.set(xlim=(0, 1), ylim=(0, None))
    _legend(figure, axes)
    return figure


def uncertainty_histograms(rows: Rows, evaluation: Evaluation, foreign: Mapping[str, Rows]) -> dict[str, Figure]:
    """Draws how entropy and mutual information of right, wrong and foreign predictions are spread, by name."""
    drawn = {}
    for name, measure in (("entropy", "predictive_entropy"), ("mutual_information", "mutual_information")):
        ways, label = [w for w in evaluation["ways"] if f"{w}_{measure}" in rows], measure.replace("_", " ")
        if not ways:
            continue
        drawn[name], panels = _figure(evaluation, label.capitalize(), (4.6, 2.4), len(ways), sharey=True)
        top = max(of_set[f"{way}_{measure}"].max().item() for of_set in (rows, *foreign.values()) for way in ways)
        for axes, way in zip(panels, ways, strict=True):
            values, right = rows[f"{way}_{measure}"], rows[f"{way}_correct"]
            kinds = {"right": values[right], "wrong": values[~right]}
            kinds |= {key: of_set[f"{way}_{measure}"] for key, of_set in foreign.items()}
            for i, (kind, of_kind) in enumerate(kinds.items()):
                n = len(of_kind)
                style = _colour(i) | {"weights": np.full(n, 1 / max(1, n)), "label": f"{kind}, n = {n}"}
                axes.hist(of_kind.numpy(), 15, range=(0, top or 1), histtype="step", log=True, **style)
            axes.set(title=evaluation["ways"][way]["label"], xlabel=f"{label}, nats", ylabel="share in bin")
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    return drawn


def nll_by_samples(rows: Rows, evaluation: Evaluation) -> Figure:
    """Draws the NLL of the mean of the first s = 1, 2, 4, ..., S sampled networks, beside that of the first way."""
    figure, (axes,) = _figure(evaluation, "NLL of the first s networks", (5.2, 4))
    for way, style in _styles(evaluation):
        of_way = evaluation["ways"][way]
        if f"{way}_nll_at" in rows:
            points, enough = nll_of_prefixes(rows, way, of_way["settings"].get("num_samples"))
            _line(axes, [*points], [*points.values()], style)
            said = f"as good as S = {max(points)} from s = {enough} on"
            axes.plot(enough, points[enough][0], "*", color=style["color"], markersize=14, label=said)
        elif way == evaluation["baseline"]:
            nll, *interval = _point(of_way["scores"]["nll"])
            axes.axhline(nll, color=style["color"], label=style["label"])
            axes.axhspan(*interval, color=style["color"], alpha=0.1, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="sampled networks s", ylabel="NLL, nats")
    _legend(figure, axes)
    return figure


def nll_of_prefixes(rows: Rows, way: str, num_samples: int | None) -> tuple[dict[int, Point], int]:
    """Returns the NLL of the mean of a way's first s samples by s, and the s that is enough.

    It is the smallest from which on the paired difference NLL(s) - NLL(S) is at most 1 % of NLL(S), or 0.001 nats, or
    has a 95 % interval that includes 0.
    """
    nll = {2**j: column for j, column in enumerate(rows[f"{way}_nll_at"].T)}
    nll |= {num_samples: rows[f"{way}_nll"]} if num_samples else {}
    S, others = max(nll), {column: rows[f"{way}_{column}"] for column in ("confidence", "predictive_entropy")}
    prefixes = {str(s): {"nll": of_s, **others} for s, of_s in nll.items()}
    intervals, differences = score_intervals(prefixes, str(S), blocks_of(rows), table={"nll": SCORES["nll"]})
    points = {s: (i.value, i.low, i.high) for s in nll for i in [intervals[str(s)]["nll"]]}
    loss = {s: differences[str(s)]["nll"] for s in nll if s < S}
    too_few = [s for s in loss if loss[s].low > 0 and loss[s].value > max(points[S][0] / 100, 0.001)]
    return points, min(s for s in nll if s > max(too_few, default=0))


def severity(evaluation: Evaluation, shifts: Mapping[str, Sequence[tuple[str, Evaluation]]]) -> Figure:
    """Draws accuracy and NLL of the unshifted split and of each shift by severity, as `shifted_sets` returns them."""
    figure, panels = _figure(evaluation, "Shifted data", (3.6, 2.2), 2 * len(shifts))
    shown = product(shifts.items(), (("accuracy", "accuracy"), ("nll", "NLL, nats")))
    for axes, ((title, sets), (key, label)) in zip(panels, shown, strict=True):
        for way, style in _styles(evaluation):
            points = [_point(of_set["ways"][way]["scores"][key]) for _, of_set in sets]
            _line(axes, range(len(points)), points, style)
        axes.set_xticks(range(len(sets)), [severity for severity, _ in sets])
        axes.set(xlabel=title, ylabel=label)
    _legend(figure, panels[0])
    return figure


def confusion(rows: Rows, evaluation: Evaluation, names: Sequence[str]) -> Figure:
    """Draws, for each way, the share of each class that is predicted as each class, with numbers if classes are few."""
    K, ways = len(names), evaluation["ways"]
    figure, panels = _figure(evaluation, "Confusion", (min(6.0, max(3.2, 0.36 * K)),) * 2, len(ways))
    for axes, way in zip(panels, ways, strict=True):
        matrix = torch.bincount(rows["target"] * K + rows[f"{way}_prediction"], minlength=K**2).view(K, K)
        shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="prediction", ylabel="class", title=ways[way]["label"])
        if K <= FEW_CLASSES:
            axes.set_xticks(range(K), names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(K), names)
            for row, column in matrix.nonzero().tolist():
                colour, number = "white" if shares[row, column] > 0.5 else "black", str(int(matrix[row, column]))
                axes.text(column, row, number, ha="center", va="center", fontsize=7, color=colour)
    return figure


def uncertain_images(rows: Rows, evaluation: Evaluation, images: Images, names: list[str], count: int = 24) -> Figure:
    """Draws the images of highest entropy in the last way, with prediction, target and entropy; red if wrong."""
    _, table = most_uncertain(rows, [*evaluation["ways"]][-1:], images, names, count)
    figure, panels = _figure(evaluation, "Most uncertain", (1, 1.35), len(table), 8)
    for axes, (image, _, target, prediction, _, entropy, *_) in zip(panels, table, strict=True):
        axes.axis("off")
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        said, colour = (prediction, "black") if prediction == target else (f"{prediction}, is {target}", COLOURS[1])
        axes.set_title(f"{said}\n{entropy:.2f} nats", fontsize=7, color=colour)
    return figure


def most_uncertain(
    rows: Rows, ways: Sequence[str], images: Images, names: list[str], count: int = 64
) -> tuple[list[str], list[list[Any]]]:
    """Returns names and rows of a table of the images of highest entropy in the last way, arrays (H, W, C)."""
    order = rows[f"{ways[-1]}_predictive_entropy"].argsort(descending=True, stable=True)[:count]
    index = rows["index"][order].tolist()
    columns: dict[str, list[Any]] = {"image": list(images(index).permute(0, 2, 3, 1).numpy()), "index": index}
    columns["target"] = [names[k] for k in rows["target"][order].tolist()]
    for way in ways:
        columns[f"{way}_prediction"] = [names[k] for k in rows[f"{way}_prediction"][order].tolist()]
        for number in ("confidence", "predictive_entropy", "mutual_information", "std"):
            if (name := f"{way}_{number}") in rows:
                columns[name] = rows[name][order].tolist()
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _figure(
    evaluation: Evaluation, title: str, size: tuple[float, float], panels: int = 1, columns: int = 2, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Returns a figure, with split and n in its title, and its panels line by line; `size` is of a panel, in inches."""
    lines, columns = -(-panels // columns), min(panels, columns)
    from matplotlib.figure import Figure  # only if something is drawn

    figure = Figure(figsize=(size[0] * columns, 0.3 + size[1] * lines), layout="constrained")
    figure.suptitle(f"{title}: {evaluation['split']}, n = {evaluation['n']}")
    grid = list(figure.subplots(lines, columns, squeeze=False, **options).flat)
    for axes in grid[panels:]:
        axes.remove()
    return figure, grid[:panels]


def _styles(evaluation: Evaluation, score: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each way with its colour, marker, line and label, to which a score with its interval may be added."""
    for i, (way, of_way) in enumerate(evaluation["ways"].items()):
        label = of_way["label"]
        if score:
            name, (value, low, high) = SCORES[score].label.rstrip(" ↑↓"), _point(of_way["scores"][score])
            label += f": {name} {value:.4f} [{low:.4f}, {high:.4f}]"
        marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1}
        yield way, {"label": label, **marker, **_colour(i)}


def _colour(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}


def _point(score: Mapping[str, Any]) -> Point:
    """Returns a score of an evaluation, whose numbers may be missing."""
    value, low, high = (math.nan if score[key] is None else score[key] for key in ("value", "low", "high"))
    return value, low, high


def _line(axes: Axes, x: Sequence[float], points: Sequence[Point], style: dict[str, Any]) -> None:
    y, low, high = np.array(points).T
    axes.plot(x, y, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.1, linewidth=0)


def _legend(figure: Figure, axes: Axes) -> None:
    """Says below all panels what the lines are; the figure grows by that."""
    handles, labels = axes.get_legend_handles_labels()
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.18 * (len(labels) + 1))
    style: dict[str, Any] = {"fontsize": 8, "title_fontsize": 8, "frameon": False}
    figure.legend(handles, labels, title="with 95 % intervals", loc="outside lower center", **style)
