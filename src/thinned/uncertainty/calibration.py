"""Measures calibration: whether 90 % of the predictions that are 90 % sure are right.

The errors are those of the top label: confidence is the probability of the predicted class. They are biased upwards,
since a sample of a calibrated net has errors too. Shapes: N predictions, K classes. Weights are None or (N,).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from thinned.uncertainty.weighting import curves, interpolated, last_of_ties, mean, totals, weights_of

ECE_BINS = 15
CELLS = 512  # in [0, 1], in which smooth ECE gathers confidences


def ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the expected calibration error in 15 equal bins (Naeini et al. 2015; Guo et al. 2017), ().

    >>> ece(torch.tensor([0.68, 0.72, 0.9]), torch.tensor([True, False, True])).item()  # (|1 - 1.4| + 0.1) / 3
    0.1666...
    """
    inner = torch.linspace(0, 1, ECE_BINS + 1, dtype=confidence.dtype)[1:-1].to(confidence.device)
    bins = torch.bucketize(confidence, inner, right=True)
    w = weights_of(confidence, weights)
    return totals(w * (correct.double() - confidence.double()), bins, ECE_BINS).abs().sum() / w.sum()


def adaptive_ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the expected calibration error in 15 bins of equal weight (Nixon et al. 2019), ().

    A prediction on the border of two bins counts in each by its share. Predictions of equal confidence are split alike.

    >>> adaptive_ece(torch.full((4,), 0.7), torch.tensor([True, False, True, True])).item()  # 3/4 are right
    0.0500...
    """
    weight, residual = curves(confidence, correct.double() - confidence.double(), weights)
    borders = weight[-1] * torch.arange(1, ECE_BINS + 1, device=weight.device) / ECE_BINS
    up_to = interpolated(borders, weight, residual)
    return F.pad(up_to, (1, 0)).diff().abs().sum() / weight[-1]


def equal_mass_bins(confidence: Tensor) -> list[Tensor]:
    """Returns the rows of at most 15 bins of about equal number, ascending in confidence.

    Equal confidences share a bin. A bin has at least 10 rows, unless there are fewer.

    >>> [rows.tolist() for rows in equal_mass_bins(torch.tensor([0.9] * 12 + [0.4] * 11))]
    [[12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    """
    n, order = len(confidence), confidence.argsort(stable=True)
    ends = last_of_ties(confidence[order]) + 1
    edges = [0]
    while rest := n - edges[-1]:
        size = max(10, math.ceil(rest / (ECE_BINS + 1 - len(edges))))
        end = int(ends[torch.searchsorted(ends, min(n - rest + size, n))])
        edges.append(end if n - end >= 10 else n)
    return [order[start:end] for start, end in pairwise(edges)]


def smooth_ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the smooth expected calibration error (Błasiok and Nakkiran 2023, algorithm 1), ().

    It is the integral of |r_s(t)| over confidences t in [0, 1]. Here r_s is the residual, right (1) or wrong (0) minus
    confidence, smoothed by a Gaussian whose width s equals the integral. The Gaussian is reflected at 0 and 1, and cut
    at distance 1/2 as in the authors' package `relplot`. Confidences are gathered in 512 cells, so that smoothing is a
    product in the cosine series.

    >>> round(smooth_ece(torch.tensor([0.8, 0.8]), torch.tensor([True, True])).item(), 6)
    0.2
    """
    cell = (confidence.double() * CELLS).long().clamp(0, CELLS - 1)
    number = torch.arange(CELLS, dtype=torch.float64, device=confidence.device)
    waves = torch.cos(math.pi / CELLS * (number[:, None] + 0.5) * number)  # (cells, frequencies)
    distance = number[: CELLS // 2 + 1] / CELLS
    waves_of_distance = torch.cos(math.pi * distance[:, None] * number)
    inner = ((distance > 0) & (distance < 0.5)).double()
    w = weights_of(confidence, weights)
    residual = totals(w * (correct.double() - confidence.double()), cell, CELLS)
    series = residual @ waves / w.sum() * (2 - (number == 0).double())

    def error(width: Tensor) -> Tensor:
        kernel = torch.exp(-((distance / width) ** 2) / 2) * (1 + inner) / 2  # by the trapezoidal rule
        return (waves @ (series * (kernel @ waves_of_distance / kernel.sum()))).abs().mean()

    low, high = torch.zeros_like(series[0]), torch.ones_like(series[0])
    for _ in range(10):
        middle = (low + high) / 2
        wider = error(middle) > middle
        low, high = torch.where(wider, middle, low), torch.where(wider, high, middle)
    return error(high)


def brier_uncertainty(target: Tensor, probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns UNC, the Brier score of the base rates: sum_k b_k (1 - b_k), ()."""
    w = weights_of(target, weights)
    return 1 - (totals(w, target, probs.shape[1]) / w.sum()).square().sum()


def brier_discrimination(target: Tensor, probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the discrimination DSC, a scalar: by how much recalibrated probabilities beat the base rates.

    Dimitriadis, Gneiting and Jordan (2021) decompose the Brier score into miscalibration - discrimination +
    uncertainty, MCB - DSC + UNC; here each is summed over classes, one versus the rest. Isotonic regression
    recalibrates the probabilities of a class. DSC is the sum over classes of the variance of what it returns.
    """
    from scipy.optimize import isotonic_regression  # takes a while to import

    w, squares = weights_of(target, weights), 0.0
    for k in range(probs.shape[1]):
        distinct, tie = torch.unique(probs[:, k], return_inverse=True)
        weight, events = (totals(each, tie, len(distinct)) for each in (w, w * (target == k)))
        n, y = (each[weight > 0].cpu().numpy() for each in (weight, events / weight))
        if len(n):
            squares += float(n @ isotonic_regression(y, weights=n).x ** 2)
    return squares / w.sum() - (1 - brier_uncertainty(target, probs, weights))


def brier_miscalibration(target: Tensor, probs: Tensor, brier: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns MCB, the gain in Brier score by recalibration (see `brier_discrimination`), ()."""
    recalibrated = brier_uncertainty(target, probs, weights) - brier_discrimination(target, probs, weights)
    return mean(brier, weights) - recalibrated
