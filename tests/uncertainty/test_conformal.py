"""Conformal sets by hand, class by class, and their coverage against its exact distribution."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from thinned.uncertainty import conformal
from thinned.uncertainty.conformal import K_REG, KINDS, LAMBDA, Kind, class_scores, conformity, threshold, uniforms

P = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64)
HALF = torch.tensor([0.5])
# Of the classes 0 to 3, which have the ranks 3, 1, 4 and 2.
BY_HAND: dict[Kind, list[float]] = {
    "thr": [0.85, 0.5, 0.95, 0.7],
    "aps": [0.8 + 0.075, 0.25, 0.95 + 0.025, 0.5 + 0.15],
    "raps": [0.8 + 0.075 + 0.2, 0.25, 0.95 + 0.025 + 0.3, 0.5 + 0.15 + 0.1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_sets_by_hand(kind: Kind) -> None:
    by_hand = BY_HAND[kind]
    scores = [conformity(P, torch.tensor([y]), HALF)[kind].item() for y in range(4)]
    assert scores == pytest.approx(by_hand, abs=1e-12)
    assert set_members(P, HALF, kind, 0.72).tolist() == [[score <= 0.72 for score in by_hand]]
    assert not set_members(P, HALF, kind, 0.2).any()  # a set may be empty


def set_members(probs: Tensor, u: Tensor, kind: Kind, limit: float) -> Tensor:
    return class_scores(probs, u)[kind] <= limit


def scores_in_words(p: list[float], u: float, kind: Kind, classes: list[int]) -> list[float]:
    """The definitions, one class at a time."""
    ranked = sorted(range(len(p)), key=lambda k: (-p[k], k))
    scores = []
    for y in classes:
        if kind == "thr":
            scores.append(1 - p[y])
            continue
        before = ranked[: ranked.index(y)]
        penalty = LAMBDA * max(0, len(before) + 1 - K_REG) if kind == "raps" else 0
        scores.append(math.fsum(p[k] for k in before) + u * p[y] + penalty)
    return scores


def rows(case: str, K: int, dtype: torch.dtype) -> Tensor:
    """Distributions (12, K)."""
    generator = torch.Generator().manual_seed(K)
    logits = 3 * torch.randn(12, K, generator=generator, dtype=torch.float64)
    probs = torch.softmax(logits.round() if case == "ties" else logits, -1)
    if case == "zeros":
        probs[:, 1::2] = 0
    if case == "one-hot":
        probs = torch.eye(K, dtype=torch.float64)[torch.arange(12) % K]
    return (probs / probs.sum(-1, keepdim=True)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize("case", ["distinct", "ties", "zeros", "one-hot"])
def test_a_set_contains_exactly_the_classes_whose_scores_are_at_most_the_threshold(
    case: str, K: int, dtype: torch.dtype, kind: Kind
) -> None:
    """All scores of a few classes serve as thresholds, so that equality occurs."""
    probs, u = rows(case, K, dtype), uniforms(0, torch.arange(12))
    classes = torch.arange(K)[:: max(1, K // 10)]
    scores = torch.stack([conformity(probs, y.expand(12), u)[kind] for y in classes], -1)  # (12, 10)
    assert scores.dtype == torch.float64
    for limit in scores[::4].flatten().tolist():
        assert set_members(probs, u, kind, limit)[:, classes].equal(scores <= limit)
    in_words = [scores_in_words(p, v, kind, classes.tolist()) for p, v in zip(probs.tolist(), u.tolist(), strict=True)]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12  # sums of rows in fp32 are that far from 1
    torch.testing.assert_close(scores, torch.tensor(in_words, dtype=torch.float64), rtol=0, atol=tolerance)


def test_of_equal_probabilities_the_first_class_comes_first() -> None:
    probs, u = torch.full((1, 4), 0.25), torch.tensor([0.2], dtype=torch.float64)
    scores = [conformity(probs, torch.tensor([y]), u)["aps"].item() for y in range(4)]
    assert scores == pytest.approx([0.05, 0.3, 0.55, 0.8], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_moves_no_end_of_the_scores(dtype: torch.dtype) -> None:
    """They begin at exactly 0 with u = 0, and are 1 for a class of probability 0, though not all rows sum to 1."""
    probs = rows("zeros", 1000, dtype)
    assert (probs.double().sum(-1) != 1).any()
    u = torch.zeros(12)
    assert set_members(probs, u, "aps", 0.0).sum(-1).tolist() == [1] * 12
    assert set_members(probs, u, "aps", 1.0).all()
    assert set_members(probs, u, "aps", math.nextafter(1, 0)).equal(probs > 0)


def test_uniforms_are_those_of_splitmix64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first outputs for the seed 1234567, from the reference implementation (Vigna 2015)."""
    monkeypatch.setattr(conformal, "derive_seed", lambda *parts: 1234567)
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert uniforms(0, torch.tensor([3, 1, 2])).tolist() == [(outputs[i] >> 11) / 2**53 for i in (2, 0, 1)]


def test_uniforms_of_two_seeds_are_uniform_and_independent() -> None:
    """Fails in 2 of 10^6 choices of the seeds."""
    one, other = (uniforms(seed, torch.arange(20_000)).numpy() for seed in (0, 1))
    assert stats.kstest(one, "uniform").pvalue > 1e-6
    assert stats.pearsonr(one, other).pvalue > 1e-6


SPLITS, N_CALIBRATION, N_TEST, COVERAGE = 1000, 49, 100, 0.9


@pytest.mark.parametrize("calibrated", [True, False])
def test_coverage_over_splits_has_its_exact_distribution(calibrated: bool) -> None:
    """The number of covered test examples is beta-binomial (Vovk 2012), whatever the distributions predicted.

    The largest distance of 1,000 independent counts from it exceeds 0.085 with probability 2 exp(-2 · 1000 · 0.085^2),
    1e-6, for each score (Massart 1990). A rank that is off by one has a distance of 0.15.
    """
    generator = torch.Generator().manual_seed(0)
    n = N_CALIBRATION + N_TEST
    logits = 2 * torch.randn(SPLITS * n, 5, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
    if not calibrated:  # three times too confident, and of the wrong classes
        logits = 3 * logits.roll(1, -1)
    probs, u = torch.softmax(logits, -1), uniforms(0, torch.arange(SPLITS * n))
    rank, counts = math.ceil((N_CALIBRATION + 1) * COVERAGE), np.arange(N_TEST + 1)
    exact = stats.betabinom(N_TEST, rank, N_CALIBRATION + 1 - rank).cdf(counts)
    for kind, scores in conformity(probs, targets, u).items():
        covered = []
        for start in range(0, SPLITS * n, n):
            calibration, test = slice(start, start + N_CALIBRATION), slice(start + N_CALIBRATION, start + n)
            sets = set_members(probs[test], u[test], kind, threshold(scores[calibration], COVERAGE))
            covered.append(sets.gather(-1, targets[test, None]).sum().item())
        empirical = np.searchsorted(np.sort(covered), counts, side="right") / SPLITS
        assert np.abs(empirical - exact).max() < 0.085, kind


# Coverage: the threshold, and the number of sets of 0 to 3 classes.
MAPIE = {
    0.55: (0.8892869654920902, [0, 16, 18, 7]),
    0.8: (0.9819610578550206, [0, 5, 12, 24]),
    0.9: (0.9939952052803931, [0, 0, 9, 32]),
}


@pytest.mark.parametrize("coverage", MAPIE)
def test_thr_equals_that_of_mapie(coverage: float) -> None:
    """MAPIE 1.6.0 gave these values: `SplitConformalClassifier(conformity_score="lac", prefit=True)`."""
    probs = torch.softmax(3 * torch.arange(300).double().square().sin().view(100, 3), -1)
    targets, u = torch.arange(100) % 3, torch.zeros(100)
    limit = threshold(conformity(probs[:59], targets[:59], u[:59])["thr"], coverage)
    sizes = set_members(probs[59:], u[59:], "thr", limit).sum(-1)
    expected, counts = MAPIE[coverage]
    assert limit == pytest.approx(expected, abs=1e-12)
    assert torch.bincount(sizes, minlength=4).tolist() == counts


@pytest.mark.parametrize(("n", "coverage", "rank"), [(9, 0.9, 9), (10, 0.9, 10), (19, 0.9, 18), (99, 0.55, 55)])
def test_threshold_is_the_smallest_rank_that_suffices(n: int, coverage: float, rank: int) -> None:
    """In floats, 100 * 0.55 is above 55."""
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0)) + 1
    assert threshold(shuffled.double(), coverage) == rank


@pytest.mark.parametrize(("n", "coverage", "needed"), [(8, 0.9, 9), (18, 0.95, 19), (98, 0.99, 99), (0, 0.5, 1)])
def test_too_few_calibration_examples_are_refused(n: int, coverage: float, needed: int) -> None:
    expected = f"Expected at least {needed} calibration examples for coverage {coverage}, but got {n} "
    with pytest.raises(ValueError, match=expected + rf"\(at most coverage {n}/{n + 1} is possible\)"):
        threshold(torch.zeros(n), coverage)
    assert threshold(torch.zeros(needed), coverage) == 0
