"""Lightning data modules, and the order in which they present their examples."""

from thinned.data.images import Batch, ImageDataModule
from thinned.data.sampling import EpochBatchSampler

__all__ = ["Batch", "EpochBatchSampler", "ImageDataModule"]
