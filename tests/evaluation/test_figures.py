"""What tables and figures say, read back from their cells and artists."""

from itertools import pairwise

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from thinned.evaluation import figures

LABELS = {"deterministic": "deterministic", "mc_dropout": "MC dropout"}


@pytest.fixture
def rows() -> dict[str, Tensor]:
    """Four examples of two classes, which MC dropout takes for 0 throughout, and is right but for the third."""
    return {
        "index": torch.tensor([3, 0, 2, 1]),
        "target": torch.tensor([0, 0, 1, 0]),
        "deterministic_prediction": torch.tensor([0, 1, 0, 0]),
        "deterministic_confidence": torch.ones(4),
        "deterministic_correct": torch.tensor([True, False, False, True]),
        "deterministic_predictive_entropy": torch.tensor([0.6, 0.2, 0.3, 0.1]),
        "mc_dropout_prediction": torch.zeros(4, dtype=torch.int64),
        "mc_dropout_confidence": torch.tensor([0.9, 0.6, 0.7, 0.9]),
        "mc_dropout_correct": torch.tensor([True, True, False, True]),
        "mc_dropout_predictive_entropy": torch.tensor([0.33, 0.67, 0.61, 0.33]),
    }


def images(indices: list[int]) -> Tensor:
    """One grey pixel whose level is the index."""
    return torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_reliability_points_are_accuracy_at_mean_confidence(rows: dict[str, Tensor]) -> None:
    axes, counts = figures.reliability_diagram(rows, LABELS).axes
    deterministic, dropout = axes.lines[1:]
    assert [line.get_label() for line in (deterministic, dropout)] == ["deterministic", "MC dropout"]
    assert deterministic.get_xydata().tolist() == [[1.0, 0.5]]
    assert dropout.get_xydata().ravel().tolist() == pytest.approx([0.6, 1, 0.7, 0, 0.9, 1])
    heights = [bar.get_height() for bar in counts.patches]
    assert [(i, h) for i, h in enumerate(heights) if h] == [(14, 4), (15 + 9, 1), (15 + 10, 1), (15 + 13, 2)]


@pytest.mark.parametrize("number", [1, 2, 7])
def test_ways_stand_side_by_side_in_each_bin(number: int, rows: dict[str, Tensor]) -> None:
    """More of them than there are colours, too."""
    labels = {f"way{i}": f"way {i}" for i in range(number)}
    for way in labels:
        rows |= {f"{way}_confidence": rows["mc_dropout_confidence"], f"{way}_correct": rows["mc_dropout_correct"]}
    axes, counts = figures.reliability_diagram(rows, labels).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(labels.values())
    bars = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in counts.patches)
    assert len(bars) == 15 * number
    assert all(left >= right - 1e-6 for (_, right), (left, _) in pairwise(bars))
    for i, (left, right) in enumerate(bars):
        assert i // number / 15 <= left < right <= (i // number + 1) / 15


def test_neighbouring_ways_have_a_colour_and_a_marker_of_their_own(rows: dict[str, Tensor]) -> None:
    deterministic, dropout = figures.reliability_diagram(rows, LABELS).axes[0].lines[1:]
    assert deterministic.get_color() != dropout.get_color()
    assert deterministic.get_marker() != dropout.get_marker()


def filled_bars(axes: Axes, width: float) -> list[tuple[int, float]]:
    """Bin and probability of each bar that is not empty."""
    return [(int(p.get_x() / width + 0.5), p.get_height() * width) for p in axes.patches if p.get_height()]


def test_entropy_histograms_tell_right_from_wrong(rows: dict[str, Tensor]) -> None:
    """A panel for each way. The 30 bins of all reach to the highest entropy of any."""
    deterministic, dropout = figures.entropy_histograms(rows, LABELS).axes
    assert [axes.get_title() for axes in (deterministic, dropout)] == ["deterministic", "MC dropout"]
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (deterministic, dropout)]
    assert legends == [["right (2)", "wrong (2)"], ["right (3)", "wrong (1)"]]
    width = 0.67 / 30
    assert filled_bars(dropout, width) == [
        (14, pytest.approx(2 / 3)),
        (29, pytest.approx(1 / 3)),
        (27, pytest.approx(1)),
    ]
    half = pytest.approx(1 / 2, rel=1e-5)
    assert filled_bars(deterministic, width) == [(4, half), (26, half), (8, half), (13, half)]


def test_entropy_histogram_of_hits_alone(rows: dict[str, Tensor]) -> None:
    rows["mc_dropout_correct"] = torch.ones(4, dtype=torch.bool)
    (axes,) = figures.entropy_histograms(rows, {"mc_dropout": "MC dropout"}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["right (4)"]
    assert len(axes.patches) == 30


def test_uncertain_images_come_in_descending_entropy(rows: dict[str, Tensor]) -> None:
    figure = figures.uncertain_images(rows, LABELS, images, ["cat", "dog"], count=3)
    assert titles(figure) == ["cat\n0.67 nats", "cat, is dog\n0.61 nats", "cat\n0.33 nats"]
    assert [int(axes.images[0].get_array()[0, 0]) for axes in figure.axes if axes.images] == [0, 2, 3]
    assert [axes.title.get_color() for axes in figure.axes[:3]] == ["black", "#c2410c", "black"]


def test_last_way_orders_the_images(rows: dict[str, Tensor]) -> None:
    labels = dict(reversed(LABELS.items()))
    figure = figures.uncertain_images(rows, labels, images, ["cat", "dog"], count=3)
    assert titles(figure) == ["cat\n0.60 nats", "cat, is dog\n0.30 nats", "dog, is cat\n0.20 nats"]
    assert [row[1] for row in figures.most_uncertain(rows, labels, images, None)[1]] == [3, 2, 0, 1]


def test_table_of_uncertain_images(rows: dict[str, Tensor]) -> None:
    columns, data = figures.most_uncertain(rows, LABELS, images, None, count=2)
    of_each = ("prediction", "confidence", "predictive_entropy")
    assert columns == ["image", "index", "target", *(f"{way}_{name}" for way in LABELS for name in of_each)]
    assert [row[0].tolist() for row in data] == [[[0]], [[2]]]
    assert [row[1:4] for row in data] == [[0, "0", "1"], [2, "1", "0"]]
    assert [row[6] for row in data] == ["0", "0"]
    numbers = [value for row in data for value in (*row[4:6], *row[7:])]
    assert numbers == pytest.approx([1, 0.2, 0.6, 0.67, 1, 0.3, 0.7, 0.61])


def test_table_of_uncertain_images_has_the_spread_of_a_way_that_has_one(rows: dict[str, Tensor]) -> None:
    rows |= {"mc_dropout_std": torch.arange(4) / 8, "mc_dropout_mutual_information": torch.arange(4) / 16}
    columns, data = figures.most_uncertain(rows, LABELS, images, ["cat", "dog"], count=2)
    assert columns[-2:] == ["mc_dropout_mutual_information", "mc_dropout_std"]
    assert [name for name in columns if name.startswith("deterministic")][1:] == [
        "deterministic_confidence",
        "deterministic_predictive_entropy",
    ]
    assert [row[-2:] for row in data] == [[1 / 16, 1 / 8], [2 / 16, 2 / 8]]
    assert [row[2:4] for row in data] == [["cat", "dog"], ["dog", "cat"]]


def test_colour_images_keep_their_channels(rows: dict[str, Tensor]) -> None:
    def coloured(indices: list[int]) -> Tensor:
        return torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1).expand(len(indices), 3, 2, 4)

    _, data = figures.most_uncertain(rows, LABELS, coloured, None, count=1)
    assert data[0][0].shape == (2, 4, 3)
    assert data[0][0][0, 0].tolist() == [0, 1, 2]


def test_pictures_are_those_that_the_rows_allow(rows: dict[str, Tensor]) -> None:
    assert list(figures.figures(rows, LABELS, None, None)) == ["reliability", "entropy"]
    assert list(figures.figures(rows, LABELS, images, None)) == ["reliability", "entropy", "uncertain"]
