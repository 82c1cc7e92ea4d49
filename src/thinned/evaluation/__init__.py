"""Measures a trained network: ways to predict, a row for each prediction, scores, pictures, a report."""

from thinned.evaluation.mc_dropout import MCDropout
from thinned.evaluation.predictor import Prediction, Predictor

__all__ = ["MCDropout", "Prediction", "Predictor"]
