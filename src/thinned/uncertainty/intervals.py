"""95 % intervals of scores, and paired differences between ways to predict or between runs.

A smooth score is linear in the weights of its examples, but for small terms: the variance of its gradient is its own
(the infinitesimal jackknife, Efron 1982, chapter 6; for AUROC it is DeLong et al. 1988). Where few examples, such as
the errors of an accurate net, carry a score, two things keep its interval honest. Hall's transformation (1992,
J. R. Stat. Soc. B 54) takes the skewness of the examples into account. And one hypothetical error joins the examples,
with the scores that the probabilities themselves expect, so that data without an error do not promise that there is
none. Two ways are compared on the same examples and the same hypothetical error. What has no gradient is resampled.

Shapes: N predictions, G independent groups of them (each its own, if none are given), R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from thinned.models.dropout import derive_seed
from thinned.uncertainty.scores import SCORES, Score, why_undefined

Z = 1.959964  # 95 % of a normal variable are in [-Z, Z]
WEIGHTS_AT_ONCE = 2**26  # of one byte each
PARTS = 16  # of the hypothetical error, which differ in uncertainty
POISSON = np.searchsorted(  # the quantiles at 2^16 levels
    np.cumsum([math.exp(-1) / math.factorial(k) for k in range(10)]), (np.arange(2**16) + 0.5) / 2**16
).astype(np.uint8)


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval.

    Attributes:
        value: The score. A calibration error may be above its interval, from which the bias is taken.
        low: NaN, like the others, if the score is undefined.
        high: Likewise.
        n: Number of predictions, or of seeds.
        why: Why something is NaN, in a few words.
    """

    value: float
    low: float
    high: float
    n: int
    why: str | None = None


@dataclass(frozen=True)
class Difference:
    """By how much a score is above that of the baseline on the same examples, with its 95 % interval.

    Attributes:
        p: Probability of a difference at least as large if there is none in truth, after Holm's correction for the
            number of ways. The interval is that of one difference.
        told_apart: Whether p < 0.05.
    """

    value: float
    low: float
    high: float
    p: float
    told_apart: bool = False


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (Wilson 1927); n, at least 1, need not be an integer.

    >>> low, high = wilson(0, 10)
    >>> low, round(high, 4)
    (0.0, 0.2775)
    """
    p, shrink = successes / n, 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def t_interval(values: Sequence[float]) -> Interval:
    """Returns the mean over seeds with its 95 % interval by Student's t; fewer than two seeds give no bounds.

    >>> interval = t_interval([1.0, 2.0, 3.0])
    >>> interval.value, round(interval.high, 3)
    (2.0, 4.484)
    """
    from scipy.special import stdtrit  # takes a second to import

    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n, "there is one seed" if n else "there are no seeds")
    half = float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values of a family of tests, adjusted so that they hold together (Holm 1979); NaN is no test.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    adjusted, largest = [math.nan] * len(p_values), 0.0
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = adjusted[i] = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
    return adjusted


def resample_weights(num_groups: int, resamples: range, seed: int) -> Tensor:
    """Returns how often each group is in each bootstrap resample: (R, G) uint8, independent Poisson variables of mean 1.

    They depend on (seed, resample, group) alone, so ways and runs on the same examples are resampled alike.
    """
    weights = np.empty((len(resamples), num_groups), np.uint8)
    for row, resample in zip(weights, resamples, strict=True):
        words = np.random.SFC64(derive_seed(seed, "bootstrap", resample)).random_raw(-(-num_groups // 4))
        np.take(POISSON, words.view(np.uint16)[:num_groups], out=row)
    return torch.from_numpy(weights)


@torch.inference_mode(False)  # at the end of a test, there would be no gradients
@torch.enable_grad()  # type: ignore[no-untyped-call]
def score_intervals(
    ways: Mapping[str, Mapping[str, Tensor]],
    baseline: str | None = None,
    groups: Tensor | None = None,
    num_resamples: int = 200,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Difference]]]:
    """Returns the intervals of all scores of each way, and the differences of each other way to the baseline.

    Args:
        ways: The columns of each way, (N, ...), by its name. Those of one way at a time are read and held.
        baseline: The way with which the others are compared.
        groups: The group of each prediction, (N,) int64, if predictions of one group depend on each other, as tokens do.
        num_resamples: R. It serves a mean and a variance, and so need not grow with the number of ways.
        seed: Seed of the resamples.

    Returns:
        Both by way and score.

    Raises:
        ValueError: There are fewer than two predictions or groups, ways differ in length, or the baseline is no way.
    """
    if baseline is not None and baseline not in ways:
        raise ValueError(f"Expected a baseline among {list(ways)}, but got {baseline}")
    doubts = {name: 1 - columns["confidence"].double() for name, columns in ways.items()}
    if len({len(doubt) for doubt in doubts.values()}) != 1:
        lengths = {name: len(doubt) for name, doubt in doubts.items()}
        raise ValueError(f"Expected ways with predictions of the same examples, but got numbers of them: {lengths}")
    doubt = torch.stack(list(doubts.values())).mean(0).clamp_min(torch.finfo(torch.float32).eps)
    n = len(doubt)
    group = torch.arange(n) if groups is None else torch.unique(groups, return_inverse=True)[1]
    if n < 2 or group.max() == 0:
        raise ValueError(f"Expected at least two independent predictions, but got {min(n, 1)}")

    intervals: dict[str, dict[str, Interval]] = {name: {} for name in ways}
    differences: dict[str, dict[str, Difference]] = {name: {} for name in ways if name != baseline}
    of_baseline: dict[str, _Smooth | _Resampled] = {}
    nll_of_baseline: Tensor | None = None
    for name in sorted(ways, key=lambda name: name != baseline):
        rows = {key: ways[name][key].clone() for key in _columns_of_scores() if key in ways[name]}
        hypothetical = _hypothetical_error(rows, doubt)
        for key, score in SCORES.items():
            if not set(score.columns) <= rows.keys():
                continue
            columns = {column: rows[column] for column in score.columns}
            value = score.of(**columns).item()
            if math.isnan(value):
                intervals[name][key] = Interval(value, value, value, n, why_undefined(key, rows))
                continue
            estimate: _Smooth | _Resampled
            if score.kind in ("proportion", "smooth"):
                estimate = _smooth(score, value, columns, hypothetical, group)
            else:
                estimate = _resampled(score, value, columns, group, num_resamples, seed)
            intervals[name][key] = Interval(value, *estimate.bounds(), n)
            if name == baseline:
                of_baseline[key], nll_of_baseline = estimate, rows["nll"]
            elif key in of_baseline:
                same = nll_of_baseline is not None and torch.equal(rows["nll"], nll_of_baseline)
                differences[name][key] = Difference(0, 0, 0, 1) if same else estimate.above(of_baseline[key])
    for key in SCORES:
        family = [of_way for of_way in differences.values() if key in of_way]
        for of_way, p in zip(family, holm([of_way[key].p for of_way in family]), strict=True):
            of_way[key] = replace(of_way[key], p=p, told_apart=p < 0.05)
    return intervals, differences


@dataclass(frozen=True)
class _Smooth:
    """A smooth score, and what each group of examples does to it."""

    value: float
    at: float  # the score with the hypothetical error
    moves: Tensor  # (G + E,), of groups and of parts of the hypothetical error: the gradient in their weights
    weights: Tensor  # (G + E,)
    proportion: bool
    most: float = math.inf

    def bounds(self) -> tuple[float, float]:
        """Returns Hall's interval, or Wilson's for the n at which independent examples have the same variance."""
        if self.proportion:
            variance = float(self.weights @ self.moves**2)
            n = len(self.moves)
            n = min(n, self.value * (1 - self.value) / variance) if variance > 0 else n
            return wilson(self.value * n, n)
        error, skewness = self._spread()
        low, high = (self.at - error * _inverse(z, skewness) for z in (Z, -Z))
        return max(0.0, min(low, self.value)), min(self.most, max(high, self.value))

    def above(self, other: "_Smooth") -> Difference:
        """Returns the difference to another way."""
        value, at, moves, weights = self.value - other.value, self.at - other.at, self.moves - other.moves, self.weights
        if self.proportion:  # Half an example counts that one way alone has right, and half one that the other has.
            moves = torch.cat([moves, moves.new_tensor([1, -1]) / len(moves)])
            weights = torch.cat([weights, weights.new_full((2,), 0.5)])
        error, skewness = replace(self, moves=moves, weights=weights)._spread()
        if error == 0:
            return Difference(value, value, value, float(value == 0))
        # The skewness of a few differences is itself noise, so that it may widen an interval, but not move it.
        skews = [0.0] if self.proportion else [0.0, skewness]
        low = min(at - error * _inverse(Z, skew) for skew in skews)
        high = max(at - error * _inverse(-Z, skew) for skew in skews)
        p = max(_two_sided(_hall(at / error, skew)) for skew in skews)
        return Difference(value, min(low, value), max(high, value), p)

    def _spread(self) -> tuple[float, float]:
        """Returns the standard error, and the skewness of the score."""
        square, cube = (float(self.weights @ self.moves**power) for power in (2, 3))
        n = float(self.weights.sum())
        return math.sqrt(square * n / (n - 1)), cube / square**1.5 if square > 0 else 0.0


@dataclass(frozen=True)
class _Resampled:
    """A score and its values in resamples (R,)."""

    value: float
    replicates: Tensor
    power: int

    def bounds(self) -> tuple[float, float]:
        """Returns the normal interval of the score, or of its square, without its bias."""
        centre, error = _without_bias(self.value**self.power, self.replicates**self.power)
        low, high = (max(0.0, centre + z * error) ** (1 / self.power) for z in (-Z, Z))
        return low, high

    def above(self, other: "_Resampled") -> Difference:
        """Returns the difference to another way."""
        value = self.value - other.value
        centre, error = _without_bias(value, self.replicates - other.replicates)
        p = _two_sided(centre / error) if error != 0 else float(value == 0)
        return Difference(value, min(centre - Z * error, value), max(centre + Z * error, value), p)


def _smooth(
    score: Score, value: float, columns: dict[str, Tensor], hypothetical: dict[str, Tensor], group: Tensor
) -> _Smooth:
    n, groups = len(group), int(group.max()) + 1
    weights = torch.ones(n, dtype=torch.float64)
    if score.kind == "smooth" and columns.keys() <= hypothetical.keys():
        columns = {name: torch.cat([column, hypothetical[name].to(column)]) for name, column in columns.items()}
        weights = torch.cat([weights, weights.new_full((PARTS,), 1 / PARTS)])
    at = score.of(**columns, weights=weights.requires_grad_())
    (gradient,) = torch.autograd.grad(at, weights)
    weights = weights.detach()
    gradient = gradient - weights @ gradient / weights.sum()
    moves = gradient.new_zeros(groups).index_add_(0, group, gradient[:n])
    most = 1.0 if columns.keys() == {"correct", "predictive_entropy"} else math.inf
    weights = torch.cat([weights.new_ones(groups), weights[n:]])
    return _Smooth(value, at.item(), torch.cat([moves, gradient[n:]]), weights, score.kind == "proportion", most)


def _resampled(
    score: Score, value: float, columns: dict[str, Tensor], group: Tensor, num_resamples: int, seed: int
) -> _Resampled:
    groups, at_once = int(group.max()) + 1, max(1, WEIGHTS_AT_ONCE // len(group))
    parts = [range(start, min(start + at_once, num_resamples)) for start in range(0, num_resamples, at_once)]
    replicates = [score.of(**columns, weights=resample_weights(groups, part, seed)[:, group]) for part in parts]
    return _Resampled(value, torch.cat(replicates), 2 if score.kind == "calibration" else 1)


def _hypothetical_error(rows: Mapping[str, Tensor], doubt: Tensor) -> dict[str, Tensor]:
    """Returns columns (PARTS,) of an error at a row that is drawn by its doubt (N,), with the class as the row expects.

    Given an error, a row with confidence c expects the NLL (H[p] + c log c) / (1 - c), and the Brier score
    sum_k p_k^2 + 1 - 2 (sum_k p_k^2 - c^2) / (1 - c).
    """
    wrong = (1 - rows["confidence"].double()).clamp_min(torch.finfo(torch.float32).eps)
    entropy, nll = rows["predictive_entropy"].double(), rows["nll"].double()
    surprise = (entropy - torch.special.entr(1 - wrong)) / wrong
    expected = {"nll": torch.maximum(surprise, -wrong.log())}  # Rounding matters for a confidence near 1.
    if "brier" in rows:
        squares = rows["brier"].double() - 1 + 2 * torch.exp(-nll)
        other = ((squares - (1 - wrong) ** 2) / wrong).clamp_min(0)
        expected["brier"] = squares + 1 - 2 * torch.minimum(other, wrong)
    order, levels = entropy.argsort(), (torch.arange(PARTS, dtype=torch.float64) + 0.5) / PARTS
    at = torch.searchsorted(doubt[order].cumsum(0), levels * doubt.sum())
    return {
        "correct": torch.zeros(PARTS),
        "predictive_entropy": entropy[order[at]],
        **{name: (doubt @ column / doubt.sum()).expand(PARTS) for name, column in expected.items()},
    }


def _without_bias(value: float, replicates: Tensor) -> tuple[float, float]:
    """Returns an estimate that is as far below a value as the resamples are above it on average, and its error."""
    defined = replicates[~replicates.isnan()]
    return 2 * value - float(defined.mean()), float(defined.std())


def _hall(t: float, skewness: float) -> float:
    """Transforms a studentized statistic so that it is normal (Hall 1992)."""
    return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6


def _inverse(z: float, skewness: float) -> float:
    """Returns the t that `_hall` maps to z."""
    if abs(skewness) < 1e-6:
        return z
    return 3 * (float(np.cbrt(1 + skewness * (z - skewness / 6))) - 1) / skewness


def _two_sided(z: float) -> float:
    """Returns the probability that a normal variable is as far from 0 as z."""
    return math.erfc(abs(z) / math.sqrt(2))


def _columns_of_scores() -> set[str]:
    """Returns the names of all columns that scores read."""
    return {"confidence", *(column for score in SCORES.values() for column in score.columns)}
