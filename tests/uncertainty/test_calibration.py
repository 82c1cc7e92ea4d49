"""Calibration scores by hand, and against torchmetrics, relplot and scikit-learn."""

from bisect import bisect_left
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from thinned.uncertainty.calibration import (
    adaptive_ece,
    brier_discrimination,
    brier_miscalibration,
    brier_uncertainty,
    ece,
    equal_mass_bins,
    smooth_ece,
)
from thinned.uncertainty.scores import brier


def predictions(number: int, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Overconfident probabilities, some of them 0 and 1 and many of them tied, and targets."""
    generator = torch.Generator().manual_seed(number)
    logits = 2 * torch.randn(number, num_classes, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    probs = (20 * (2 * logits).softmax(-1)).round()
    return probs / probs.sum(-1, keepdim=True), targets


def test_ece_by_hand() -> None:
    """Right at 0.68 and wrong at 0.72, both in bin 11 of 15 (in 10 bins they would part); right at 0.9; right at 1."""
    error = ece(torch.tensor([0.68, 0.72, 0.9, 1.0]), torch.tensor([True, False, True, True]))
    assert error.item() == pytest.approx((2 * abs(0.5 - 0.7) + 0.1 + 0) / 4, abs=1e-6)


def test_confidence_of_exactly_one_shares_the_last_bin() -> None:
    """Right at 0.95 and wrong at 1: |1/2 - 0.975|; in bins of their own they would give (0.05 + 1) / 2."""
    assert ece(torch.tensor([0.95, 1.0]), torch.tensor([True, False])).item() == pytest.approx(0.475, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ece_is_that_of_torchmetrics(dtype: torch.dtype) -> None:
    """Also on the borders of bins, which are among the confidences; torchmetrics has 1 in a bin of its own."""
    confidence = torch.cat([torch.rand(500, dtype=dtype), torch.linspace(0, 1, 16, dtype=dtype)[:-1]])
    correct = torch.rand(515) < confidence**2
    expected = binary_calibration_error(confidence, correct.long(), 15).item()
    assert ece(confidence, correct).item() == pytest.approx(expected, abs=1e-6)


def test_bins_of_adaptive_ece_have_equal_numbers() -> None:
    """Against numpy, with ten predictions in each of the bins, in any order."""
    generator = np.random.default_rng(0)
    confidence = generator.beta(5, 1, 150)
    correct = generator.random(150) < confidence**3
    bins = np.array_split(np.argsort(confidence), 15)
    expected = np.mean([abs(confidence[rows].mean() - correct[rows].mean()) for rows in bins])
    assert adaptive_ece(torch.tensor(confidence), torch.tensor(correct)).item() == pytest.approx(expected, abs=1e-12)


def test_prediction_on_the_border_of_adaptive_bins_counts_in_both() -> None:
    """Of two predictions seven and a half bins each: a wrong one at 0.2 and a right one at 0.6 share the eighth."""
    error = adaptive_ece(torch.tensor([0.6, 0.2]), torch.tensor([True, False])).item()
    assert error == pytest.approx((7 * 0.2 + abs(0.4 - 0.2) / 2 + 7 * 0.4) / 15, abs=1e-6)


RELPLOT = {  # relplot 1.0.3: smECE(confidence, correct)
    "ramp": (0.1013112077987911, np.arange(200) / 400 + 0.5, np.arange(200) % 4 > 0),
    "sharp": (0.08143735134681619, 0.99 - 0.4 * (np.arange(300) / 300) ** 2, np.arange(300) % 9 > 0),
    "three": (
        0.08913633405028681,
        np.repeat([0.3, 0.9, 0.97], [10, 20, 70]),
        np.r_[np.arange(10) % 5 == 0, np.arange(20) % 10 > 0, np.arange(70) % 7 > 0],
    ),
    "wide": (0.2321927575796857, np.arange(40) / 40 + 0.0125, np.arange(40) % 3 > 0),
}


@pytest.mark.parametrize("case", RELPLOT)
def test_smooth_ece_is_that_of_relplot(case: str) -> None:
    expected, confidence, correct = RELPLOT[case]
    assert smooth_ece(torch.tensor(confidence), torch.tensor(correct)).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("case", RELPLOT)
def test_smooth_ece_is_the_integral_of_smoothed_residuals(case: str) -> None:
    """By quadrature of the Gaussian and of its images behind 0 and 1, with a width in steps of 1/1024."""
    _, confidence, correct = RELPLOT[case]
    t = (np.arange(2000)[:, None] + 0.5) / 2000
    distances = np.stack([t - confidence, t + confidence, 2 - t - confidence])

    def error(width: float) -> float:
        gaussian = stats.norm(scale=width)
        kernel = np.where(abs(distances) <= 0.5, gaussian.pdf(distances), 0).sum(0) / (1 - 2 * gaussian.sf(0.5))
        return float(abs(kernel @ (correct - confidence)).mean()) / len(confidence)

    widths = np.arange(1, 1025) / 1024
    width = widths[bisect_left(widths, True, key=lambda width: error(width) <= width)]
    got = smooth_ece(torch.tensor(confidence), torch.tensor(correct)).item()
    assert got == pytest.approx(error(width), abs=5e-5)


@pytest.mark.parametrize("sure", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("right", [True, False])
def test_smooth_ece_of_equal_predictions_is_their_residual(sure: float, right: bool) -> None:
    """A confidence of exactly 1 counts like any other; relplot counts it half."""
    confidence = torch.tensor([sure] * 3 + [0.5, 0.5], dtype=torch.float64)
    correct = torch.tensor([right] * 3 + [True, False])
    expected = 3 / 5 * abs(right - sure)
    assert smooth_ece(confidence, correct).item() == pytest.approx(expected, abs=1e-6)


def test_decomposition_by_hand() -> None:
    """Events at 0.4 and 0.8, none at 0.2 and 0.6, which isotonic regression maps to 0, 1/2, 1/2 and 1."""
    second = torch.tensor([0.4, 0.6, 0.8, 0.2], dtype=torch.float64)
    probs, targets = torch.stack([1 - second, second], 1), torch.tensor([1, 0, 1, 0])
    assert brier_uncertainty(targets, probs).item() == pytest.approx(2 * 1 / 4)
    assert brier_discrimination(targets, probs).item() == pytest.approx(2 * (1 / 4 - 1 / 8))
    score = 2 * (0.2**2 + 0.6**2 + 0.6**2 + 0.2**2) / 4
    assert brier_miscalibration(targets, probs, brier(probs, targets)).item() == pytest.approx(score - 2 / 8)


@pytest.mark.parametrize("weighted", [False, True])
def test_decomposition_is_that_of_scikit_learns_isotonic_regression(weighted: bool) -> None:
    probs, targets = predictions(300)
    assert {0.0, 1.0} <= {*probs.flatten().tolist()}
    weights = torch.randint(4, (300,), generator=torch.Generator().manual_seed(0)) if weighted else torch.ones(300)
    events = torch.nn.functional.one_hot(targets, 4).numpy()
    recalibrated = np.stack(
        [IsotonicRegression().fit(p, y, weights).predict(p) for p, y in zip(probs.T, events.T, strict=True)], 1
    )
    score, after, base = (
        np.average(((p - events) ** 2).sum(1), weights=weights)
        for p in (probs.numpy(), recalibrated, np.average(events, 0, weights)[None])
    )
    terms = (probs, brier(probs, targets), weights)
    assert brier_miscalibration(targets, *terms).item() == pytest.approx(score - after, abs=1e-9)
    assert brier_discrimination(targets, probs, weights).item() == pytest.approx(base - after, abs=1e-9)
    assert brier_uncertainty(targets, probs, weights).item() == pytest.approx(base, abs=1e-9)


@pytest.mark.parametrize("n", [1, 9, 10, 19, 20, 150, 151, 3000])
@pytest.mark.parametrize("levels", [1, 5, 10**6])
def test_bins_of_equal_mass(n: int, levels: int) -> None:
    """All rows are in one, in ascending order; ties are together; and few rows are not spread thin."""
    generator = torch.Generator().manual_seed(n)
    confidence = torch.randint(levels, (n,), generator=generator) / levels
    bins = equal_mass_bins(confidence)
    assert torch.cat(bins).sort().values.tolist() == list(range(n))
    ends = [(confidence[rows].min(), confidence[rows].max()) for rows in bins]
    assert all(high < low for (_, high), (low, _) in pairwise(ends))
    assert all(len(rows) >= min(n, max(10, n // 15)) for rows in bins)
    if levels > n:
        assert len(bins) == max(1, min(15, n // 10))
        assert max(map(len, bins)) <= max(19, n // 15 + 1)
