"""A trained network, measured and asked: ways to predict, a row for each prediction, scores and pictures."""

from thinned.evaluation.mc_dropout import MCDropout
from thinned.evaluation.predictor import Prediction, Predictor

__all__ = ["MCDropout", "Prediction", "Predictor"]
