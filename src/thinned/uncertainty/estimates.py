"""Scores with their sampling errors, by which intervals are made and ways are compared.

A proportion has Wilson's interval (1927). Any smooth score is linear in the weights of its examples, but for small
terms, and its variance is that of its gradient (the infinitesimal jackknife, Efron 1982, chapter 6; for AUROC it is
DeLong et al. 1988). Where few examples carry a score, such as the errors of an accurate net, two things keep its
interval honest. Hall's transformation (1992, J. R. Stat. Soc. B 54) takes their skewness into account. And one
hypothetical error joins the examples, with the scores that the probabilities themselves expect, so that data without an
error do not promise that there is none. Two ways are compared on the same examples and the same hypothetical error.

What has no gradient is resampled. Its interval is normal, without the bias that resampling shows; for a calibration
error it is one of the square, to which noise adds its variance. In a difference the biases cancel. Resamples in which a
score is undefined are left out.

Shapes: N predictions, G independent groups of them, E parts of the hypothetical error, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from thinned.models.dropout import derive_seed
from thinned.uncertainty.scores import Score

Z = 1.959964  # 95 % of a normal variable are in [-Z, Z]
WEIGHTS_AT_ONCE = 2**24  # of one byte each
HYPOTHETICAL = {"confidence", "predictive_entropy", "nll", "brier"}  # the columns that make the hypothetical error
PARTS = 16  # of it, which differ in uncertainty
POISSON = np.searchsorted(  # the quantiles at 2^16 levels
    np.cumsum([math.exp(-1) / math.factorial(k) for k in range(10)]), (np.arange(2**16) + 0.5) / 2**16
).astype(np.uint8)


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (Wilson 1927); n, above 0, need not be an integer.

    >>> low, high = wilson(0, 10)
    >>> low, round(high, 4)
    (0.0, 0.2775)
    """
    p, shrink = successes / n, 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def share_interval(column: Tensor, rows: Tensor, blocks: Tensor | None = None) -> tuple[float, float, float]:
    """Returns in which share of some rows a bool column is true, and Wilson's 95 % interval.

    Rows of a block depend on each other: they count as the number of independent ones with their variance.

    Args:
        column: (N,) bool.
        rows: Those that count, int64.
        blocks: The block of each of all N, int64, if they are not independent.

    >>> share_interval(torch.tensor([True, False, True]), torch.tensor([0, 1]))[0]
    0.5
    """
    hits, n = column[rows].double(), float(len(rows))
    share = hits.mean().item()
    if blocks is not None:
        variance = blocks[rows].bincount(hits - share).square().sum().item() / n**2
        n = share * (1 - share) / variance if variance > 1e-12 else len(set(blocks[rows].tolist()))
    return share, *wilson(share * n, n)


def resample_weights(num_groups: int, resamples: range, seed: int) -> Tensor:
    """Returns how often each group is in each bootstrap resample, (R, G) uint8: Poisson variables of mean 1.

    They depend on (seed, resample, group) alone, so ways and runs on the same examples are resampled alike.
    """
    weights = np.empty((len(resamples), num_groups), np.uint8)
    for row, resample in zip(weights, resamples, strict=True):
        words = np.random.SFC64(derive_seed(seed, "bootstrap", resample)).random_raw(-(-num_groups // 4))
        np.take(POISSON, words.view(np.uint16)[:num_groups], out=row)
    return torch.from_numpy(weights)


@dataclass(frozen=True)
class Smooth:
    """A smooth score, and by how much each group of examples moves it.

    Attributes:
        value: The score.
        at: The score with the hypothetical error.
        moves: Its gradient in the weights of groups, and of the parts of the hypothetical error, (G + E,).
        weights: 1 for groups, less for parts, (G + E,).
        n: N.
        proportion: Whether it is a proportion. E is 0 then.
        most: The largest possible score.
    """

    value: float
    at: float
    moves: Tensor
    weights: Tensor
    n: int
    proportion: bool
    most: float

    def bounds(self) -> tuple[float, float]:
        """Returns the 95 % interval: Hall's; or Wilson's for as many independent examples as have this variance."""
        error, skewness = self._error_and_skewness()
        if self.proportion:
            groups = len(self.moves)
            spread = (
                self.value * (1 - self.value) * groups / (groups - 1)
            )  # 0 if all are right; rounding may leave an error
            n_effective = spread / error**2 if spread > 1e-9 and error > 0 else groups
            return wilson(self.value * n_effective, n_effective)
        low, high = (self.at - error * _inverse_hall(z, skewness) for z in (Z, -Z))
        return max(0.0, min(low, self.value)), min(self.most, max(high, self.value))

    def above(self, other: "Smooth | Resampled") -> tuple[float, float, float]:
        """Returns the 95 % interval of the difference to another way, and the p-value of none."""
        assert isinstance(other, Smooth)
        value, at, moves, weights = self.value - other.value, self.at - other.at, self.moves - other.moves, self.weights
        if self.proportion:  # Half an example counts that one way alone has right, and half one that the other has.
            moves = torch.cat([moves, moves.new_tensor([1, -1]) / self.n])
            weights = torch.cat([weights, weights.new_full((2,), 0.5)])
        error, skewness = replace(self, moves=moves, weights=weights)._error_and_skewness()
        if error == 0:
            return value, value, float(value == 0)
        # The skewness of a few differences is itself noise: It may widen an interval, and not move it.
        skews = (0.0, 0.0 if self.proportion else skewness)
        low = min(at - error * _inverse_hall(Z, skew) for skew in skews)
        high = max(at - error * _inverse_hall(-Z, skew) for skew in skews)
        return min(low, value), max(high, value), max(_two_sided(_hall(at / error, skew)) for skew in skews)

    @classmethod
    def mean_of(cls, runs: Sequence["Smooth"]) -> "Smooth":
        """Returns the mean of a score over runs on the same examples."""
        at, moves = fmean(run.at for run in runs), torch.stack([run.moves for run in runs]).mean(0)
        return replace(runs[0], value=fmean(run.value for run in runs), at=at, moves=moves)

    def _error_and_skewness(self) -> tuple[float, float]:
        square, cube = (float(self.weights @ self.moves**power) for power in (2, 3))
        n = float(self.weights.sum())
        return math.sqrt(square * n / (n - 1)), cube / square**1.5 if square > 0 else 0.0


@dataclass(frozen=True)
class Resampled:
    """A score and its values in resamples, (R,). The power that is unbiased is normal in its interval, up to `most`."""

    value: float
    replicates: Tensor
    power: int
    most: float = math.inf

    def bounds(self) -> tuple[float, float]:
        """Returns the 95 % interval."""
        powers = self.replicates[~self.replicates.isnan()] ** self.power
        centre, error = 2 * self.value**self.power - float(powers.mean()), float(powers.std())
        low, high = (max(0.0, centre + z * error) ** (1 / self.power) for z in (-Z, Z))
        return min(low, self.most), min(high, self.most)

    def above(self, other: "Smooth | Resampled") -> tuple[float, float, float]:
        """Returns the 95 % interval of the difference to another way, and the p-value of none."""
        assert isinstance(other, Resampled)
        value, replicates = self.value - other.value, self.replicates - other.replicates
        error = float(replicates[~replicates.isnan()].std())
        p = _two_sided(value / error) if error != 0 else float(value == 0)
        return value - Z * error, value + Z * error, p

    @classmethod
    def mean_of(cls, runs: Sequence["Resampled"]) -> "Resampled":
        """Returns the mean of a score over runs on the same examples."""
        replicates = torch.stack([run.replicates for run in runs]).mean(0)
        return replace(runs[0], value=fmean(run.value for run in runs), replicates=replicates)


def estimated(
    score: Score,
    value: float,
    columns: dict[str, Tensor],
    hypothetical: Mapping[str, Tensor],
    group: Tensor,
    num_resamples: int,
    seed: int,
) -> Smooth | Resampled:
    """Returns the sampling error of a score, in the way that is right for its kind.

    Args:
        score: Of any kind but "descriptive".
        value: The score of the columns.
        columns: Those that the score reads, (N, ...).
        hypothetical: What `hypothetical_error` returns. It joins the columns, if it has all that the score reads.
        group: The group of each prediction, from 0 on, (N,) int64.
        num_resamples: R.
        seed: Seed of the resamples.
    """
    n, num_groups = len(group), int(group.max()) + 1
    if score.kind in ("calibration", "resampled"):
        at_once = max(1, WEIGHTS_AT_ONCE // n)
        parts = [range(start, min(start + at_once, num_resamples)) for start in range(0, num_resamples, at_once)]
        replicates = [
            score.of(*columns.values(), weights=resample_weights(num_groups, part, seed)[:, group]) for part in parts
        ]
        return Resampled(value, torch.cat(replicates), 2 if score.kind == "calibration" else 1, score.most)

    weights = torch.ones(n, dtype=torch.float64)
    if score.kind == "smooth" and columns.keys() <= hypothetical.keys():
        columns = {name: torch.cat([column, hypothetical[name].to(column)]) for name, column in columns.items()}
        weights = torch.cat([weights, weights.new_full((PARTS,), 1 / PARTS)])
    at = score.of(*columns.values(), weights=weights.requires_grad_())
    (gradient,) = torch.autograd.grad(at, weights)
    weights = weights.detach()
    gradient = gradient - weights @ gradient / weights.sum()
    moves = torch.cat([gradient.new_zeros(num_groups).index_add_(0, group, gradient[:n]), gradient[n:]])
    weights = torch.cat([weights.new_ones(num_groups), weights[n:]])
    return Smooth(value, at.item(), moves, weights, n, score.kind == "proportion", score.most)


def hypothetical_error(rows: Mapping[str, Tensor], doubt: Tensor) -> dict[str, Tensor]:
    """Returns the columns of one error in parts, (E,), which is at row i with probability doubt_i / sum_j doubt_j.

    Given an error, a row p with confidence c expects an NLL of (H[p] + c log c) / (1 - c), and a Brier score of
    sum_k p_k^2 + 1 - 2 (sum_k p_k^2 - c^2) / (1 - c).

    Args:
        rows: Columns of a way, (N,) each. Brier scores may be missing.
        doubt: The same for all ways, (N,) float64.
    """
    tiny = torch.finfo(torch.float32).eps
    doubt, wrong = doubt.clamp_min(tiny), (1 - rows["confidence"].double()).clamp_min(tiny)
    entropy, nll = rows["predictive_entropy"].double(), rows["nll"].double()
    # The bounds matter where a confidence near 1 was rounded.
    expected = {"nll": torch.maximum((entropy - torch.special.entr(1 - wrong)) / wrong, -wrong.log())}
    if "brier" in rows:
        squares = rows["brier"].double() - 1 + 2 * torch.exp(-nll)
        other = ((squares - (1 - wrong) ** 2) / wrong).clamp_min(0)
        expected["brier"] = squares + 1 - 2 * torch.minimum(other, wrong)
    order, levels = entropy.argsort(), (torch.arange(PARTS, dtype=torch.float64) + 0.5) / PARTS
    at = order[torch.searchsorted(doubt[order].cumsum(0), levels * doubt.sum())]
    means = {name: (doubt @ column / doubt.sum()).expand(PARTS) for name, column in expected.items()}
    return {"correct": torch.zeros(PARTS), "predictive_entropy": entropy[at], **means}


def _hall(t: float, skewness: float) -> float:
    """Returns the normal variable that a studentized one of this skewness stands for (Hall 1992)."""
    return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6


def _inverse_hall(z: float, skewness: float) -> float:
    """Returns the t that `_hall` maps to z."""
    return 3 * (float(np.cbrt(1 + skewness * (z - skewness / 6))) - 1) / skewness if abs(skewness) > 1e-6 else z


def _two_sided(z: float) -> float:
    """Returns the probability that a normal variable is as far from 0 as z."""
    return math.erfc(abs(z) / math.sqrt(2))
