"""Distorts images, to measure how well uncertainty is calibrated if the data shift (Ovadia et al. 2019).

Shapes: B images, C channels, H height, W width. Intensities of undistorted images are in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from thinned.data.distortion import Distortion
from thinned.data.image_batches import rotate_and_shift
from thinned.data.image_store import StoredImages

SEED = 0  # one for all, so that runs with other seeds are tested on the same images


def _draws(rows: Tensor, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
    """Returns the draws of each row from a generator of its own, (B, ...) float32."""
    return torch.from_numpy(np.stack([draw(np.random.default_rng((SEED, row))) for row in rows.tolist()])).float()


def rotation(images: Tensor, degrees: float, rows: Tensor) -> Tensor:
    """Rotates counter-clockwise about the centre. The outside is black."""
    return rotate_and_shift(images, torch.full((len(images),), degrees), torch.zeros(len(images), 2))


def translation(images: Tensor, pixels: float, rows: Tensor) -> Tensor:
    """Shifts each image in its own random direction. The outside is black."""
    angle = 2 * math.pi * _draws(rows, lambda generator: generator.random(1))  # (B, 1)
    return rotate_and_shift(images, torch.zeros(len(images)), pixels * torch.cat([angle.cos(), angle.sin()], 1))


def roll(images: Tensor, pixels: float, rows: Tensor) -> Tensor:
    """Shifts to the right. Pixels that leave an image return at its left."""
    return images.roll(int(pixels), -1)


def noise(images: Tensor, deviation: float, rows: Tensor) -> Tensor:
    """Adds Gaussian noise, independent for each pixel and channel."""
    return images + deviation * _draws(rows, lambda generator: generator.standard_normal(images.shape[1:]))


def blur(images: Tensor, deviation: float, rows: Tensor) -> Tensor:
    """Averages under a Gaussian. The borders repeat outwards."""
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, deviation, deviation), mode="nearest"))


def contrast(images: Tensor, share: float, rows: Tensor) -> Tensor:
    """Moves all intensities of an image towards their mean."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + share * (images - mean)


IMAGE_KINDS = {each.__name__: each for each in (rotation, translation, roll, noise, blur, contrast)}


@dataclass(frozen=True)
class DistortedImages:
    """Distorts stored images as a function of the image and its row, whatever the batch."""

    images: Tensor | StoredImages  # (N, C, H, W) uint8 or float32
    distortion: Distortion
    low: Tensor  # darkest intensity of each channel, (C, 1, 1)
    high: Tensor  # brightest intensity

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Returns images by their rows, (B, C, H, W) of the stored type and within its range."""
        images = self.images[rows]
        span = (self.high - self.low).clamp_min(1e-12)
        distort = IMAGE_KINDS[self.distortion.kind]
        intensity = distort((images.float() - self.low) / span, self.distortion.severity, rows)
        distorted = self.low + intensity.clamp(0, 1) * span
        return distorted.round().to(torch.uint8) if images.dtype == torch.uint8 else distorted
