"""Sums of rows under weights, for many resamples at once.

A weight w stands for w copies of its row, so the multiplicities of a bootstrap resample are weights. Shapes: N rows,
R resamples, r of them at a time, G groups of rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WEIGHTS_AT_ONCE = 2**18  # those in float64: few megabytes, which a processor's cache holds


@torch.no_grad()
def over_resamples(
    score: Callable[[Tensor], Tensor], weights: Tensor | None, num_rows: int, order: Tensor | None = None
) -> Tensor:
    """Applies a function of weights to those of all resamples, a few at a time.

    Args:
        score: Maps weights (r, N), float64, to (r, ...).
        weights: Non-negative, of any dtype, (N,) or (R, N). None: Each row counts once.
        num_rows: N.
        order: In which `score` wants the rows, (N,). None: As they are.

    Returns:
        (...) for weights (N,) or None, (R, ...) for weights (R, N).

    Raises:
        ValueError: The weights are not those of N rows.
    """
    weights = torch.ones(num_rows) if weights is None else weights
    if weights.shape[-1] != num_rows:
        raise ValueError(f"Expected weights of {num_rows} rows, but got {tuple(weights.shape)}")
    rows = weights if weights.dim() == 2 else weights[None]
    parts = torch.split(rows, max(1, WEIGHTS_AT_ONCE // max(1, num_rows)))
    values = torch.cat([score((p if order is None else p.index_select(1, order)).double()) for p in parts])
    return values.view(weights.shape[:-1] + values.shape[1:])


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the weighted mean of a column, () or (R,) float64.

    >>> mean(torch.tensor([1.0, 2.0]), torch.tensor([[1, 1], [0, 3]])).tolist()
    [1.5, 2.0]
    """
    values = values.double()
    return over_resamples(lambda w: w @ values / w.sum(1), weights, len(values))


def totals(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Adds up the rows of each group: values (r, N) and groups (N,) in [0, G) give (r, G)."""
    return values.new_zeros(len(values), num_groups).index_add_(1, group, values)


def last_of_ties(ordered: Tensor) -> Tensor:
    """Returns the index of the last of each run of equal values, (G,)."""
    return torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(len(ordered[:1])).bool()]).nonzero().squeeze(1)


def over_curves(
    score: Callable[[Tensor, Tensor], Tensor], by: Tensor, values: Tensor, weights: Tensor | None
) -> Tensor:
    """Applies a function of cumulated sums to those of all resamples.

    Rows are sorted once. Those that are equal in `by` enter together, so the order of the rows does not matter.

    Args:
        score: Maps the weight of the rows up to each distinct value of `by`, (r, G + 1) from 0 on, and the sum of their
            values, likewise, to (r,).
        by: What the rows are sorted by, ascending, (N,).
        values: What is summed, (N,).
        weights: As in `over_resamples`.
    """
    order = by.argsort()
    last = last_of_ties(by[order])
    from_zero = torch.cat([last.new_zeros(1), last + 1])
    values = values[order].double()

    def of(w: Tensor) -> Tensor:
        curves = w.new_empty(2, len(w), len(order) + 1)
        curves[:, :, 0] = 0
        torch.cumsum(w, 1, out=curves[0, :, 1:])
        torch.cumsum(w * values, 1, out=curves[1, :, 1:])
        return score(*(curves if len(last) == len(order) else curves.index_select(2, from_zero)))

    return over_resamples(of, weights, len(by), order)


def interpolated(at: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Returns the sum of values of the first rows whose weight is `at`, (r, Q), linear between two points of a curve.

    It is the mean over the random orders of tied rows.
    """
    above = torch.searchsorted(weight, at).clamp_max(weight.shape[1] - 1)
    below = (above - 1).clamp_min(0)
    share = (at - weight.gather(1, below)) / (weight.gather(1, above) - weight.gather(1, below))
    return total.gather(1, below).lerp(total.gather(1, above), share)
