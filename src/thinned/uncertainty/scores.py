"""Scores predictions, and how well an uncertainty tells errors from hits.

Each is a function of columns and of weights, None or (N,); a weight w stands for w copies of a row. Tied uncertainties
enter together, so the order of the rows does not matter. Shapes: N predictions, K classes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from thinned.uncertainty import calibration
from thinned.uncertainty.conformal import KINDS
from thinned.uncertainty.weighting import curves, interpolated, mean, totals, weights_of

Columns = Mapping[str, Tensor]  # of N predictions: (N,), or probs (N, K)


def nll(probs: Tensor, targets: Tensor) -> Tensor:
    """Returns - log p[target] in nats, (N,), bounded by the smallest normal number of the dtype.

    >>> nll(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([0, 1]))
    tensor([0.6931, 2.3026])
    """
    chosen = probs.gather(-1, targets[:, None]).squeeze(-1)
    return -chosen.clamp_min(torch.finfo(probs.dtype).tiny).log()


def brier(probs: Tensor, targets: Tensor) -> Tensor:
    """Returns sum_k (p_k - [k = target])^2, (N,), in [0, 2] (Brier 1950).

    >>> brier(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([0, 1]))  # 2 * 0.5^2 and 2 * 0.9^2
    tensor([0.5000, 1.6200])
    """
    return (probs - F.one_hot(targets, probs.shape[-1])).square().sum(-1)


def entropy(probs: Tensor) -> Tensor:
    """Returns H[p] = - sum_k p_k log p_k over the last dimension, in nats, with 0 log 0 = 0.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    return torch.special.entr(probs).sum(-1)


def prediction_columns(probs: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
    """Returns columns (N,) computed from distributions (N, K) and, unless None, from targets (N,).

    The rank is 1 if the target is the most probable class.
    """
    confidence, prediction = probs.max(-1)
    columns = {"prediction": prediction, "confidence": confidence.clamp_max(1), "predictive_entropy": entropy(probs)}
    if targets is not None:
        rank = 1 + (probs > probs.gather(-1, targets[:, None])).sum(-1)
        columns |= {"nll": nll(probs, targets), "correct": prediction == targets, "rank": rank}
    return columns


def recall_per_class(
    target: Tensor, correct: Tensor, num_classes: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the weighted recall of each class, and the unweighted number of its examples.

    Targets and `correct` are (N,). Recalls are (K,) float64, NaN for a class without weight, and numbers (K,) int64.

    >>> recall_per_class(torch.tensor([0, 0, 1]), torch.tensor([True, False, True]), 2)
    (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([2, 1]))
    """
    w, target = weights_of(target, weights), target.long()
    recall = totals(w * correct.double(), target, num_classes) / totals(w, target, num_classes)
    return recall, torch.bincount(target, minlength=num_classes)


def balanced_accuracy(target: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean of the recalls of all classes that have weight (Brodersen et al. 2010), ().

    >>> balanced_accuracy(torch.tensor([0, 0, 0, 2]), torch.tensor([True, True, True, False])).item()
    0.5
    """
    num_classes = int(target.max()) + 1 if len(target) else 0
    return recall_per_class(target, correct, num_classes, weights)[0].nanmean()


def auroc_error(correct: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the probability that an error is more uncertain than a hit, a tie counting half, ().

    It is NaN if all predictions are errors, or none is.

    >>> auroc_error(torch.tensor([True, False, True]), torch.tensor([0.1, 0.2, 0.2])).item()
    0.75
    """
    weight, errors = curves(uncertainty, 1 - correct.double(), weights)
    hits = weight - errors
    return torch.trapezoid(hits, errors) / (hits[-1] * errors[-1])


def aurc(errors: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the area under the risk-coverage curve (Geifman and El-Yaniv 2017), (); 0 is perfect.

    It is the mean, over n = 1 .. N, of the risk (the mean error) among the n least uncertain predictions, averaged over
    all orders of tied ones. Unlike other scores it depends on the scale of the weights, as it does on N. `errors` (N,)
    are bool, or any loss; `uncertainty` (N,) should be higher for larger ones.

    >>> aurc(torch.tensor([False, True]), torch.tensor([0.1, 0.1])).item()  # mean of (0 + 1/2) / 2 and (1 + 1/2) / 2
    0.5
    """
    weight, total = curves(uncertainty, errors, weights)
    # Of m tied rows with mean risk q after W rows with total T: sum_i (T + i q) / (W + i), i = 1 .. m
    # = m q + (T - W q) (H(W + m) - H(W)), with the harmonic numbers H(x) = digamma(x + 1) + constant.
    m, mq = weight.diff(), total.diff()
    q = mq / m.clamp_min(torch.finfo(m.dtype).tiny)
    return (mq + (total[:-1] - weight[:-1] * q) * torch.digamma(weight + 1).diff()).sum() / weight[-1]


def augrc(errors: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the area under the generalized risk-coverage curve (Traub et al. 2024), (); 0 is perfect.

    The generalized risk is the sum of errors among the least uncertain predictions, divided by N: the probability of a
    silent failure. Its curve is linear between coverages, so that for errors of 0 or 1
    AUGRC = (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 with accuracy a. Arguments are those of `aurc`.

    >>> augrc(torch.tensor([False, True]), torch.tensor([0.1, 0.2])).item()
    0.125
    """
    weight, total = curves(uncertainty, errors, weights)
    return torch.trapezoid(total, weight) / weight[-1] ** 2


def coverage_at_5_risk(errors: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the largest coverage with a risk of at most 5 % (Geifman and El-Yaniv 2017), (); 0 if there is none.

    Tied predictions pass a threshold on their uncertainty together. Arguments are those of `aurc`.

    >>> coverage_at_5_risk(torch.tensor([False, True, False]), torch.tensor([0.1, 0.2, 0.3])).item()
    0.3333...
    """
    weight, total = curves(uncertainty, errors, weights)
    low = 20 * total <= weight * (1 + 1e-9)  # sums of fractions are rounded
    return (weight * low).amax() / weight[-1]


def risk_at_80_coverage(errors: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the risk of the least uncertain 80 % of predictions, ().

    The prediction on the border counts by its share, and tied ones by their mean. Arguments are those of `aurc`.

    >>> risk_at_80_coverage(torch.tensor([0, 0, 0, 0, 1]), torch.arange(5)).item()  # the last one is left out
    0.0
    """
    weight, total = curves(uncertainty, errors, weights)
    at = 0.8 * weight[-1:]
    return (interpolated(at, weight, total) / at)[0]


@dataclass(frozen=True)
class Score:
    """Defines a number that says how good N predictions are.

    Args:
        label: For tables, with the better direction and the unit.
        of: Maps the columns, (N,) each or probs (N, K), and `weights`, None or (N,), to () float64; NaN if undefined.
        columns: Names of the columns.
        kind: Decides how its interval is made. A proportion is a mean of a bool column, or of such means. A smooth
            score has a gradient in the weights. A calibration error is a sum of absolute values, which noise makes
            larger. Other scores are resampled, or descriptive (no interval) if that would not help.
        headline: Whether it is among the few that are shown first.
        most: The largest possible value, at which an interval ends.
        beside: A column that has to exist too: only tokens have a `position`, and only examples a `brier`.
    """

    label: str
    of: Callable[..., Tensor]
    columns: tuple[str, ...]
    kind: Literal["proportion", "smooth", "calibration", "resampled", "descriptive"] = "smooth"
    headline: bool = False
    most: float = math.inf
    beside: str | None = None

    @property
    def resampled(self) -> bool:
        """True if its interval is computed by resampling."""
        return self.kind in ("calibration", "resampled")

    @property
    def needs(self) -> set[str]:
        """Names of all columns that the score needs."""
        return {*self.columns, *filter(None, [self.beside])}


def of_correct(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turns a score of errors into one of `correct`, which is true for the other predictions."""
    return lambda correct, uncertainty, weights=None: score(1 - correct.double(), uncertainty, weights)


def top_5(rank: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns how often the target is among the five most probable classes, ()."""
    return mean(rank <= 5, weights)


def perplexity(nll: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns e to the power of the mean NLL, ()."""
    return mean(nll, weights).exp()


def bits_per_byte(nll: Tensor, bytes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the NLL of tokens in bits, divided by the number of bytes that they stand for, ()."""
    return mean(nll, weights) / mean(bytes, weights) / math.log(2)


ERRORS, CONFIDENCE, CLASSES = ("correct", "predictive_entropy"), ("confidence", "correct"), ("target", "probs")
# By name, as in metrics.json and metric keys, and in the order of tables. An entry here adds a score.
SCORES = {
    "accuracy": Score("accuracy ↑", mean, ("correct",), "proportion", headline=True),
    "balanced_accuracy": Score(
        "balanced accuracy ↑", balanced_accuracy, ("target", "correct"), "proportion", beside="brier"
    ),
    "top_5": Score("top-5 accuracy ↑", top_5, ("rank",), "proportion", beside="position"),
    "nll": Score("NLL, nats ↓", mean, ("nll",), headline=True),
    "perplexity": Score("perplexity ↓", perplexity, ("nll",), beside="position"),
    "bits_per_byte": Score("bits per byte ↓", bits_per_byte, ("nll", "bytes"), headline=True),
    "brier": Score("Brier ↓", mean, ("brier",), headline=True),
    "brier_miscalibration": Score(
        "Brier: miscalibration ↓", calibration.brier_miscalibration, ("target", "probs", "brier"), "descriptive"
    ),
    "brier_discrimination": Score("Brier: discrimination ↑", calibration.brier_discrimination, CLASSES, "descriptive"),
    "brier_uncertainty": Score("Brier: base rates", calibration.brier_uncertainty, CLASSES),
    "ece": Score("ECE ↓", calibration.ece, CONFIDENCE, "calibration", headline=True),
    "adaptive_ece": Score("adaptive ECE ↓", calibration.adaptive_ece, CONFIDENCE, "calibration"),
    "smooth_ece": Score("smooth ECE ↓", calibration.smooth_ece, CONFIDENCE, "calibration"),
    "auroc_error": Score("AUROC of errors ↑", auroc_error, ERRORS, headline=True, most=1),
    "aurc": Score("AURC ↓", of_correct(aurc), ERRORS, headline=True, most=1),
    "augrc": Score("AUGRC ↓", of_correct(augrc), ERRORS, most=1),
    "coverage_at_5_risk": Score("coverage at 5 % risk ↑", of_correct(coverage_at_5_risk), ERRORS, "resampled"),
    "risk_at_80_coverage": Score("risk at 80 % coverage ↓", of_correct(risk_at_80_coverage), ERRORS, "resampled"),
    **{f"{k}_coverage": Score(f"coverage of {k.upper()}", mean, (f"{k}_covered",), "proportion") for k in KINDS},
    **{f"{k}_size": Score(f"mean size of {k.upper()} ↓", mean, (f"{k}_size",)) for k in KINDS},
}


def scores(rows: Columns) -> dict[str, float]:
    """Returns all scores for which there are columns, by name."""
    return {
        name: score.of(*(rows[column] for column in score.columns), weights=None).item()
        for name, score in SCORES.items()
        if score.needs <= rows.keys()
    }


def classification_scores(probs: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns the scores of predicted distributions (N, K) with targets (N,), by name.

    Raises:
        ValueError: The shapes do not match.

    >>> scored = classification_scores(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
    >>> scored["accuracy"], round(scored["nll"], 4)  # -(log 0.9 + log 0.4) / 2
    (0.5, 0.5108)
    """
    if probs.dim() != 2 or targets.shape != probs.shape[:1]:
        raise ValueError(f"Expected probs (N, K) and targets (N,), but got {(*probs.shape,)} and {(*targets.shape,)}")
    return scores(prediction_columns(probs, targets) | {"target": targets, "brier": brier(probs, targets)})
