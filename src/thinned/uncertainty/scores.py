"""Scores of predicted distributions, and of how well an uncertainty tells errors from hits.

Shapes: N examples, K classes.
"""

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from thinned.uncertainty.statistics import entropy

ECE_BINS = 15


def nll(probs: Tensor, targets: Tensor) -> Tensor:
    """(N,): - log p[target], in nats, bounded by the smallest normal number of the dtype."""
    chosen = probs.gather(-1, targets[:, None]).squeeze(-1)
    return -chosen.clamp_min(torch.finfo(probs.dtype).tiny).log()


def brier(probs: Tensor, targets: Tensor) -> Tensor:
    """(N,): sum_k (p_k - [k = target])^2, in [0, 2] (Brier 1950)."""
    return (probs - torch.nn.functional.one_hot(targets, probs.shape[-1])).square().sum(-1)


def ece(confidence: Tensor, correct: Tensor) -> Tensor:
    """Expected calibration error of a confidence, 15 equal bins (Naeini et al. 2015; Guo et al. 2017)."""
    return binary_calibration_error(below_one(confidence), correct.long(), ECE_BINS)


def below_one(probs: Tensor) -> Tensor:
    """Probabilities with 1 lowered by one step: torchmetrics puts a confidence of exactly 1 in a bin of its own."""
    return probs.clamp_max(1 - torch.finfo(probs.dtype).eps / 2)


def aurc(errors: Tensor, uncertainty: Tensor) -> Tensor:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017).

    The mean, over n = 1 .. N, of the error rate among the n least uncertain examples. 0 is perfect; ties count in
    the order given.
    """
    risk = errors[uncertainty.argsort(stable=True)].double().cumsum(0)
    return (risk / torch.arange(1, len(risk) + 1, device=risk.device)).mean()


def scores(nll: Tensor, confidence: Tensor, correct: Tensor, uncertainty: Tensor) -> dict[str, float]:
    """Five scores of N predictions.

    Args:
        nll: (N,), of the targets, in nats.
        confidence: (N,), the highest probability.
        correct: (N,), whether the class that has it is the target.
        uncertainty: (N,), entropy of the prediction, scaled to [0, 1].

    Returns:
        accuracy; nll in nats; ece; auroc_error, the probability that an error is more uncertain than a hit (NaN where
        all or none are errors); aurc.
    """
    errors = ~correct
    both = 0 < errors.sum() < len(errors)
    uncertainty = uncertainty.clamp(0, 1)  # rounding; binary_auroc applies a sigmoid to anything outside
    return {
        "accuracy": correct.double().mean().item(),
        "nll": nll.double().mean().item(),
        "ece": ece(confidence, correct).item(),
        "auroc_error": binary_auroc(uncertainty, errors.long()).item() if both else math.nan,
        "aurc": aurc(errors, uncertainty).item(),
    }


def classification_scores(probs: Tensor, targets: Tensor) -> dict[str, float]:
    """The scores of predictions (N, K) against targets (N,), and the Brier score; see `scores`."""
    confidence, prediction = probs.max(-1)
    uncertainty = entropy(probs) / math.log(probs.shape[-1])
    return {
        **scores(nll(probs, targets), confidence, prediction == targets, uncertainty),
        "brier": brier(probs, targets).double().mean().item(),
    }
