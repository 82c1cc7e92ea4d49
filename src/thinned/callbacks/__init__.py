"""Lightning callbacks: masks and checkpoints that resume exactly, speed, Monte-Carlo dropout at test and predict."""

from thinned.callbacks.checkpoints import Checkpoints
from thinned.callbacks.mc_dropout import MCDropout
from thinned.callbacks.randomness import StepSeed
from thinned.callbacks.text_samples import TextSamples
from thinned.callbacks.throughput import Throughput

__all__ = ["Checkpoints", "MCDropout", "StepSeed", "TextSamples", "Throughput"]
