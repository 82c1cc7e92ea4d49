"""Defines Lightning data modules, and the order in which they present their examples."""

from thinned.data.image_batches import Batch
from thinned.data.images import ImageDataModule
from thinned.data.order import EpochBatchSampler
from thinned.data.text import TextDataModule
from thinned.data.tokenizer import Tokenizer
from thinned.data.tokens import TokenBatch

__all__ = ["Batch", "EpochBatchSampler", "ImageDataModule", "TextDataModule", "TokenBatch", "Tokenizer"]
