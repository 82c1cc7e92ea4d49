"""The picture of a training, drawn from its `metrics.csv`."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from thinned.evaluation.learning_curves import LearningCurves, learning_curves

ROWS = [
    {"step": "9", "train/loss": "2.0", "train/accuracy": "0.25", "fit/nll": "", "val/nll": ""},
    {"step": "9", "fit/nll": "1.0", "fit/accuracy": "0.5", "val/nll": "1.25", "val/accuracy": "0.75"},
    {"step": "19", "train/loss": "0.5", "val/mc_nll": "0.75"},
    {"step": "19", "fit/nll": "0.25", "fit/accuracy": "1.0", "val/nll": "0.5", "val/accuracy": "0.875"},
]


def test_curves_hold_what_was_logged() -> None:
    figure = learning_curves(ROWS)
    curves = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]
    assert curves == [
        {
            "training batches, with dropout": [[10, 2.0], [20, 0.5]],
            "training examples, without dropout": [[10, 1.0], [20, 0.25]],
            "validation, without dropout": [[10, 1.25], [20, 0.5]],
            "validation, MC dropout": [[20, 0.75]],
        },
        {
            "training batches, with dropout": [[10, 0.25]],
            "training examples, without dropout": [[10, 0.5], [20, 1.0]],
            "validation, without dropout": [[10, 0.75], [20, 0.875]],
        },
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == ["NLL, nats", "accuracy"]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4


def test_text_has_no_accuracy() -> None:
    rows = [{key: value for key, value in row.items() if "accuracy" not in key} for row in ROWS]
    assert [axes.get_ylabel() for axes in learning_curves(rows).axes] == ["NLL, nats"]


def test_nothing_is_drawn_without_a_log(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    LearningCurves().on_fit_end(make_trainer(), LightningModule())
    assert list(tmp_path.iterdir()) == []
