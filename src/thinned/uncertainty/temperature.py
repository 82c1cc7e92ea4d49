"""Scales predicted distributions by a temperature (Guo et al. 2017), for a net or for the mean of many.

q_k = p_k^(1/T) / sum_j p_j^(1/T): T > 1 makes predictions less confident, T < 1 more, and their order stays. The
negative log-likelihood is convex in 1/T, so its minimum lies between the neighbours of the best temperature of a grid.

Shapes: N targets, K classes (for text the vocabulary V), G temperatures.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from thinned.models.net import few_rows

TEMPERATURES = tuple(2 ** (i / 4) for i in range(-12, 13))  # from 1/8 to 8, with 1
STEPS = 35  # of 1 % each between the neighbours of the best of them


def tempered(probs: Tensor, temperature: float) -> Tensor:
    """Returns distributions at a temperature, (N, K). At T = 1 they are the input itself; zeros stay zeros.

    >>> tempered(torch.tensor([[0.8, 0.2, 0.0]]), 0.5)
    tensor([[0.9412, 0.0588, 0.0000]])
    """
    if temperature == 1:
        return probs
    tempered = torch.empty_like(probs)
    for rows, log_probs in _log_probs(probs):
        tempered[rows] = torch.softmax(log_probs / temperature, dim=-1)
    return tempered


def nll_at(probs: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Returns - log q[target] of distributions (N, K) and targets (N,) at each temperature, in nats, (N, G).

    No temperature changes a probability of 0: it counts as the smallest normal number, as in `nll`.

    >>> nll_at(torch.tensor([[0.8, 0.2]]), torch.tensor([0]), [1, 0.5])
    tensor([[0.2231, 0.0606]])
    """
    dtype = torch.promote_types(probs.dtype, torch.float32)
    nll = torch.empty(len(probs), len(temperatures), dtype=dtype, device=probs.device)
    for rows, log_probs in _log_probs(probs):
        log_target = log_probs.gather(-1, targets[rows, None]).squeeze(-1)
        powers = torch.empty_like(log_probs)
        for g, temperature in enumerate(temperatures):
            # The largest power is 1, and e^-80 adds nothing to it. Subnormal numbers would cost 30 times as much.
            torch.mul(log_probs, 1 / temperature, out=powers).clamp_min_(-80).exp_()
            nll[rows, g] = powers.sum(-1).log() - log_target / temperature
    return nll.masked_fill_(nll == math.inf, -math.log(torch.finfo(dtype).tiny))


def _log_probs(probs: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields a few rows at a time and log p - max log p, (n, K)."""
    for rows in few_rows(*probs.shape):
        logs = probs[rows].to(torch.promote_types(probs.dtype, torch.float32)).log()
        yield rows, logs.sub_(logs.amax(-1, keepdim=True))


def fit_temperature(mean_nll: Callable[[Sequence[float]], Tensor]) -> float:
    """Returns the temperature with the lowest negative log-likelihood, to 0.5 %; 1 unless another one is better.

    `mean_nll` returns the mean of `nll_at` over held-out data, (G,). It is called twice.

    >>> probs, targets = torch.tensor([[0.8, 0.2]] * 10), torch.tensor([0] * 6 + [1] * 4)
    >>> round(fit_temperature(lambda temperatures: nll_at(probs, targets, temperatures).mean(0)), 1)
    3.4
    """
    nll = dict(zip(TEMPERATURES, mean_nll(TEMPERATURES).tolist(), strict=True))
    best = TEMPERATURES.index(_lowest(nll))
    low, high = TEMPERATURES[max(0, best - 1)], TEMPERATURES[min(best + 1, len(TEMPERATURES) - 1)]
    between = [low * (high / low) ** (step / STEPS) for step in range(1, STEPS)]
    return _lowest(nll | dict(zip(between, mean_nll(between).tolist(), strict=True)))


def _lowest(nll: dict[float, float]) -> float:
    """Returns the temperature with the lowest value; of equal ones, the closest to 1."""
    return min(sorted(nll, key=lambda temperature: abs(math.log(temperature))), key=lambda t: nll[t])
