"""Estimates scores with their sampling errors, to make intervals and to compare ways.

A proportion has Wilson's interval (1927). A smooth score is nearly linear in the weights of its examples, so its
variance is that of its gradient (the infinitesimal jackknife, Efron 1982, chapter 6; for AUROC, DeLong et al. 1988). If
few examples carry a score, such as the errors of an accurate net, two corrections keep its interval honest. Hall's
transformation (1992, J. R. Stat. Soc. B 54) corrects for skewness. And one hypothetical error joins the examples, with
the scores that the probabilities expect of it: data without an error do not promise that there is none. Two ways are
compared on the same examples and the same hypothetical error.

A score without a gradient is resampled. Its interval is normal, minus the bias that resampling shows. For a calibration
error it is an interval of the square, to which noise adds its variance. In a difference the biases cancel. Resamples in
which a score is undefined are left out.

Shapes: N predictions, G independent groups of them, E parts of the hypothetical error, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from thinned.models.dropout import derive_seed
from thinned.uncertainty.scores import Columns, Score
from thinned.uncertainty.weighting import totals

Z = 1.959964  # 95 % of a normal variable are in [-Z, Z]
WEIGHTS_AT_ONCE = 2**20  # of float64
HYPOTHETICAL = {"confidence", "predictive_entropy", "nll", "brier"}  # the columns that make the hypothetical error
EMPTY = torch.empty(0)
PARTS = 16  # of the hypothetical error, which differ in uncertainty
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
    """Returns the share of rows in which a bool column is true, and Wilson's 95 % interval.

    The column is (N,), and `rows` are the indices of those that count. Rows of one block depend on each other, if
    `blocks` (N,) are given. The interval is then that of as many independent rows as give the share the same variance.

    >>> share_interval(torch.tensor([True, False, True]), torch.tensor([0, 1]))[0]
    0.5
    """
    hits, n = column[rows].double(), float(len(rows))
    share = hits.mean().item()
    if blocks is not None:
        variance = blocks[rows].bincount(hits - share).square().sum().item() / n**2
        n = share * (1 - share) / variance if variance > 1e-12 else len(set(blocks[rows].tolist()))
    return share, *wilson(share * n, n)


def resample_weights(num_groups: int, resamples: range, seed: int = 0) -> Tensor:
    """Returns how often each group is in each bootstrap resample, (R, G) uint8: Poisson variables of mean 1.

    They depend on (seed, resample, group) alone, so ways and runs on the same examples are resampled alike.
    """
    weights = np.empty((len(resamples), num_groups), np.uint8)
    for row, resample in zip(weights, resamples, strict=True):
        words = np.random.SFC64(derive_seed(seed, "bootstrap", resample)).random_raw(-(-num_groups // 4))
        np.take(POISSON, words.view(np.uint16)[:num_groups], out=row)
    return torch.from_numpy(weights)


@dataclass(frozen=True)
class Estimate:
    """Holds a score with its sampling error.

    Attributes:
        score: The score that is estimated.
        value: Its value on the predictions.
        n: N.
        why: Why there is no interval, in a few words; None if there is one.
        at: Its value with the hypothetical error.
        moves: For a smooth score, its gradient in the weights of groups and of parts of the error, (G + E,); for a
            resampled one, its values, (R,).
        weights: 1 for groups, less for parts, (G + E,). In a proportion, the error has no parts.
    """

    score: Score
    value: float
    n: int
    why: str | None = None
    at: float = math.nan
    moves: Tensor = EMPTY
    weights: Tensor = EMPTY

    @classmethod
    def mean(cls, runs: "Sequence[Estimate]") -> "Estimate":
        """Returns the mean of a score over runs on the same examples; undefined if it is undefined for one run."""
        value, why = fmean(run.value for run in runs), next((run.why for run in runs if run.why), None)
        if why is not None:
            return cls(runs[0].score, value, runs[0].n, why)
        at, moves = fmean(run.at for run in runs), torch.stack([run.moves for run in runs]).mean(0)
        return replace(runs[0], value=value, at=at, moves=moves)

    def bounds(self) -> tuple[float, float]:
        """Returns the 95 % interval: Wilson's for a proportion, normal for a resampled score, else Hall's."""
        if self.score.resampled:
            power = 2 if self.score.kind == "calibration" else 1  # the one that is unbiased
            powers = replace(self, moves=self.moves**power)
            centre, error = 2 * self.value**power - float(powers.moves.nanmean()), powers._error_and_skewness()[0]
            low, high = (max(0.0, centre + z * error) ** (1 / power) for z in (-Z, Z))
            return min(low, self.score.most), min(high, self.score.most)
        error, skewness = self._error_and_skewness()
        if self.score.kind == "proportion":
            groups = len(self.moves)
            spread = self.value * (1 - self.value) * groups / (groups - 1)
            # If all are right, the spread is 0, but rounding may leave an error.
            n_effective = spread / error**2 if spread > 1e-9 and error > 0 else groups
            return wilson(self.value * n_effective, n_effective)
        low, high = (self.at - error * _inverse_hall(z, skewness) for z in (Z, -Z))
        return max(0.0, min(low, self.value)), min(self.score.most, max(high, self.value))

    def above(self, other: "Estimate") -> tuple[float, float, float]:
        """Returns the 95 % interval of the difference to another way, and the p-value of no difference."""
        value, moves, weights = self.value - other.value, self.moves - other.moves, self.weights
        at = value if self.score.resampled else self.at - other.at
        if self.score.kind == "proportion":  # adds half an example that only one way has right, for each
            moves = torch.cat([moves, moves.new_tensor([1, -1]) / self.n])
            weights = torch.cat([weights, weights.new_full((2,), 0.5)])
        error, skewness = replace(self, moves=moves, weights=weights)._error_and_skewness()
        if error == 0:
            return value, value, float(value == 0)
        # The skewness of a few differences is itself noise: it may widen an interval, but not move it.
        skews = (0.0, skewness if self.score.kind == "smooth" else 0.0)
        low = min(at - error * _inverse_hall(Z, skew) for skew in skews)
        high = max(at - error * _inverse_hall(-Z, skew) for skew in skews)
        p = max(math.erfc(abs(_hall(at / error, skew)) / math.sqrt(2)) for skew in skews)
        return min(low, value), max(high, value), p

    def _error_and_skewness(self) -> tuple[float, float]:
        if self.score.resampled:
            return float(self.moves[~self.moves.isnan()].std()), 0.0
        square, cube = (float(self.weights @ self.moves**power) for power in (2, 3))
        n = float(self.weights.sum())
        return math.sqrt(square * n / (n - 1)), cube / square**1.5 if square > 0 else 0.0


def estimated(score: Score, columns: Columns, hypothetical: Columns, group: Tensor, num_resamples: int) -> Estimate:
    """Returns a score of columns (N, ...) with its sampling error.

    `hypothetical` is the result of `hypothetical_error`: it joins the columns if it has all that the score reads.
    `group` is the group of each prediction, from 0 on, (N,) int64.
    """
    n, num_groups = len(group), int(group.max()) + 1
    estimate = Estimate(score, score.of(*columns.values(), weights=None).item(), n)
    if math.isnan(estimate.value):
        return replace(estimate, why=why_undefined(columns))
    if score.kind == "descriptive":
        return replace(estimate, why="it fits noise, which resampling does not show")
    if score.resampled:
        of_resamples = torch.vmap(lambda w: score.of(*columns.values(), weights=w[group]))
        at_once = max(8, WEIGHTS_AT_ONCE // n)
        parts = (range(start, min(start + at_once, num_resamples)) for start in range(0, num_resamples, at_once))
        values = [of_resamples(resample_weights(num_groups, part)) for part in parts]
        return replace(estimate, moves=torch.cat(values))
    weights = torch.ones(n, dtype=torch.float64)
    if score.kind == "smooth" and columns.keys() <= hypothetical.keys():
        columns = {name: torch.cat([column, hypothetical[name].to(column)]) for name, column in columns.items()}
        weights = torch.cat([weights, weights.new_full((PARTS,), 1 / PARTS)])
    at = score.of(*columns.values(), weights=weights.requires_grad_())
    (gradient,) = torch.autograd.grad(at, weights)
    weights = weights.detach()
    gradient = gradient - weights @ gradient / weights.sum()
    moves = torch.cat([totals(gradient[:n], group, num_groups), gradient[n:]])
    return replace(estimate, at=at.item(), moves=moves, weights=torch.cat([weights.new_ones(num_groups), weights[n:]]))


def why_undefined(columns: Columns) -> str:
    """Says in a few words why a score of these columns is NaN.

    >>> why_undefined({"correct": torch.tensor([True]), "predictive_entropy": torch.tensor([0.1])})
    'no prediction is wrong'
    """
    correct = columns.get("correct")
    if correct is not None and correct.all() == correct.any():
        return "no prediction is wrong" if correct.all() else "no prediction is right"
    return "the targets have no bytes" if "bytes" in columns else "a column is not a number"


def hypothetical_error(rows: Columns, doubt: Tensor) -> dict[str, Tensor]:
    """Returns the columns of one error in E parts, (E,): it is at row i with probability doubt_i / sum_j doubt_j.

    Given an error, a row p with confidence c expects an NLL of (H[p] + c log c) / (1 - c), and a Brier score of
    sum_k p_k^2 + 1 - 2 (sum_k p_k^2 - c^2) / (1 - c). Rows are columns (N,), and the doubt (N,) is that of all ways.
    """
    tiny = torch.finfo(torch.float32).eps
    doubt, wrong = doubt.clamp_min(tiny), (1 - rows["confidence"].double()).clamp_min(tiny)
    entropy, nll = rows["predictive_entropy"].double(), rows["nll"].double()
    # The bounds matter if a confidence near 1 was rounded.
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
    """Returns the normal variable for a studentized one of this skewness (Hall 1992)."""
    return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6


def _inverse_hall(z: float, skewness: float) -> float:
    return 3 * (float(np.cbrt(1 + skewness * (z - skewness / 6))) - 1) / skewness if abs(skewness) > 1e-6 else z
