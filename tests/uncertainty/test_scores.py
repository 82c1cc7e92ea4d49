"""Scores by hand, and against scikit-learn where it has them."""

import math

import pytest
import torch
from sklearn import metrics
from torch import Tensor

from thinned.uncertainty import classification_scores
from thinned.uncertainty.scores import SCORES, Score, aurc, auroc_error, brier, ece, nll, scores


def binary(confidence: list[float]) -> Tensor:
    """Predictions of class 0 with these confidences."""
    p = torch.tensor(confidence)
    return torch.stack([p, 1 - p], -1)


def test_nll_and_brier_by_hand() -> None:
    probs, targets = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]), torch.tensor([0, 2])
    assert nll(probs, targets).tolist() == pytest.approx([-math.log(0.7), -math.log(0.1)])
    assert brier(probs, targets).tolist() == pytest.approx([0.09 + 0.04 + 0.01, 0.49 + 0.04 + 0.81])


def test_nll_of_an_impossible_target_is_finite() -> None:
    assert nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(-math.log(2.0**-126))


def test_ece_by_hand() -> None:
    """Right at 0.68 and wrong at 0.72, both in bin 11 of 15 (in 10 bins they would part); right at 0.9; right at 1."""
    error = ece(torch.tensor([0.68, 0.72, 0.9, 1.0]), torch.tensor([True, False, True, True]))
    assert error.item() == pytest.approx((2 * abs(0.5 - 0.7) + 0.1 + 0) / 4, abs=1e-6)


def test_confidence_of_exactly_one_shares_the_last_bin() -> None:
    """Right at 0.95 and wrong at 1: |1/2 - 0.975|; in bins of their own they would give (0.05 + 1) / 2."""
    assert ece(torch.tensor([0.95, 1.0]), torch.tensor([True, False])).item() == pytest.approx(0.475, abs=1e-6)


def test_aurc_by_hand() -> None:
    errors, uncertainty = torch.tensor([False, True, False, True]), torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert aurc(errors, uncertainty).item() == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert aurc(errors, -uncertainty).item() == pytest.approx((1 + 2 / 2 + 2 / 3 + 2 / 4) / 4)
    assert aurc(errors, torch.zeros(4)).item() == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)  # ties, as given


def columns() -> dict[str, Tensor]:
    """Confidence says nothing of the uncertainty here: the error at 0.7 is less uncertain than one of three hits.

    The tokens are of 1 + 3 + 0 + 2 bytes.
    """
    return {
        "nll": torch.tensor([0.1, 0.5, 2.0, 0.2]),
        "confidence": torch.tensor([0.9, 0.6, 0.7, 0.95]),
        "correct": torch.tensor([True, True, False, True]),
        "predictive_entropy": torch.tensor([0.1, 1.0, 0.6, 0.2]),
        "bytes": torch.tensor([1, 3, 0, 2]),
        "target": torch.tensor([4, 5, 6, 7]),
    }


SCORES_BY_HAND = {
    "accuracy": 3 / 4,
    "nll": 2.8 / 4,
    "bits_per_byte": 2.8 / math.log(2) / 6,
    "ece": (0.1 + 0.4 + 0.7 + 0.05) / 4,
    "auroc_error": 2 / 3,
    "aurc": (0 + 0 + 1 / 3 + 1 / 4) / 4,
}


@pytest.mark.parametrize("unit", [1.0, math.log(16)])
def test_scores_of_columns_by_hand(unit: float) -> None:
    """In their order in tables. Entropies may be above 1."""
    rows = columns()
    rows["predictive_entropy"] *= unit
    result = scores(rows)
    assert list(result) == list(SCORES_BY_HAND)
    assert result == pytest.approx(SCORES_BY_HAND, abs=1e-6)


@pytest.mark.parametrize(
    ("column", "without"),
    [
        ("bytes", ["bits_per_byte"]),
        ("nll", ["nll", "bits_per_byte"]),
        ("confidence", ["ece"]),
        ("predictive_entropy", ["auroc_error", "aurc"]),
        ("correct", ["accuracy", "ece", "auroc_error", "aurc"]),
    ],
)
def test_score_without_its_columns_is_left_out(column: str, without: list[str]) -> None:
    rows = columns()
    del rows[column]
    assert scores(rows) == pytest.approx({k: v for k, v in SCORES_BY_HAND.items() if k not in without}, abs=1e-6)


def test_new_score_is_a_function_of_the_columns_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = Score("worst NLL, nats ↓", lambda nll, target: nll[target > 4].max() + target.sum())
    monkeypatch.setitem(SCORES, "worst", worst)
    assert scores(columns())["worst"] == 24.0


def test_uncertainty_above_one_by_rounding_leaves_the_rest_as_it_is() -> None:
    """The error is more uncertain than one of two hits, by what the sigmoid that logits are put through would lose."""
    correct, uncertainty = torch.tensor([True, False, True]), torch.tensor([1e-9, 2e-9, 1 + 1e-6])
    assert auroc_error(correct, uncertainty).item() == 0.5
    rows = {"correct": correct, "predictive_entropy": uncertainty}
    assert scores(rows)["auroc_error"] == 0.5


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 50.0, 1e20])
def test_scale_of_the_uncertainty_does_not_change_the_auroc_of_errors(scale: float) -> None:
    """Errors at 2 and 4, hits at 1, 2 and 3: of six pairs, four and a tie are in order."""
    uncertainty = torch.tensor([4.0, 1.0, 2.0, 3.0, 2.0]) * scale
    correct = torch.tensor([False, True, False, True, True])
    assert auroc_error(correct, uncertainty).item() == pytest.approx(4.5 / 6)


def test_uncertainty_of_zero_throughout_tells_no_errors() -> None:
    assert auroc_error(torch.tensor([False, True, True]), torch.zeros(3)).item() == 0.5


@pytest.mark.parametrize("correct", [True, False])
def test_auroc_of_errors_alone_or_of_hits_alone_is_undefined(correct: bool) -> None:
    assert math.isnan(auroc_error(torch.tensor([correct] * 3), torch.tensor([0.1, 0.2, 0.3])))
    rows = columns() | {"correct": torch.tensor([correct] * 4)}
    result = scores(rows)
    assert math.isnan(result.pop("auroc_error"))
    right = SCORES_BY_HAND | {"accuracy": 1, "ece": (0.1 + 0.4 + 0.3 + 0.05) / 4, "aurc": 0}
    wrong = SCORES_BY_HAND | {"accuracy": 0, "ece": 3.15 / 4, "aurc": 1}
    expected = right if correct else wrong
    assert result == pytest.approx({k: v for k, v in expected.items() if k != "auroc_error"}, abs=1e-6)


def test_all_by_hand() -> None:
    """Hits at 0.9, 0.6 and 0.95, an error at 0.7: it is more uncertain than two of three hits."""
    result = classification_scores(binary([0.9, 0.6, 0.7, 0.95]), torch.tensor([0, 0, 1, 0]))
    assert list(result) == ["accuracy", "balanced_accuracy", "nll", "brier", "ece", "auroc_error", "aurc"]
    assert result == pytest.approx(
        {
            "accuracy": 3 / 4,
            "balanced_accuracy": (1 + 0) / 2,
            "nll": -math.log(0.9 * 0.6 * 0.3 * 0.95) / 4,
            "brier": 2 * (0.1**2 + 0.4**2 + 0.7**2 + 0.05**2) / 4,
            "ece": (0.1 + 0.4 + 0.7 + 0.05) / 4,
            "auroc_error": 2 / 3,
            "aurc": (0 + 0 + 1 / 3 + 1 / 4) / 4,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("target", [0, 1])
def test_auroc_of_errors_is_undefined_without_both_kinds(target: int) -> None:
    result = classification_scores(binary([0.9, 0.6]), torch.tensor([target, target]))
    assert math.isnan(result["auroc_error"])
    assert result["accuracy"] == 1 - target


def test_agrees_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(torch.randn(200, 4, generator=generator, dtype=torch.float64), -1)
    targets = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    result = classification_scores(probs, targets)
    entropy = -(probs * probs.log()).sum(-1)
    assert result["accuracy"] == pytest.approx(metrics.accuracy_score(targets, probs.argmax(-1)))
    assert result["nll"] == pytest.approx(metrics.log_loss(targets, probs))
    assert result["brier"] == pytest.approx(metrics.brier_score_loss(targets, probs, scale_by_half=False))
    assert result["auroc_error"] == pytest.approx(metrics.roc_auc_score(targets != probs.argmax(-1), entropy))


@pytest.mark.parametrize(("prefix", "nll"), [("first_", 2), ("second_", 3), ("third_", 1)])
def test_column_of_a_way_comes_before_a_shared_one(prefix: str, nll: int) -> None:
    rows = {"nll": torch.tensor([1]), "first_nll": torch.tensor([2]), "second_nll": torch.tensor([3])}
    assert scores(rows, prefix) == {"nll": nll}
