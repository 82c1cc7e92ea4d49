"""Computes 95 % intervals of scores, and paired differences between ways to predict or between runs.

Shapes: N predictions, G independent groups of them (each its own, if none are given).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from thinned.uncertainty.estimates import HYPOTHETICAL, Estimate, estimated, hypothetical_error
from thinned.uncertainty.scores import SCORES, Columns, Score


@dataclass(frozen=True)
class Interval:
    """Holds a score with its 95 % interval.

    Attributes:
        value: The score. A calibration error may be above its interval, which is corrected for bias.
        low, high: NaN if the score is undefined, or if no interval can be trusted.
        n: Number of predictions, or of seeds.
        why: Why something is NaN, in a few words.
        runs: The score of each run if there are several; `value` is their mean.
    """

    value: float
    low: float
    high: float
    n: int
    why: str | None = None
    runs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Difference:
    """Holds how much a score is above the baseline's on the same examples, with the 95 % interval.

    Attributes:
        p: Probability of a difference at least as large if there is none, after Holm's correction for the
            number of ways. The interval is that of one difference, without correction.
        told_apart: Whether p < 0.05.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def told_apart(self) -> bool:
        return self.p < 0.05


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


@torch.inference_mode(False)  # inference mode has no gradients
@torch.enable_grad()
def score_intervals(
    ways: Mapping[str, Columns | Sequence[Columns]],
    baseline: str | None = None,
    groups: Tensor | None = None,
    num_resamples: int = 200,
    table: Mapping[str, Score] | None = None,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Difference]]]:
    """Returns the intervals by way, then by score, and likewise the differences of the other ways to the baseline.

    Args:
        ways: The columns of each way, (N, ...), by its name; or those of several runs, whose mean score is taken. The
            columns of one way at a time are in memory.
        baseline: The way with which the others are compared, if any.
        groups: The group of each prediction, (N,) int64, if predictions of a group depend on each other, as tokens do.
        num_resamples: Number of resamples, for a mean and a variance: more ways need no more.
        table: The scores by their names; None takes `SCORES`.

    Raises:
        ValueError: There are fewer than two predictions or groups, ways differ in length, or lack the baseline.

    >>> way = {"correct": torch.tensor([True] * 8 + [False] * 2), "confidence": torch.full((10,), 0.8)}
    >>> accuracy = score_intervals({"mc_dropout": way})[0]["mc_dropout"]["accuracy"]  # Wilson's interval of 8 in 10
    >>> [round(number, 3) for number in (accuracy.value, accuracy.low, accuracy.high)]
    [0.8, 0.49, 0.943]
    """
    table = SCORES if table is None else table
    if baseline is not None and baseline not in ways:
        raise ValueError(f"Expected a baseline among {list(ways)}, but got {baseline}")
    runs = {name: [way] if isinstance(way, Mapping) else list(way) for name, way in ways.items()}
    doubts = [1 - run["confidence"].double() for of_way in runs.values() for run in of_way]
    n, *others = lengths = [len(doubt) for doubt in doubts]
    if set(others) - {n}:
        raise ValueError(f"Expected ways with predictions of the same examples, but got numbers of them: {lengths}")
    group = torch.arange(n) if groups is None else torch.unique(groups, return_inverse=True)[1]
    if n == 0 or group.max() == 0:
        raise ValueError(f"Expected at least two predictions that are independent, but got {min(n, 1)}")
    doubt = torch.stack(doubts).mean(0)

    intervals: dict[str, dict[str, Interval]] = {name: {} for name in ways}
    differences: dict[str, dict[str, Difference]] = {name: {} for name in ways if baseline not in (None, name)}
    of_baseline: dict[str, Estimate] = {}
    nll_of_baseline = torch.empty(0)
    for name in sorted(ways, key=lambda name: name != baseline):
        of_runs = [_estimates(run, table, doubt, group, num_resamples) for run in runs[name]]
        nll = torch.stack([run.get("nll", run["confidence"]) for run in runs[name]])
        if name == baseline:
            nll_of_baseline = nll
        for key in of_runs[0]:
            estimate = Estimate.mean([run[key] for run in of_runs])
            values = tuple(run[key].value for run in of_runs) if len(of_runs) > 1 else ()
            low, high = (math.nan, math.nan) if estimate.why else estimate.bounds()
            intervals[name][key] = Interval(estimate.value, low, high, n, estimate.why, values)
            if name == baseline:
                of_baseline[key] = estimate
            elif key in of_baseline and not (estimate.why or of_baseline[key].why):
                same = torch.equal(nll, nll_of_baseline)
                difference = (0.0, 0.0, 1.0) if same else estimate.above(of_baseline[key])
                differences[name][key] = Difference(estimate.value - of_baseline[key].value, *difference)
    for key in table:
        family = [of_way for of_way in differences.values() if key in of_way]
        for of_way, p in zip(family, holm([of_way[key].p for of_way in family]), strict=True):
            of_way[key] = replace(of_way[key], p=p)
    return intervals, differences


def _estimates(
    way: Columns, table: Mapping[str, Score], doubt: Tensor, group: Tensor, num_resamples: int
) -> dict[str, Estimate]:
    """Returns all scores for which a way has the columns."""
    read = HYPOTHETICAL.union(*(score.needs for score in table.values())) & set(way)
    rows = {column: way[column].clone() for column in read}
    hypothetical = hypothetical_error(rows, doubt) if "nll" in rows else {}
    return {
        key: estimated(score, {c: rows[c] for c in score.columns}, hypothetical, group, num_resamples)
        for key, score in table.items()
        if score.needs <= read
    }
