"""Scores of predicted distributions, and of how well an uncertainty tells errors from hits.

Shapes: N examples, K classes.
"""

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from thinned.uncertainty.statistics import entropy

ECE_BINS = 15


def nll(probs: Tensor, targets: Tensor) -> Tensor:
    """(N,): - log p[target], in nats, bounded by the smallest normal number of the dtype."""
    chosen = probs.gather(-1, targets[:, None]).squeeze(-1)
    return -chosen.clamp_min(torch.finfo(probs.dtype).tiny).log()


def brier(probs: Tensor, targets: Tensor) -> Tensor:
    """(N,): sum_k (p_k - [k = target])^2, in [0, 2] (Brier 1950)."""
    return (probs - torch.nn.functional.one_hot(targets, probs.shape[-1])).square().sum(-1)


def ece(probs: Tensor, targets: Tensor) -> Tensor:
    """Expected calibration error of the confidence, 15 equal bins (Naeini et al. 2015; Guo et al. 2017)."""
    return multiclass_calibration_error(below_one(probs), targets, probs.shape[-1], ECE_BINS)


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


def classification_scores(probs: Tensor, targets: Tensor) -> dict[str, float]:
    """Six scores of predictions (N, K) against targets (N,).

    Returns:
        accuracy; nll in nats; brier; ece; auroc_error, the probability that an error is more uncertain than a hit
        (NaN where all or none are errors); aurc. The uncertainty is the entropy of the prediction.
    """
    uncertainty = entropy(probs) / math.log(probs.shape[-1])  # in [0, 1], where binary_auroc applies no sigmoid
    errors = probs.argmax(-1) != targets
    both = 0 < errors.sum() < len(errors)
    return {
        "accuracy": 1 - errors.double().mean().item(),
        "nll": nll(probs, targets).double().mean().item(),
        "brier": brier(probs, targets).double().mean().item(),
        "ece": ece(probs, targets).item(),
        "auroc_error": binary_auroc(uncertainty.clamp(0, 1), errors.long()).item() if both else math.nan,
        "aurc": aurc(errors, uncertainty).item(),
    }
