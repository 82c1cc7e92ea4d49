"""What holds for every score under weights: a weight is a number of copies, and the order of rows does not matter."""

import math

import pytest
import torch
from torch import Tensor

from thinned.uncertainty.conformal import KINDS
from thinned.uncertainty.scores import SCORES, brier, entropy, nll, recall_per_class, scores

N, K = 60, 4


def rows(number: int = N) -> dict[str, Tensor]:
    """Predictions with many ties, and probabilities of exactly 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(number, K, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    probs = (4 * (2 * logits).softmax(-1)).round()
    probs /= probs.sum(-1, keepdim=True)
    confidence, prediction = probs.max(-1)
    return {
        "target": target, "correct": prediction == target, "confidence": confidence, "probs": probs,
        "nll": nll(probs, target), "brier": brier(probs, target), "predictive_entropy": entropy(probs),
        "rank": 1 + torch.arange(number) % 7, "position": torch.ones(number), "bytes": 1 + torch.arange(number) % 3,
        **{f"{kind}_covered": torch.arange(number) % 9 > i for i, kind in enumerate(KINDS)},
        **{f"{kind}_size": torch.arange(number) % (2 + i) for i, kind in enumerate(KINDS)},
    }  # fmt: skip


def taken(columns: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {name: column[index] for name, column in columns.items()}


def weighted(columns: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """All scores of weighted rows."""
    return {name: score.of(*(columns[c] for c in score.columns), weights=weights) for name, score in SCORES.items()}


def close(got: dict[str, Tensor], expected: dict[str, float]) -> None:
    assert {name: value.item() for name, value in got.items()} == pytest.approx(
        expected, rel=1e-12, abs=1e-12, nan_ok=True
    )


def test_all_scores_are_tested() -> None:
    columns = rows()
    assert scores(columns).keys() == SCORES.keys()
    assert len(columns["predictive_entropy"].unique()) < N / 4
    assert {0.0, 1.0} <= {*columns["probs"].flatten().tolist()}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_weight_is_a_number_of_copies(dtype: torch.dtype) -> None:
    weights = torch.randint(4, (N,), generator=torch.Generator().manual_seed(1))
    copies = torch.arange(N).repeat_interleave(weights)
    assert len(copies) > N
    close(weighted(rows(), weights.to(dtype)), scores(taken(rows(), copies)))


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.kind in ("calibration", "resampled")])
def test_each_resample_is_scored_alone(name: str) -> None:
    """By one call for all of them."""
    weights = torch.randint(3, (8, N), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    score, columns = SCORES[name], [rows()[column] for column in SCORES[name].columns]
    together = torch.vmap(lambda w: score.of(*columns, weights=w))(weights)
    alone = torch.stack([score.of(*columns, weights=of_resample) for of_resample in weights])
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 7.0])
def test_scale_of_the_weights_does_not_matter(scale: float) -> None:
    """But for AURC, whose mean over n = 1 .. N depends on N."""
    weights = torch.randint(4, (N,), generator=torch.Generator().manual_seed(1)).double()
    got, expected = weighted(rows(), scale * weights), weighted(rows(), weights)
    assert got.pop("aurc").item() == pytest.approx(expected.pop("aurc").item(), rel=0.1)
    close(got, {name: value.item() for name, value in expected.items()})


def test_order_of_the_rows_does_not_matter() -> None:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    expected = {name: value.item() for name, value in weighted(rows(), weights).items()}
    close(weighted(taken(rows(), order), weights[order]), expected)


def test_row_of_weight_zero_does_not_count() -> None:
    weights = (torch.arange(N) % 3 > 0).long()
    close(weighted(rows(), weights), scores(taken(rows(), weights.nonzero().squeeze(1))))


@pytest.mark.parametrize("number", [0, N])
def test_without_weight_no_score_is_defined(number: int) -> None:
    values = weighted(rows(number), torch.zeros(number))
    assert values.keys() == SCORES.keys()
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("number", [1, 5])
def test_scores_of_sure_predictions(right: bool, number: int) -> None:
    """All right, or all wrong, of a single class."""
    target = torch.zeros(number, dtype=torch.long)
    probs = torch.tensor([[1.0, 0.0]] if right else [[0.0, 1.0]], dtype=torch.float64).repeat(number, 1)
    got = scores(
        {
            "target": target, "correct": torch.tensor([right] * number), "confidence": torch.ones(number),
            "probs": probs, "nll": nll(probs, target), "brier": brier(probs, target),
            "predictive_entropy": entropy(probs),
        }
    )  # fmt: skip
    hit, wrong = float(right), 1 - right
    expected = {
        "accuracy": hit, "balanced_accuracy": hit, "nll": wrong * -math.log(2.0**-1022), "brier": 2 * wrong,
        "brier_miscalibration": 2 * wrong, "brier_discrimination": 0, "brier_uncertainty": 0,
        "ece": wrong, "adaptive_ece": wrong, "smooth_ece": wrong, "auroc_error": math.nan,
        "aurc": wrong, "augrc": wrong / 2, "coverage_at_5_risk": hit, "risk_at_80_coverage": wrong,
    }  # fmt: skip
    assert got == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_recall_under_weights() -> None:
    """Class 1 has an example without weight; n tells of examples."""
    target, correct = torch.tensor([0, 0, 1, 2]), torch.tensor([True, False, True, True])
    recall, n = recall_per_class(target, correct, 3, torch.tensor([3, 1, 0, 1]))
    assert recall.tolist() == pytest.approx([3 / 4, math.nan, 1], nan_ok=True)
    assert n.tolist() == [2, 1, 1]
