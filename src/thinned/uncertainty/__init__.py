"""Predicts with Monte-Carlo dropout, in pure torch: sampled networks, streaming statistics, scores, choice of sites."""

from thinned.uncertainty.acting_dropout import select_sites
from thinned.uncertainty.kept_networks import KeptNetworks
from thinned.uncertainty.monte_carlo import mc_predict, mc_samples
from thinned.uncertainty.scores import augrc, aurc, classification_scores
from thinned.uncertainty.statistics import MCPrediction, MCStatistics

__all__ = [
    "KeptNetworks", "MCPrediction", "MCStatistics", "augrc", "aurc", "classification_scores", "mc_predict",
    "mc_samples", "select_sites",
]  # fmt: skip
