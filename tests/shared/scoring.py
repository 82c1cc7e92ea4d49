"""The scores of predicted distributions, for tests to compare with."""

from torch import Tensor

from thinned.uncertainty.scores import brier, nll, scores
from thinned.uncertainty.statistics import entropy


def classification_scores(probs: Tensor, targets: Tensor) -> dict[str, float]:
    """All scores of distributions (N, K) against targets (N,)."""
    confidence, prediction = probs.max(-1)
    return scores(
        {
            "target": targets, "confidence": confidence, "correct": prediction == targets,
            "predictive_entropy": entropy(probs), "nll": nll(probs, targets), "brier": brier(probs, targets),
        }
    )  # fmt: skip
