"""Calibration: whether of the predictions that are 90 % sure, 90 % are right.

The errors are of the top label: confidence is the probability of the predicted class. They are biased upwards, since a
sample of a calibrated net has errors too. Shapes: N predictions, K classes, R resamples.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from thinned.uncertainty.weighting import interpolated, last_of_ties, mean, over_curves, over_resamples, totals

ECE_BINS = 15
CELLS = 512  # of [0, 1], in which smooth ECE gathers confidences


def ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the expected calibration error in 15 equal bins (Naeini et al. 2015; Guo et al. 2017), () or (R,).

    >>> ece(torch.tensor([0.68, 0.72, 0.9]), torch.tensor([True, False, True])).item()  # (|1 - 1.4| + 0.1) / 3
    0.1666...
    """
    inner = torch.linspace(0, 1, ECE_BINS + 1, dtype=confidence.dtype)[1:-1].to(confidence.device)
    bins = torch.bucketize(confidence, inner, right=True)
    residual = correct.double() - confidence.double()
    return over_resamples(lambda w: totals(w * residual, bins, ECE_BINS).abs().sum(1) / w.sum(1), weights, len(bins))


def adaptive_ece(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the expected calibration error in 15 bins of equal weight (Nixon et al. 2019), () or (R,).

    A prediction on the border of two bins counts in each by its share, and so do those of equal confidence together.

    >>> adaptive_ece(torch.full((4,), 0.7), torch.tensor([True, False, True, True])).item()  # 3/4 are right
    0.0500...
    """

    def of(weight: Tensor, residual: Tensor) -> Tensor:
        at = weight[:, -1:] * torch.arange(1, ECE_BINS + 1, device=weight.device) / ECE_BINS
        up_to = interpolated(at, weight, residual)
        return up_to.diff(dim=1, prepend=torch.zeros_like(at[:, :1])).abs().sum(1) / weight[:, -1]

    return over_curves(of, confidence, correct.double() - confidence.double(), weights)


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
    """Returns the smooth expected calibration error (Błasiok and Nakkiran 2023, algorithm 1), () or (R,).

    It is the integral of |r_s(t)| over confidences t in [0, 1]: The residuals, right (1) or wrong (0) minus confidence,
    smoothed by a Gaussian whose width s is equal to the integral. The Gaussian is reflected at 0 and 1, and cut at
    distance 1/2 as in the authors' package `relplot`. Confidences are gathered in 512 cells. Such a smoothing is a
    product in the cosine series.
    """
    cell = (confidence.double() * CELLS).long().clamp(0, CELLS - 1)
    residual = correct.double() - confidence.double()
    number = torch.arange(CELLS, dtype=torch.float64, device=confidence.device)
    waves = torch.cos(math.pi / CELLS * (number[:, None] + 0.5) * number)  # (cells, frequencies)
    distance = number[: CELLS // 2 + 1] / CELLS
    waves_of_distance = torch.cos(math.pi * distance[:, None] * number)

    def of(w: Tensor) -> Tensor:
        series = totals(w * residual, cell, CELLS) @ waves / w.sum(1, keepdim=True)
        series[:, 1:] *= 2

        def error(width: Tensor) -> Tensor:
            kernel = torch.exp(-((distance / width) ** 2) / 2)
            kernel[:, [0, -1]] /= 2  # The trapezoidal rule.
            smoothed = series * (kernel @ waves_of_distance / kernel.sum(1, keepdim=True))
            return (smoothed @ waves.T).abs().mean(1, keepdim=True)

        low, high = torch.zeros_like(series[:, :1]), torch.ones_like(series[:, :1])
        for _ in range(10):
            middle = (low + high) / 2
            wider = error(middle) > middle
            low, high = torch.where(wider, middle, low), torch.where(wider, high, middle)
        return error(high).squeeze(1)

    return over_resamples(of, weights, len(residual))


def brier_uncertainty(target: Tensor, probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns UNC, the Brier score of the base rates: sum_k b_k (1 - b_k), () or (R,)."""
    number = over_resamples(lambda w: totals(w, target, probs.shape[1]), weights, len(target))
    return 1 - (number / number.sum(-1, keepdim=True)).square().sum(-1)


def brier_discrimination(target: Tensor, probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns DSC, by how much recalibrated probabilities beat the base rates in Brier score, () or (R,).

    The decomposition MCB - DSC + UNC of the Brier score is that of Dimitriadis, Gneiting and Jordan (2021), here
    summed over classes, one versus the rest. A class's probabilities are recalibrated by isotonic regression. Thus DSC
    is the sum of the variances of recalibrated probabilities.
    """
    from scipy.optimize import isotonic_regression  # takes a while to import

    groups = [_pooled(probs[:, k], target == k) for k in range(probs.shape[1])]
    sizes = [int(group.max()) + 1 if len(group) else 0 for group in groups]
    first = torch.tensor([0, *sizes]).cumsum(0)
    of_event = torch.stack(groups).gather(0, target[None])[0] + first.to(target.device)[target]
    # Classes are regressed one after the other in one call. An offset of 2 keeps them apart.
    offset = 2.0 * torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).numpy()

    def of(w: Tensor) -> Tensor:
        weight = torch.cat([totals(w, group, size) for group, size in zip(groups, sizes, strict=True)], 1)
        rate = totals(w, of_event, len(offset)) / weight
        squares = w.new_full((len(w),), math.nan)
        for i, (n, y) in enumerate(zip(weight.cpu().numpy(), rate.cpu().numpy(), strict=True)):
            if (given := n > 0).any():
                fitted = isotonic_regression((y + offset)[given], weights=n[given]).x - offset[given]
                squares[i] = float(n[given] @ fitted**2)
        return squares / w.sum(1)

    return over_resamples(of, weights, len(target)) - (1 - brier_uncertainty(target, probs, weights))


def brier_miscalibration(target: Tensor, probs: Tensor, brier: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns MCB, by how much recalibration would lower the Brier score (see `brier_discrimination`), () or (R,)."""
    recalibrated = brier_uncertainty(target, probs, weights) - brier_discrimination(target, probs, weights)
    return mean(brier, weights) - recalibrated


def _pooled(probability: Tensor, event: Tensor) -> Tensor:
    """Returns groups (N,), ascending in probability, of rows to which isotonic regression gives one value.

    These are ties and, whatever the weights, two neighbours if all events of the first or none of the second happened:
    A step of the regression has less than its value before it, and more behind it.
    """
    order = probability.argsort()
    last = last_of_ties(probability[order])
    number = torch.cat([last.new_full((1,), -1), last]).diff()
    tie = torch.repeat_interleave(torch.arange(len(last), device=last.device), number)
    happened = torch.bincount(tie, event[order].double(), len(last))
    begins = torch.ones_like(last)
    begins[1:] = ((happened < number)[:-1] & (happened > 0)[1:]).long()
    return torch.empty_like(order).scatter_(0, order, (begins.cumsum(0) - 1)[tie])
