"""Sums rows under weights.

A weight w stands for w copies of its row, so the multiplicities of a bootstrap resample are weights. `torch.vmap` turns
a score, a function of weights (N,), into one of many resamples.

Shapes: N rows, G groups of rows or distinct values, Q places on a curve.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def weights_of(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the weights of rows, (N,) float64; None counts each row once."""
    return torch.ones(len(rows), dtype=torch.float64, device=rows.device) if weights is None else weights.double()


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the weighted mean of a column (N,), () float64.

    >>> mean(torch.tensor([1.0, 2.0]), torch.tensor([1, 3])).item()
    1.75
    """
    w = weights_of(values, weights)
    return w @ values.double() / w.sum()


def totals(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Adds up the rows of each group: values (N,) and groups (N,) in [0, G) give (G,)."""
    return values.new_zeros(num_groups).index_add(0, group, values)


def last_of_ties(ordered: Tensor) -> Tensor:
    """Returns the last row of each distinct value of an ordered column (N,), ascending: (G,)."""
    return torch.cat([ordered[1:] != ordered[:-1], torch.ones_like(ordered[:1], dtype=torch.bool)]).nonzero().squeeze(1)


def curves(by: Tensor, values: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the weight of the rows up to each distinct value of `by`, and their weighted sum of values, (G + 1,).

    Both begin with 0. Rows that are equal in `by` enter together, so the order of the rows does not matter.

    >>> curves(torch.tensor([3, 1, 1]), torch.tensor([5.0, 0.0, 2.0]))
    (tensor([0., 2., 3.], dtype=torch.float64), tensor([0., 2., 7.], dtype=torch.float64))
    """
    ordered, order = by.sort()
    last = last_of_ties(ordered)
    w = weights_of(by, weights)[order]
    weight, total = (F.pad(each.cumsum(0)[last], (1, 0)) for each in (w, w * values.double()[order]))
    return weight, total


def interpolated(at: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Returns the sum of values of the first rows of weight `at`, (Q,), linear between two points of `curves`.

    It is the mean over the random orders of tied rows.
    """
    above = torch.searchsorted(weight, at).clamp_max(len(weight) - 1)
    below = (above - 1).clamp_min(0)
    share = (at - weight[below]) / (weight[above] - weight[below])
    return total[below].lerp(total[above], share)
