"""A trained network, measured: ways to predict, a row for each prediction, scores and pictures."""

from thinned.evaluation.mc_dropout import MCDropout

__all__ = ["MCDropout"]
