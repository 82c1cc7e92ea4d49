"""Split conformal prediction: sets of classes that contain the true one with a chosen probability.

Each calibration example gives a score, of its true class. The set of another example holds the classes whose scores are
at most a quantile of these. If the examples are exchangeable and the net was not fitted on them, sets contain the true
class with at least the chosen probability, however wrong the predicted distributions are. Without ties of scores, the
excess is at most 1 / (n + 1) (Vovk et al. 2005; Lei et al. 2018). This is an average over all classes and examples.

The score of the class at rank r of a distribution p, with u uniform in [0, 1), one for each example:

- thr: 1 - p_y (Sadinle, Lei and Wasserman 2019).
- aps: The sum of the p_k ranked before it, plus u p_y (Romano, Sesia and Candès 2020).
- raps: aps plus λ max(0, r - k_reg) (Angelopoulos et al. 2021).

A set may be empty. Shapes: N examples, K classes.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from thinned.models import net
from thinned.models.dropout import derive_seed

Kind = Literal["thr", "aps", "raps"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Fixed, because calibration examples may not choose them. The paper's Algorithm 2 gives k_reg = 1 if the most probable
# class is right as often as sets should be, which is common with few classes. Its grid for λ runs from 0.001 to 0.5.
LAMBDA, K_REG = 0.1, 1


def uniforms(seed: int, index: Tensor) -> Tensor:
    """Returns a number in [0, 1) for each example, (N,) float64, which depends on the seed and its index alone.

    They are the outputs of SplitMix64 (Steele, Lea and Flood 2014) at the places `index`, (N,) of integers.
    """
    x = derive_seed(seed, "conformal") + index.long() * (0x9E3779B97F4A7C15 - 2**64)  # int64 wraps like uint64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        x = (x ^ _shifted(x, shift)) * factor
    return _shifted(x, 11).double() / 2**53


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Returns int64 numbers shifted to the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def conformity(probs: Tensor, targets: Tensor, u: Tensor) -> dict[Kind, Tensor]:
    """Returns the score of each true class, (N,) float64: the higher, the less the class conforms.

    Args:
        probs: (N, K), which sum to 1 over K.
        targets: True classes, (N,).
        u: What `uniforms` returns for the examples, (N,).

    >>> scores = conformity(torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([2]), torch.tensor([0.5]))
    >>> {kind: round(score.item(), 4) for kind, score in scores.items()}
    {'thr': 0.7, 'aps': 0.75, 'raps': 0.85}
    """
    return {
        kind: torch.cat([s.gather(-1, targets[rows, None])[:, 0] for rows, s in _scores(probs, u, kind)])
        for kind in KINDS
    }


def set_members(probs: Tensor, u: Tensor, kind: Kind, threshold: float) -> Tensor:
    """Returns which classes each set contains, (N, K) bool: those with a score of at most the threshold.

    >>> set_members(torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([0.5]), "aps", 0.8)
    tensor([[False,  True,  True]])
    """
    return torch.cat([scores <= threshold for _, scores in _scores(probs, u, kind)])


def _scores(probs: Tensor, u: Tensor, kind: Kind) -> Iterator[tuple[slice, Tensor]]:
    """Yields a few rows at a time and the scores of all their classes, (n, K) float64."""
    at_once = max(1, net.LOGITS_AT_ONCE // probs.shape[-1])
    for start in range(0, max(1, len(probs)), at_once):
        rows = slice(start, start + at_once)
        p = probs[rows].double()
        if kind == "thr":
            yield rows, 1 - p
            continue
        ranked, order = p.sort(dim=-1, descending=True, stable=True)  # of equal classes the first one comes first
        # Summed from the smallest on: all classes of probability 0 have a score of exactly 1.
        rest = ranked.flip(-1).cumsum(-1).flip(-1)  # the sum of each class and all after it
        scores = 1 - (rest - u[rows, None] * ranked) / rest[:, :1]
        if kind == "raps":
            ranks = torch.arange(1, 1 + p.shape[-1], dtype=p.dtype, device=p.device)
            scores += LAMBDA * (ranks - K_REG).clamp_min(0)
        yield rows, torch.empty_like(scores).scatter_(-1, order, scores)


def threshold(scores: Tensor, coverage: float) -> float:
    """Returns the ceil((n + 1) coverage)-th smallest of n calibration scores.

    Args:
        scores: Scores of the true classes of the calibration examples, (n,).
        coverage: With at least this probability, sets contain the true class.

    Raises:
        ValueError: If there are fewer than coverage / (1 - coverage) examples.

    >>> threshold(torch.arange(1, 20), 0.9)
    18.0
    """
    if not 0 < coverage < 1:
        raise ValueError(f"Expected a coverage above 0 and below 1, but got {coverage}")
    n, exact = len(scores), Fraction(str(coverage))  # in floats, 100 * 0.55 is above 55
    rank = math.ceil((n + 1) * exact)
    if rank > n:
        raise ValueError(
            f"Expected at least {math.ceil(exact / (1 - exact))} calibration examples for coverage {coverage}, but got "
            f"{n} (at most coverage {n}/{n + 1} is possible)"
        )
    return float(scores.kthvalue(rank).values)


def absent_classes(targets: Tensor, num_classes: int) -> list[int]:
    """Returns the classes without a calibration example: of how often sets contain them, nothing is known.

    >>> absent_classes(torch.tensor([0, 2, 2]), 4)
    [1, 3]
    """
    return (torch.bincount(targets, minlength=num_classes) == 0).nonzero()[:, 0].tolist()
