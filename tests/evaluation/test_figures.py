"""What tables and figures say, read back from their cells and artists."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from thinned.evaluation import figures


@pytest.fixture
def rows() -> dict[str, Tensor]:
    """Four examples of two classes: prediction 0 throughout, right but for the third."""
    confidence = torch.tensor([0.9, 0.6, 0.7, 0.9])
    return {
        "index": torch.tensor([3, 0, 2, 1]),
        "target": torch.tensor([0, 0, 1, 0]),
        "prediction": torch.zeros(4, dtype=torch.int64),
        "confidence": confidence,
        "correct": torch.tensor([True, True, False, True]),
        "predictive_entropy": torch.tensor([0.33, 0.67, 0.61, 0.33]),
        "deterministic_confidence": torch.ones(4),
        "deterministic_correct": torch.tensor([True, False, False, True]),
    }


def images(indices: list[int]) -> Tensor:
    """One grey pixel whose level is the index."""
    return torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_table_of_scores() -> None:
    score = {"accuracy": 0.98765, "nll": 0.1, "brier": 0.2, "ece": 0.03, "auroc_error": math.nan, "aurc": None}
    mc = dict.fromkeys(score, 0.5) | {"num_samples": 20, "masks": "shared", "sites": ["embedding", "mlp"], "scale": 1.0}
    table = figures.scores_table({"deterministic": score, "mc_dropout": mc})
    labels, deterministic, dropout = (list(column.cells) for column in table.columns)
    assert labels == [figures.SCORES[key] for key in score]  # in this order, and of text alone bits per byte
    assert deterministic == ["0.9877", "0.1000", "0.2000", "0.0300", "–", "–"]
    assert dropout == ["0.5000"] * 6
    assert table.columns[2].header == "MC dropout, S = 20, shared masks at embedding+mlp"
    mc["scale"] = 0.25
    scaled = figures.scores_table({"deterministic": score, "mc_dropout": mc})
    assert scaled.columns[2].header == "MC dropout, S = 20, shared masks at embedding+mlp × 0.25"


def test_table_of_text_has_bits_per_byte_and_no_brier_score() -> None:
    text = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1, "auroc_error": 0.7, "aurc": 0.3, "bits_per_byte": 1.44}
    table = figures.scores_table({"deterministic": text})
    cells = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert cells["bits per byte ↓"] == "1.4400"
    assert len(cells) == 6
    assert "Brier ↓" not in cells


def test_table_without_dropout_has_one_column_of_scores() -> None:
    table = figures.scores_table({"deterministic": dict.fromkeys(figures.SCORES, 0.5)})
    assert [column.header for column in table.columns] == ["", "deterministic"]


def test_reliability_points_are_accuracy_at_mean_confidence(rows: dict[str, Tensor]) -> None:
    rows["mutual_information"] = torch.zeros(4)
    axes, counts = figures.reliability_diagram(rows).axes
    deterministic, dropout = axes.lines[1:]
    assert [line.get_label() for line in (deterministic, dropout)] == ["deterministic", "MC dropout"]
    assert deterministic.get_xydata().tolist() == [[1.0, 0.5]]
    assert dropout.get_xydata().ravel().tolist() == pytest.approx([0.6, 1, 0.7, 0, 0.9, 1])
    heights = [bar.get_height() for bar in counts.patches]
    assert [(i, h) for i, h in enumerate(heights) if h] == [(14, 4), (15 + 9, 1), (15 + 10, 1), (15 + 13, 2)]


def test_entropy_histogram_tells_right_from_wrong(rows: dict[str, Tensor]) -> None:
    (axes,) = figures.entropy_histogram(rows).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["right (3)", "wrong (1)"]
    width = 0.67 / 30  # the 30 bins reach to the highest entropy
    filled = [(int(p.get_x() / width + 0.5), p.get_height() * width) for p in axes.patches if p.get_height()]
    assert filled == [(14, pytest.approx(2 / 3)), (29, pytest.approx(1 / 3)), (27, pytest.approx(1))]


def test_uncertain_images_come_in_descending_entropy(rows: dict[str, Tensor]) -> None:
    figure = figures.uncertain_images(rows, images, ["cat", "dog"], count=3)
    assert titles(figure) == ["cat\n0.67 nats", "cat, is dog\n0.61 nats", "cat\n0.33 nats"]
    assert [int(axes.images[0].get_array()[0, 0]) for axes in figure.axes if axes.images] == [0, 2, 3]
    assert [axes.title.get_color() for axes in figure.axes[:3]] == ["black", "#c2410c", "black"]


def test_table_of_uncertain_images(rows: dict[str, Tensor]) -> None:
    columns, data = figures.most_uncertain(rows, images, None, count=2)
    assert columns == ["image", "index", "target", "prediction", "confidence", "predictive_entropy"]
    assert [row[0].tolist() for row in data] == [[[0]], [[2]]]
    assert [row[1:4] for row in data] == [[0, "0", "0"], [2, "1", "0"]]
    assert [value for row in data for value in row[4:]] == pytest.approx([0.6, 0.67, 0.7, 0.61])


def test_colour_images_keep_their_channels(rows: dict[str, Tensor]) -> None:
    def coloured(indices: list[int]) -> Tensor:
        return torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1).expand(len(indices), 3, 2, 4)

    _, data = figures.most_uncertain(rows, coloured, None, count=1)
    assert data[0][0].shape == (2, 4, 3)
    assert data[0][0][0, 0].tolist() == [0, 1, 2]


def test_pictures_are_those_that_the_rows_allow(rows: dict[str, Tensor]) -> None:
    assert list(figures.figures(rows, None, None)) == ["reliability", "entropy"]
    assert list(figures.figures(rows, images, None)) == ["reliability", "entropy", "uncertain"]
