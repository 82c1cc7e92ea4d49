"""Defines networks in pure torch. Every dropout in them is a `Dropout` at one of four named sites."""

from thinned.models.dropout import SITES, Dropout, DropoutRates
from thinned.models.gpt import GPT, KVCache
from thinned.models.mlp import MLP

__all__ = ["GPT", "MLP", "SITES", "Dropout", "DropoutRates", "KVCache"]
