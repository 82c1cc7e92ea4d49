"""Lightning callbacks: reproducible masks in training, Monte-Carlo dropout at test and predict."""

from thinned.callbacks.mc_dropout import MCDropout
from thinned.callbacks.randomness import StepSeed

__all__ = ["MCDropout", "StepSeed"]
