"""Lightning callbacks: masks, faults, checkpoints and speed of training, Monte-Carlo dropout at test and predict."""

from thinned.callbacks.checkpoints import Checkpoints
from thinned.callbacks.finite_steps import FiniteSteps
from thinned.callbacks.lost_ranks import LostRanks
from thinned.callbacks.mc_dropout import MCDropout
from thinned.callbacks.randomness import StepSeed
from thinned.callbacks.text_samples import TextSamples
from thinned.callbacks.throughput import Throughput

__all__ = ["Checkpoints", "FiniteSteps", "LostRanks", "MCDropout", "StepSeed", "TextSamples", "Throughput"]
