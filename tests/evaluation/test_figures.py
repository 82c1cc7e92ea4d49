"""What figures show, read back from their artists."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor

from thinned.data.distortion import Range
from thinned.evaluation import figures, score_tables
from thinned.evaluation.report import evaluation_of
from thinned.evaluation.ways import Way
from thinned.uncertainty import MCStatistics

S, K = 5, 3


def score(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def evaluation_with(n: int, scores: Mapping[str, Any], **labels: str) -> dict[str, Any]:
    """An evaluation in which all ways have the same scores."""
    ways = {way: {"label": label, "settings": {"num_samples": S}, "scores": scores} for way, label in labels.items()}
    return {"split": "test", "n": n, "baseline": next(iter(labels)), "ways": ways}


def evaluated(n: int, num_classes: int, right: bool | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rows of n random predictions, all right, all wrong or any, and their evaluation."""
    generator = torch.Generator().manual_seed(n)
    samples = torch.randn(S, n, num_classes, generator=generator).softmax(-1)
    best, offset = samples.mean(0).argmax(-1), torch.arange(n) % 2 if right is None else torch.tensor(int(not right))
    target = (best + offset) % num_classes
    rows = {"index": torch.arange(n), "target": target}
    ways = []
    for name, label, count in (("deterministic", "deterministic", 1), ("mc_dropout", "MC dropout", S)):
        statistics = MCStatistics(target)
        statistics.update_all(samples[-count:])
        rows |= {f"{name}_{key}": column for key, column in statistics.columns().items()}
        settings = {"num_samples": count} if count > 1 else {}
        ways.append(SimpleNamespace(name=name, label=label, details="", settings=settings))
    return rows, evaluation_of(rows, cast(list[Way], ways), "test", [*map(str, range(num_classes))])


def images(indices: list[int]) -> Tensor:
    """One grey pixel whose level is the index."""
    return torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def wilson(hits: int, n: int) -> list[float]:
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return [interval.low, interval.high]


def bands(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """The lower and upper ends of each band, from left to right."""
    found = []
    for area in axes.collections:
        corners = area.get_paths()[0].vertices
        x = sorted({float(x) for x in corners[:, 0]})
        ends = [[float(y) for y in corners[corners[:, 0] == at, 1]] for at in x]
        found.append(([min(of) for of in ends], [max(of) for of in ends]))
    return found


# Reliability


@pytest.fixture
def two_bins() -> dict[str, Tensor]:
    """12 predictions of confidence 0.6, 9 right, and 13 of 0.9, 12 right, in mixed order."""
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    confidence = torch.tensor([0.6] * 12 + [0.9] * 13)
    correct = torch.tensor([True] * 9 + [False] * 3 + [True] * 12 + [False])
    return {"a_confidence": confidence[order], "a_correct": correct[order]}


def test_reliability_has_accuracy_and_its_interval_at_mean_confidence(two_bins: dict[str, Tensor]) -> None:
    figure = figures.reliability(two_bins, evaluation_with(25, {"ece": score(0.0713, 0.01, 0.25)}, a="A way"))
    assert figure.get_suptitle() == "Reliability: test, n = 25"
    assert legend(figure) == ["A way: ECE 0.0713 [0.0100, 0.2500]"]
    axes, counts = figure.axes
    line, _, (bars,) = axes.containers[0]
    assert line.get_xydata().ravel().tolist() == pytest.approx([0.6, 9 / 12, 0.9, 12 / 13])
    ends = [y for bar in bars.get_segments() for y in bar[:, 1]]
    assert ends == pytest.approx([*wilson(9, 12), *wilson(12, 13)], abs=1e-6)
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0.4  # below all intervals
    assert max(counts.patches[0].get_xy()[:, 1]) == 13


def test_no_line_joins_bins_of_one_example() -> None:
    rows = {"a_confidence": torch.tensor([0.3, 0.5, 0.9]), "a_correct": torch.tensor([True, False, True])}
    figure = figures.reliability(rows, evaluation_with(3, {"ece": score(0.1)}, a="A"))
    line, *_ = figure.axes[0].containers[0]
    assert line.get_xydata().ravel().tolist() == pytest.approx([1.7 / 3, 2 / 3])


@pytest.mark.parametrize("number", [2, 8])
def test_ways_differ_in_colour_and_marker(number: int, two_bins: dict[str, Tensor]) -> None:
    """More of them than there are colours, too."""
    labels = {f"way{i}": f"way {i}" for i in range(number)}
    rows = {key.replace("a_", f"{way}_"): column for way in labels for key, column in two_bins.items()}
    figure = figures.reliability(rows, evaluation_with(25, {"ece": score(0.1)}, **labels))
    lines = [container[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == number
    assert [text.partition(":")[0] for text in legend(figure)] == list(labels.values())


# Risk and coverage


def test_risk_is_the_share_of_errors_among_the_least_uncertain() -> None:
    """Ten predictions; 2, 9 and 10 in ascending entropy are wrong."""
    order = torch.tensor([3, 1, 7, 5, 9, 2, 8, 4, 10, 6])
    rows = {"a_predictive_entropy": order / 10, "a_correct": (order != 2) & (order < 9)}
    scores = {"aurc": score(0.125, 0.05, 0.3), "accuracy": score(0.7)}
    figure = figures.risk_coverage(rows, evaluation_with(10, scores, a="A"))
    assert legend(figure) == ["A: AURC 0.1250 [0.0500, 0.3000]", "A in random order", "A with an oracle"]
    (axes,) = figure.axes
    curve, random, oracle = axes.lines
    errors = [0, 1, 1, 1, 1, 1, 1, 1, 2, 3]
    assert curve.get_xdata().tolist() == pytest.approx([n / 10 for n in range(1, 11)])
    assert curve.get_ydata().tolist() == pytest.approx([e / n for n, e in enumerate(errors, start=1)])
    ((low, high),) = bands(axes)
    expected = [wilson(e, n) for n, e in enumerate(errors, start=1)]
    assert [low, high] == [pytest.approx(ends, abs=1e-6) for ends in zip(*expected, strict=True)]
    assert list(random.get_ydata()) == pytest.approx([0.3, 0.3])
    of_oracle = dict(zip(np.round(oracle.get_xdata(), 2).tolist(), oracle.get_ydata().tolist(), strict=True))
    assert [of_oracle[c] for c in (0.5, 0.7, 0.8, 1)] == pytest.approx([0, 0, 1 / 8, 3 / 10])


def test_predictions_of_equal_entropy_are_kept_together() -> None:
    rows = {"a_predictive_entropy": torch.tensor([0, 0, 1, 1.0]), "a_correct": torch.tensor([True, True, False, True])}
    figure = figures.risk_coverage(rows, evaluation_with(4, {"aurc": score(0.1), "accuracy": score(0.75)}, a="A"))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.5, 0], [1, 0.25]]


# Entropy and mutual information


def test_histograms_tell_right_wrong_and_foreign_apart() -> None:
    """The 15 bins of all reach to the largest value of any; a way without mutual information has no panel of it."""
    rows = {
        "a_predictive_entropy": torch.tensor([0.1, 0.2, 0.4]),
        "b_predictive_entropy": torch.tensor([0.1, 0.2, 0.6]),
        "b_mutual_information": torch.tensor([0.0, 0.01, 0.02]),
        "a_correct": torch.tensor([True, True, False]),
        "b_correct": torch.tensor([True, True, True]),
    }
    foreign = {"letters": {key: torch.tensor([0.5, 1.5, 0.5]) for key in rows if "correct" not in key}}
    drawn = figures.uncertainty_histograms(rows, evaluation_with(3, {}, a="A", b="B"), foreign)
    assert list(drawn) == ["entropy", "mutual_information"]
    assert titles(drawn["entropy"]) == ["A", "B"]
    assert titles(drawn["mutual_information"]) == ["B"]
    first, second = drawn["entropy"].axes
    said = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (first, second)]
    assert said == [
        ["right, n = 2", "wrong, n = 1", "letters, n = 3"],
        ["right, n = 3", "wrong, n = 0", "letters, n = 3"],
    ]
    filled = [{round(x * 10) - 1: y for x, y in patch.get_xy()[2:-1:2] if y > 0.01} for patch in first.patches]
    assert filled == [{1: 0.5, 2: 0.5}, {4: 1}, {5: pytest.approx(2 / 3), 14: pytest.approx(1 / 3)}]
    assert first.get_xlabel() == "predictive entropy, nats"


# NLL against S


def constructed(excess: Mapping[int, float], noise: float) -> dict[str, Tensor]:
    """Rows whose NLL is 1 nat, plus some excess and noise at the first s samples."""
    n, nll = 400, torch.linspace(0, 2, 400)
    signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    at = torch.stack([nll + of_s + noise * signs for of_s in excess.values()], 1)
    return {"a_nll": nll, "a_nll_at": at, "a_confidence": torch.full((n,), 0.5), "a_predictive_entropy": torch.ones(n)}


@pytest.mark.parametrize(
    ("excess", "noise", "enough"),
    [
        ({1: 0.5, 2: 0.05, 4: 0.009}, 0.01, 4),  # at most 1 %, although told apart
        ({1: 0.5, 2: 0.05, 4: 0.011}, 0.01, 5),  # told apart: the standard error is 0.0005
        ({1: 0.5, 2: 0.05, 4: 0.011}, 0.2, 4),  # not told apart: 0.011 against 0.01
        ({1: 0.5, 2: 0.0, 4: 0.05}, 0.01, 5),  # good by chance, and then worse
        ({1: -0.1, 2: -0.1, 4: -0.1}, 0.01, 1),  # more of them harm
    ],
)
def test_star_is_where_more_samples_stop_helping(excess: dict[int, float], noise: float, enough: int) -> None:
    rows = constructed(excess, noise)
    points, found = figures.nll_of_prefixes(rows, "a", S)
    assert found == enough
    assert [points[s][0] for s in (1, 2, 4, S)] == pytest.approx([*(1 + of_s for of_s in excess.values()), 1], abs=1e-5)
    assert all(low < value < high for value, low, high in points.values())


def test_nll_is_drawn_by_samples_beside_the_deterministic_one() -> None:
    rows, evaluation = evaluated(40, K)
    figure = figures.nll_by_samples(rows, evaluation)
    assert legend(figure)[:2] == ["deterministic", "MC dropout"]
    assert legend(figure)[2].startswith("as good as S = 5 from s = ")
    (axes,) = figure.axes
    deterministic, curve, star = axes.lines
    of_ways = {name: way["scores"]["nll"] for name, way in evaluation["ways"].items()}
    assert set(deterministic.get_ydata()) == {of_ways["deterministic"]["value"]}
    columns = [*rows["mc_dropout_nll_at"].double().mean(0).tolist(), of_ways["mc_dropout"]["value"]]
    assert curve.get_xdata().tolist() == [1, 2, 4, 5]
    assert curve.get_ydata().tolist() == pytest.approx(columns)
    assert star.get_xydata()[0].tolist() in curve.get_xydata().tolist()
    low, high = bands(axes)[-1]
    assert (low[-1], high[-1]) == pytest.approx((of_ways["mc_dropout"]["low"], of_ways["mc_dropout"]["high"]), rel=1e-3)


# Sets


def test_severities_come_from_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unshifted split first; a set that was left out is missing, and its entry too if there is no other."""
    monkeypatch.setitem(score_tables.KINDS, "tilt", Range(90, "degrees"))

    def scores(i: int) -> dict[str, Any]:
        return {"accuracy": score(0.9 - i / 10, 0.8 - i / 10, 1 - i / 10), "nll": score(1 + i, 0.5 + i, 2 + i)}

    def of_set(entry: str, severity: float | None, i: int | None) -> dict[str, Any]:
        ways = {} if i is None else {"ways": evaluation_with(9, scores(i), a="A")["ways"]}
        return {"entry": entry, "severity": severity, "settings": {"distortion": f"{entry}:{severity}"}, **ways}

    evaluation = evaluation_with(9, scores(0), a="A")
    evaluation["sets"] = {
        "tilt_15": of_set("tilt", 15, 1),
        "letters": of_set("letters", None, 2),
        "tilt_30": of_set("tilt", 30, 2),
        "tilt_60": of_set("tilt", 60, None) | {"left_out": "why"},
        "noise_0.5": of_set("noise", 0.5, None) | {"left_out": "why"},
    }
    drawn = figures.figures_of_sets({}, evaluation, {})
    assert list(drawn) == ["severity"]
    accuracy, nll = drawn["severity"].axes
    assert (accuracy.get_xlabel(), accuracy.get_ylabel(), nll.get_ylabel()) == (
        "tilt (degrees)", "accuracy", "NLL, nats",
    )  # fmt: skip
    assert [label.get_text() for label in nll.get_xticklabels()] == ["test", "15", "30"]
    assert nll.lines[0].get_xydata().tolist() == [[0, 1], [1, 2], [2, 3]]
    assert bands(nll) == [([0.5, 1.5, 2.5], [2, 3, 4])]
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert legend(drawn["severity"]) == ["A"]


# Confusion


@pytest.mark.parametrize(("num_classes", "numbers"), [(3, 3), (30, 0)])
def test_confusion_has_shares_of_classes_and_numbers_if_they_are_few(num_classes: int, numbers: int) -> None:
    target, prediction = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 1, 2])
    rows = {"target": target, "a_prediction": prediction}
    figure = figures.confusion(rows, evaluation_with(4, {}, a="A"), [f"class {k}" for k in range(num_classes)])
    (axes,) = figure.axes
    shares = axes.images[0].get_array()
    assert [shares[0, 0], shares[0, 1], shares[2, 2], shares.sum()] == pytest.approx([2 / 3, 1 / 3, 1, 2])
    assert [text.get_text() for text in axes.texts] == ["2", "1", "1"][:numbers]


# Most uncertain images


@pytest.fixture
def rows() -> dict[str, Tensor]:
    """Four examples of two classes, which the second way takes for 0 throughout, and is right but for the third."""
    return {
        "index": torch.tensor([3, 0, 2, 1]),
        "target": torch.tensor([0, 0, 1, 0]),
        "a_prediction": torch.tensor([0, 1, 0, 0]),
        "a_confidence": torch.ones(4),
        "a_predictive_entropy": torch.tensor([0.6, 0.2, 0.3, 0.1]),
        "b_prediction": torch.zeros(4, dtype=torch.int64),
        "b_confidence": torch.tensor([0.9, 0.6, 0.7, 0.9]),
        "b_predictive_entropy": torch.tensor([0.33, 0.67, 0.61, 0.33]),
    }


def test_uncertain_images_come_in_descending_entropy(rows: dict[str, Tensor]) -> None:
    """That of the last way."""
    figure = figures.uncertain_images(rows, evaluation_with(4, {}, a="A", b="B"), images, ["cat", "dog"], count=3)
    assert titles(figure) == ["cat\n0.67 nats", "cat, is dog\n0.61 nats", "cat\n0.33 nats"]
    assert [int(axes.images[0].get_array().squeeze()) for axes in figure.axes] == [0, 2, 3]
    assert [axes.title.get_color() for axes in figure.axes] == ["black", "#D55E00", "black"]
    figure = figures.uncertain_images(rows, evaluation_with(4, {}, b="B", a="A"), images, ["cat", "dog"], count=3)
    assert titles(figure) == ["cat\n0.60 nats", "cat, is dog\n0.30 nats", "dog, is cat\n0.20 nats"]


def test_table_of_uncertain_images(rows: dict[str, Tensor]) -> None:
    """With the spread of a way that has one."""
    rows |= {"b_std": torch.arange(4) / 8, "b_mutual_information": torch.arange(4) / 16}
    columns, data = figures.most_uncertain(rows, ["a", "b"], images, ["cat", "dog"], count=2)
    of_each = ("prediction", "confidence", "predictive_entropy")
    assert columns[:-2] == ["image", "index", "target", *(f"{way}_{name}" for way in "ab" for name in of_each)]
    assert columns[-2:] == ["b_mutual_information", "b_std"]
    assert [row[0].tolist() for row in data] == [[[[0]]], [[[2]]]]
    assert [row[1:4] for row in data] == [[0, "cat", "dog"], [2, "dog", "cat"]]
    assert [row[6] for row in data] == ["cat", "cat"]
    numbers = [value for row in data for value in (*row[4:6], *row[7:])]
    assert numbers == pytest.approx([1, 0.2, 0.6, 0.67, 1 / 16, 1 / 8, 1, 0.3, 0.7, 0.61, 2 / 16, 2 / 8])


def test_colour_images_keep_their_channels(rows: dict[str, Tensor]) -> None:
    def coloured(indices: list[int]) -> Tensor:
        return torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1).expand(len(indices), 3, 2, 4)

    _, data = figures.most_uncertain(rows, ["a"], coloured, ["cat", "dog"], count=1)
    assert data[0][0].shape == (2, 4, 3)
    assert data[0][0][0, 0].tolist() == [0, 1, 2]


# All


OF_EXAMPLES = ["reliability", "risk_coverage", "entropy", "mutual_information", "nll_by_samples", "confusion"]


def test_figures_are_those_that_the_rows_allow() -> None:
    rows, evaluation = evaluated(40, K)
    drawn = figures.figures(rows, evaluation, images, ["x", "y", "z"])
    assert list(drawn) == [*OF_EXAMPLES, "uncertain"]
    assert all(figure.get_suptitle().endswith(": test, n = 40") for figure in drawn.values())
    assert list(figures.figures(rows, evaluation, None, ["x", "y", "z"])) == OF_EXAMPLES
    assert list(figures.figures(rows, evaluation, None, None)) == OF_EXAMPLES[:-1]  # of tokens
    no_spread = {key: column for key, column in rows.items() if "mutual" not in key and "nll_at" not in key}
    assert list(figures.figures(no_spread, evaluation, None, None)) == ["reliability", "risk_coverage", "entropy"]
    assert {*OF_EXAMPLES, "uncertain", "severity", "learning_curves"} == set(figures.CAPTIONS)


@pytest.mark.parametrize(
    ("n", "num_classes", "right"),
    [(1, 2, True), (1, 2, False), (40, 3, True), (40, 50, False)],
)
def test_odd_rows_are_drawn(n: int, num_classes: int, right: bool | None) -> None:
    """One example, all right, all wrong, and many classes."""
    rows, evaluation = evaluated(n, num_classes, right)
    drawn = figures.figures(rows, evaluation, images, [*map(str, range(num_classes))])
    assert list(drawn) == [name for name in [*OF_EXAMPLES, "uncertain"] if n > 1 or name != "nll_by_samples"]
    for figure in drawn.values():
        figure.draw_without_rendering()


def test_files_of_equal_figures_are_equal_and_svg_keeps_text(rows: dict[str, Tensor], tmp_path: Path) -> None:
    evaluation = evaluation_with(4, {}, a="A", b="B")
    for folder in ("first", "second"):
        figure = figures.uncertain_images(rows, evaluation, images, ["cat", "<dog>"])
        assert figures.save(figure, tmp_path / folder, "uncertain") == tmp_path / folder / "uncertain.png"
    svg, png = tmp_path / "first/uncertain.svg", tmp_path / "first/uncertain.png"
    assert {path.name for path in svg.parent.iterdir()} == {svg.name, png.name}
    for path in (svg, png):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    text = [*ElementTree.parse(svg).getroot().itertext()]
    assert "Most uncertain: test, n = 4" in text
    assert "cat, is <dog>" in text
