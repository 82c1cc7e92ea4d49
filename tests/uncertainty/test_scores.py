"""Scores by hand, and against scikit-learn where it has them."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from thinned.uncertainty import classification_scores
from thinned.uncertainty.calibration import smooth_ece
from thinned.uncertainty.estimates import why_undefined
from thinned.uncertainty.scores import (
    SCORES,
    Score,
    augrc,
    aurc,
    auroc_error,
    brier,
    coverage_at_5_risk,
    nll,
    risk_at_80_coverage,
    scores,
)


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


def test_aurc_by_hand() -> None:
    errors, uncertainty = torch.tensor([False, True, False, True]), torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert aurc(errors, uncertainty).item() == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert aurc(errors, -uncertainty).item() == pytest.approx((1 + 2 / 2 + 2 / 3 + 2 / 4) / 4)
    losses = torch.tensor([0.5, 3.0, 0.0, 2.0])
    assert aurc(losses, uncertainty).item() == pytest.approx((0.5 + 0.5 / 2 + 2.5 / 3 + 5.5 / 4) / 4)


def test_aurc_is_the_mean_over_the_orders_of_ties() -> None:
    losses, uncertainty = torch.tensor([1.0, 0.0, 2.5, 0.0, 1.0, 0.5]), torch.tensor([0, 1, 1, 1, 2, 2])
    orders = [(0, *middle, *last) for middle in permutations((1, 2, 3)) for last in permutations((4, 5))]
    areas = [np.mean(np.cumsum(losses[list(order)].numpy()) / np.arange(1, 7)) for order in orders]
    assert aurc(losses, uncertainty).item() == pytest.approx(np.mean(areas), abs=1e-12)


def test_augrc_by_hand() -> None:
    """Generalized risks of 0, 0, 1/4 and 2/4 at coverages of 1/4 to 1, and lines between them."""
    errors, uncertainty = torch.tensor([False, True, False, True]), torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert augrc(errors, uncertainty).item() == pytest.approx((0 + 0 + 1 / 8 + 3 / 8) / 4)
    assert augrc(errors, torch.zeros(4)).item() == pytest.approx(1 / 4)  # a line from 0 to 2/4
    losses = torch.tensor([0.5, 3.0, 0.0, 2.0])
    assert augrc(losses, uncertainty).item() == pytest.approx((0.25 + 0.5 + 1.5 + 4) / 16)


@pytest.mark.parametrize("weighted", [False, True])
def test_ranks_agree_with_scikit_learn(weighted: bool) -> None:
    """With ties; AUGRC by its relation with AUROC and accuracy (Traub et al. 2024)."""
    generator = torch.Generator().manual_seed(0)
    uncertainty = torch.randint(20, (300,), generator=generator)
    errors = torch.rand(300, generator=generator) * 30 < uncertainty
    weights = torch.rand(300, generator=generator, dtype=torch.float64) if weighted else torch.ones(300)
    auroc = metrics.roc_auc_score(errors, uncertainty, sample_weight=weights)
    accuracy = metrics.accuracy_score(~errors, torch.ones(300), sample_weight=weights)
    assert auroc_error(~errors, uncertainty, weights).item() == pytest.approx(auroc, abs=1e-9)
    area = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(errors, uncertainty, weights).item() == pytest.approx(area, abs=1e-9)


def test_coverage_at_a_risk_of_5_percent_by_hand() -> None:
    """Errors at the 20th and 21st of 40: risks of 1/20, 2/21 and 2/40 after 20, 21 and 40."""
    errors = torch.zeros(40).index_fill(0, torch.tensor([19, 20]), 1)
    assert coverage_at_5_risk(errors, torch.arange(40)).item() == 1
    assert coverage_at_5_risk(errors[:39], torch.arange(39)).item() == pytest.approx(20 / 39)  # 2/39 is too much
    assert coverage_at_5_risk(errors[:39], torch.arange(39).clamp_min(19)).item() == pytest.approx(20 / 39)
    tied = torch.tensor([*range(18), 18, 18, *range(20, 39)])  # the last hit enters with the first error
    assert coverage_at_5_risk(errors[:39], tied).item() == pytest.approx(20 / 39)
    tied[20] = 18  # and with the second: of 21, two are errors
    assert coverage_at_5_risk(errors[:39], tied).item() == pytest.approx(18 / 39)
    assert coverage_at_5_risk(errors, -torch.arange(40).clamp_max(20)).item() == 1
    assert coverage_at_5_risk(torch.ones(3), torch.arange(3)).item() == 0
    for weight in (0.1, 0.3, 0.7, 0.9, 1.1):  # whose sums are rounded up or down
        weights = torch.full((20,), weight, dtype=torch.float64)
        assert coverage_at_5_risk(errors[:20], torch.arange(20), weights).item() == 1


def test_risk_at_a_coverage_of_80_percent_by_hand() -> None:
    """Of four, 3.2 count: the fifth part of the last one."""
    errors, uncertainty = torch.tensor([False, True, False, True]), torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert risk_at_80_coverage(errors, uncertainty).item() == pytest.approx((1 + 0.2) / 3.2)
    assert risk_at_80_coverage(errors, torch.tensor([0, 1, 0, 1])).item() == pytest.approx(1.2 / 3.2)
    assert risk_at_80_coverage(errors, torch.zeros(4)).item() == pytest.approx(2 / 4)
    fifth = torch.cat([errors, torch.tensor([True])]), torch.cat([uncertainty, torch.ones(1)])
    assert risk_at_80_coverage(*fifth).item() == pytest.approx(2 / 4)


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
    # Each of the four has 3.75 of 15 bins, and what is on a border is added up there.
    "adaptive_ece": (3 * 0.4 + (0.3 - 0.175) + 3 * 0.7 + (0.35 - 0.05) + 3 * 0.1 + (0.025 + 0.0375) + 3 * 0.05) / 15,
    "smooth_ece": smooth_ece(columns()["confidence"], columns()["correct"]).item(),
    "auroc_error": 2 / 3,
    "aurc": (0 + 0 + 1 / 3 + 1 / 4) / 4,
    "augrc": (0 + 0 + 1 / 8 + 1 / 4) / 4,
    "coverage_at_5_risk": 2 / 4,
    "risk_at_80_coverage": 1 / 3.2,
}
OF_CONFIDENCE = ["ece", "adaptive_ece", "smooth_ece"]
OF_RANKS = ["auroc_error", "aurc", "augrc", "coverage_at_5_risk", "risk_at_80_coverage"]


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
        ("confidence", OF_CONFIDENCE),
        ("predictive_entropy", OF_RANKS),
        ("correct", ["accuracy", *OF_CONFIDENCE, *OF_RANKS]),
    ],
)
def test_score_without_its_columns_is_left_out(column: str, without: list[str]) -> None:
    rows = columns()
    del rows[column]
    assert scores(rows) == pytest.approx({k: v for k, v in SCORES_BY_HAND.items() if k not in without}, abs=1e-6)


def test_new_score_is_a_function_of_the_columns_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = Score(
        "worst NLL, nats ↓", lambda nll, target, weights: nll[target > 4].max() + target.sum(), ("nll", "target")
    )
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
    right = SCORES_BY_HAND | dict.fromkeys(OF_CONFIDENCE, (0.1 + 0.4 + 0.3 + 0.05) / 4) | dict.fromkeys(OF_RANKS, 0)
    wrong = SCORES_BY_HAND | dict.fromkeys(OF_CONFIDENCE, 3.15 / 4) | dict.fromkeys(OF_RANKS, 1)
    right |= {"accuracy": 1, "coverage_at_5_risk": 1}
    wrong |= {"accuracy": 0, "coverage_at_5_risk": 0, "augrc": 1 / 2}
    expected = right if correct else wrong
    assert result == pytest.approx({k: v for k, v in expected.items() if k != "auroc_error"}, abs=1e-6)


def test_all_by_hand() -> None:
    """Hits at 0.9, 0.6 and 0.95, an error at 0.7: it is more uncertain than two of three hits."""
    result = classification_scores(binary([0.9, 0.6, 0.7, 0.95]), torch.tensor([0, 0, 1, 0]))
    by_hand = {name: SCORES_BY_HAND[name] for name in OF_CONFIDENCE + OF_RANKS}
    assert list(result) == ["accuracy", "balanced_accuracy", "nll", "brier", *by_hand]
    assert result == pytest.approx(
        by_hand
        | {
            "accuracy": 3 / 4,
            "balanced_accuracy": (1 + 0) / 2,
            "nll": -math.log(0.9 * 0.6 * 0.3 * 0.95) / 4,
            "brier": 2 * (0.1**2 + 0.4**2 + 0.7**2 + 0.05**2) / 4,
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


def test_scores_of_tokens_by_hand() -> None:
    rows = {"nll": torch.tensor([1.0, 3.0]), "rank": torch.tensor([5, 6]), "position": torch.tensor([1, 2])}
    assert scores(rows) == pytest.approx({"top_5": 1 / 2, "nll": 2, "perplexity": math.exp(2)})


def test_headline_scores() -> None:
    """Six of examples, and six of tokens, which have bits per byte in place of the Brier score."""
    headline = ["accuracy", "nll", "bits_per_byte", "brier", "ece", "auroc_error", "aurc"]
    assert [name for name, score in SCORES.items() if score.headline] == headline


@pytest.mark.parametrize(("correct", "why"), [(True, "no prediction is wrong"), (False, "no prediction is right")])
def test_reason_for_an_undefined_score(correct: bool, why: str) -> None:
    rows = {"correct": torch.tensor([correct] * 2), "predictive_entropy": torch.zeros(2)}
    assert math.isnan(scores(rows)["auroc_error"])
    assert why_undefined(rows) == why


def test_reason_for_undefined_bits_per_byte() -> None:
    rows = {"nll": torch.zeros(1), "bytes": torch.zeros(1)}
    assert math.isnan(scores(rows)["bits_per_byte"])
    assert why_undefined(rows) == "the targets have no bytes"


@pytest.mark.parametrize("targets", [torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long)])
def test_targets_of_another_shape_are_an_error(targets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected probs \(N, K\) and targets \(N,\), but got \(3, 2\) and"):
        classification_scores(binary([0.9, 0.6, 0.7]), targets)
