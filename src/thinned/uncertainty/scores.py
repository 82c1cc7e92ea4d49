"""Scores of predicted distributions, and of how well an uncertainty tells errors from hits.

Shapes: N examples, K classes.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from thinned.uncertainty.per_class import balanced_accuracy

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


def auroc_error(correct: Tensor, uncertainty: Tensor) -> Tensor:
    """The probability that an error is more uncertain than a hit; NaN if all are errors, or none is."""
    if correct.all() or not correct.any():
        return torch.tensor(math.nan)
    highest = uncertainty.max().clamp_min(torch.finfo(uncertainty.dtype).tiny)
    scaled = (uncertainty / highest).clamp(0, 1)  # to anything outside, torchmetrics applies a sigmoid
    return binary_auroc(scaled, (~correct).long())


def aurc(errors: Tensor, uncertainty: Tensor) -> Tensor:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017).

    The mean, over n = 1 .. N, of the error rate among the n least uncertain examples. 0 is perfect; ties count in
    the order given.
    """
    risk = errors[uncertainty.argsort(stable=True)].double().cumsum(0)
    return (risk / torch.arange(1, len(risk) + 1, device=risk.device)).mean()


@dataclass(frozen=True)
class Score:
    """A number that says how good N predictions are.

    Args:
        label: For tables, with the better direction and the unit.
        of: Is called with the columns, (N,) each, that its parameters name.
    """

    label: str
    of: Callable[..., Tensor]


# By their names in metrics.json, in metric keys and in this order in tables. An entry here adds a score.
SCORES = {
    "accuracy": Score("accuracy ↑", lambda correct: correct.double().mean()),
    "balanced_accuracy": Score(
        "balanced accuracy ↑",
        lambda target, correct, brier: balanced_accuracy(target, correct),  # tokens have no Brier score
    ),
    "nll": Score("NLL, nats ↓", lambda nll: nll.double().mean()),
    "bits_per_byte": Score("bits per byte ↓", lambda nll, bytes: nll.double().sum() / math.log(2) / bytes.sum()),
    "brier": Score("Brier ↓", lambda brier: brier.double().mean()),
    "ece": Score("ECE ↓", ece),
    "auroc_error": Score(
        "AUROC of errors ↑", lambda correct, predictive_entropy: auroc_error(correct, predictive_entropy)
    ),
    "aurc": Score("AURC ↓", lambda correct, predictive_entropy: aurc(~correct, predictive_entropy)),
}


def scores(rows: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Returns all scores for which there are columns, with or without the prefix before their names."""
    values = {}
    for name, score in SCORES.items():
        columns = [rows.get(prefix + key, rows.get(key)) for key in inspect.signature(score.of).parameters]
        if not any(column is None for column in columns):
            values[name] = score.of(*columns).item()
    return values
