"""Monte-Carlo dropout in pure torch: samples, streaming statistics, scores and pictures."""

from thinned.uncertainty.monte_carlo import mc_predict, mc_samples, select_sites
from thinned.uncertainty.scores import classification_scores
from thinned.uncertainty.statistics import MCPrediction, MCStatistics

__all__ = ["MCPrediction", "MCStatistics", "classification_scores", "mc_predict", "mc_samples", "select_sites"]
