"""Generates text with a GPT, coloured by how unsure the network is of each token."""

from thinned.generation.text_samples import TextSamples

__all__ = ["TextSamples"]
