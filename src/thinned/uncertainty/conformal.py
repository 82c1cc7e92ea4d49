"""Predicts sets of classes that contain the true one with a chosen probability, by split conformal prediction.

Each calibration example gives a score, that of its true class. The set of another example holds the classes with
scores of at most a quantile of these. If the examples are exchangeable and the net was not fitted on them, sets contain
the true class with at least the chosen probability, however wrong the predicted distributions are. Without ties, the
excess is at most 1 / (n + 1) (Vovk et al. 2005; Lei et al. 2018). This is an average over all classes and examples.

The score of the class at rank r of a distribution p, with u uniform in [0, 1), one for each example:

- thr: 1 - p_y (Sadinle, Lei and Wasserman 2019).
- aps: The sum of the p_k ranked before it, plus u p_y (Romano, Sesia and Candès 2020).
- raps: aps plus λ max(0, r - k_reg) (Angelopoulos et al. 2021).

A set may be empty. Shapes: N examples, K classes.
"""

import math
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from thinned.models.dropout import derive_seed

Kind = Literal["thr", "aps", "raps"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Fixed, because calibration examples may not choose them. The paper's Algorithm 2 gives k_reg = 1 if the most probable
# class is right as often as sets should be, which is common with few classes. Its grid for λ runs from 0.001 to 0.5.
LAMBDA, K_REG = 0.1, 1


def uniforms(seed: int, index: Tensor) -> Tensor:
    """Returns a number in [0, 1) for each example, (N,) float64, a function of the seed and its index alone.

    They are the outputs of SplitMix64 (Steele, Lea and Flood 2014) at the places `index`, (N,) of integers.
    """
    places = index.cpu().numpy().astype(np.uint64)
    x = np.uint64(derive_seed(seed, "conformal")) + places * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy((x >> np.uint64(11)) / 2**53).to(index.device)


def class_scores(probs: Tensor, u: Tensor) -> dict[Kind, Tensor]:
    """Returns the scores of all classes by kind, (N, K) float64: the higher, the less a class conforms.

    A set contains those with a score of at most the threshold. `u` is what `uniforms` returns for the examples, (N,).

    >>> scores = class_scores(torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([0.5]))
    >>> scores["aps"]  # 0.9 + 0.1 / 2, 0.6 / 2 and 0.6 + 0.3 / 2
    tensor([[0.9500, 0.3000, 0.7500]], dtype=torch.float64)
    """
    p = probs.double()
    ranked, order = p.sort(dim=-1, descending=True, stable=True)  # ties keep the order of the classes
    # Summed from the smallest on: all classes of probability 0 have a score of exactly 1.
    rest = ranked.flip(-1).cumsum(-1).flip(-1)  # the sum of each class and all after it
    aps = 1 - (rest - u[:, None] * ranked) / rest[:, :1]
    ranks = torch.arange(1, 1 + p.shape[-1], dtype=p.dtype, device=p.device)
    raps = aps + LAMBDA * (ranks - K_REG).clamp_min(0)
    aps, raps = (torch.empty_like(p).scatter_(-1, order, scores) for scores in (aps, raps))
    return {"thr": 1 - p, "aps": aps, "raps": raps}


def conformity(probs: Tensor, targets: Tensor, u: Tensor) -> dict[Kind, Tensor]:
    """Returns the score of each true class, (N,) float64, by kind.

    >>> scores = conformity(torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([2]), torch.tensor([0.5]))
    >>> {kind: round(score.item(), 4) for kind, score in scores.items()}
    {'thr': 0.7, 'aps': 0.75, 'raps': 0.85}
    """
    return {kind: scores.gather(-1, targets[:, None])[:, 0] for kind, scores in class_scores(probs, u).items()}


def threshold(scores: Tensor, coverage: float) -> float:
    """Returns the ceil((n + 1) coverage)-th smallest of n calibration scores, (n,).

    Sets then contain the true class with at least the probability `coverage`, in (0, 1). Raises a ValueError for fewer
    than coverage / (1 - coverage) scores.

    >>> threshold(torch.arange(1, 20), 0.9)
    18.0
    """
    n, exact = len(scores), Fraction(str(coverage))  # in floats, 100 * 0.55 is above 55
    rank = math.ceil((n + 1) * exact)
    if rank > n:
        least, got = math.ceil(exact / (1 - exact)), f"{n} (at most coverage {n}/{n + 1} is possible)"
        raise ValueError(f"Expected at least {least} calibration examples for coverage {coverage}, but got {got}")
    return float(scores.kthvalue(rank).values)
