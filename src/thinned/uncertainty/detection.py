"""Scores how well uncertainty tells foreign examples, of no known class or of other text, from known ones.

Foreign examples are the positives of all scores, as in Hendrycks, Mazeika and Dietterich (2019, section 4.1). The
uncertainty of an example is one minus its maximum probability (Hendrycks and Gimpel 2017), its predictive entropy or,
for sampled networks, its mutual information. For a sequence, each is the mean over its tokens.

A net that rejects uncertain examples should reject both foreign ones and its own errors (selective classification with
out-of-distribution data, SCOD: Xia and Bouganis 2022). Then all foreign examples and the errors among known ones are
failures. Their scores are AUROC and the area under the risk-coverage curve (Jaeger et al. 2023).

Shapes: N examples, known and foreign ones. The share of foreign ones is a choice, not a sample, so weights keep the
totals of both kinds as in the data.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from thinned.uncertainty.intervals import Difference, Interval, score_intervals
from thinned.uncertainty.scores import Score, aurc, auroc_error
from thinned.uncertainty.weighting import curves, weights_of


def aupr(known: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the area under the precision-recall curve of foreign examples, as average precision, ().

    >>> aupr(torch.tensor([True, False, True, False]), torch.tensor([0.1, 0.2, 0.3, 0.4])).item()  # (1 + 2 / 3) / 2
    0.8333...
    """
    weight, foreign = curves(uncertainty, ~known, balanced(known, weights))
    flagged, hits = (curve[-1] - curve[:-1] for curve in (weight, foreign))
    precision = hits / flagged.clamp_min(torch.finfo(flagged.dtype).tiny)
    return precision @ foreign.diff() / foreign[-1]


def fpr_at_95_tpr(known: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the share of known examples at or above the threshold that 95 % of the foreign ones reach, ().

    >>> fpr_at_95_tpr(torch.tensor([True, False, True, False]), torch.tensor([0.1, 0.2, 0.3, 0.4])).item()
    0.5
    """
    weight, foreign = curves(uncertainty, ~known, weights)
    flagged, hits = (curve[-1] - curve for curve in (weight, foreign))
    enough = hits >= 0.95 * foreign[-1] * (1 - 1e-9)  # sums of fractions are rounded
    return torch.where(enough, flagged - hits, math.inf).amin() / (weight[-1] - foreign[-1])


def balanced(known: Tensor, weights: Tensor | None) -> Tensor:
    """Returns weights that sum to the number of known and of foreign examples, (N,) float64."""
    w = weights_of(known, weights)
    return sum((w * kind * (kind.sum() / (w @ kind)) for kind in (known.double(), (~known).double())), 0 * w)


def scod_auroc(known: Tensor, correct: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the probability that a failure (a foreign example or an error) is more uncertain than a success, ()."""
    return auroc_error(known & correct, uncertainty, balanced(known, weights))


def scod_aurc(known: Tensor, correct: Tensor, uncertainty: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the area under the risk-coverage curve of failures, ()."""
    return aurc(~(known & correct), uncertainty, balanced(known, weights))


def _scores_of(measure: str, label: str) -> dict[str, Score]:
    """Returns all detection scores that are based on one measure of uncertainty, by name."""
    two, three = ("known", f"uncertainty_{measure}"), ("known", "correct", f"uncertainty_{measure}")
    return {
        f"foreign_auroc_{measure}": Score(f"AUROC, {label} ↑", auroc_error, two, most=1),
        f"foreign_aupr_{measure}": Score(f"AUPR, {label} ↑", aupr, two, most=1),
        f"foreign_fpr95_{measure}": Score(f"FPR at 95 % TPR, {label} ↓", fpr_at_95_tpr, two, "resampled", most=1),
        f"scod_auroc_{measure}": Score(f"SCOD: AUROC, {label} ↑", scod_auroc, three, most=1),
        f"scod_aurc_{measure}": Score(f"SCOD: AURC, {label} ↓", scod_aurc, three, most=1),
    }


MEASURES = {
    "confidence": "maximum probability",
    "predictive_entropy": "entropy",
    "mutual_information": "mutual information",
}
# By their names in `evaluation.json`.
DETECTION = {name: score for key, label in MEASURES.items() for name, score in _scores_of(key, label).items()}


def detection_intervals(
    known: Mapping[str, Mapping[str, Tensor]],
    foreign: Mapping[str, Mapping[str, Tensor]],
    baseline: str,
    groups: tuple[Tensor, Tensor] | None = None,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Difference]]]:
    """Returns intervals and differences of the scores in `DETECTION`, as `score_intervals` does.

    Args:
        known: Columns of known examples by way: measures, and `correct`.
        foreign: Measures of foreign examples by way.
        baseline: The way with which the others are compared.
        groups: Groups of known and of foreign examples, as in `score_intervals`, if they depend on each other.
    """
    ways = {}
    for way, columns in known.items():
        joined = {key: torch.cat([columns[key], foreign[way][key]]) for key in MEASURES if key in columns}
        joined |= {f"uncertainty_{key}": -x if key == "confidence" else x for key, x in joined.items()}
        joined["known"] = torch.arange(len(joined["confidence"])) < len(columns["confidence"])
        if "correct" in columns:
            others = columns["correct"].new_zeros(len(foreign[way]["confidence"]))
            joined["correct"] = torch.cat([columns["correct"], others])
        ways[way] = joined
    joint = None if groups is None else torch.cat([groups[0], groups[0].max() + 1 + groups[1]])
    return score_intervals(ways, baseline, joint, table=DETECTION)
