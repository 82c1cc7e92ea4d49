"""Makes batches of images: augmented for training, or distorted for a test, and standardised.

A test on distorted images measures how well uncertainty is calibrated if the data shift (Ovadia et al. 2019).

Shapes: N examples, B of them in a batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from thinned.data.distortion import SEED, Distortion
from thinned.data.image_store import StoredImages


class Batch(NamedTuple):
    """Holds images, their classes, and their rows in the split."""

    image: Tensor  # (B, C, H, W) float32, standardised
    target: Tensor | None  # (B,) int64; None if the labels are hidden
    index: Tensor  # type: ignore[assignment]  # (B,) int64, row in its split of the dataset


def rotate_and_shift(image: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Returns float images (B, C, H, W), each rotated about its centre, then shifted, bilinearly; the outside is 0.

    `angle` is in degrees counter-clockwise, (B,), and `shift` in pixels to the right and down, (B, 2).
    """
    angle = angle.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    # A target pixel takes its value from back @ (target - shift), in pixels from the centre; y points down.
    back = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    offset = -back @ shift[:, :, None]  # (B, 2, 1)
    # In affine_grid, an image reaches from -1 to 1 along both axes.
    half = torch.tensor([image.shape[3] / 2, image.shape[2] / 2])
    theta = torch.cat([back * half, offset], -1) / half[:, None]  # (B, 2, 3)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)


@lru_cache(maxsize=1)
def augmentation_draws(seed: int, epoch: int, num_examples: int) -> Tensor:
    """Returns three draws from U(-1, 1) for each example, (N, 3)."""
    generator = np.random.default_rng((seed, epoch, 1))  # the order of examples is drawn from (seed, epoch)
    return torch.from_numpy(generator.uniform(-1, 1, (num_examples, 3))).float()


def _draws(rows: Tensor, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
    """Returns the draws of each row from a generator of its own, (B, ...) float32."""
    drawn = [draw(np.random.default_rng((SEED, row))) for row in rows.tolist()]
    return torch.from_numpy(np.stack(drawn)).float()


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


# Each takes images of intensities in [0, 1], (B, C, H, W), a severity, and the rows of the images, (B,).
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


@dataclass
class ImageBatches(Dataset[Batch]):
    """Reads a split in batches: `split[epoch, indices]`. Augmentation is a function of (seed, epoch, index)."""

    images: Tensor | StoredImages | DistortedImages  # (N, C, H, W)
    rows: Tensor  # (N,) int64, rows of the split in `images`
    target: Tensor | None  # (N,) int64
    mean: Tensor  # (C, 1, 1) float32, of the stored intensities
    std: Tensor  # (C, 1, 1)
    rotation: float  # largest angle in degrees
    shift: float  # largest shift in pixels
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, list[int]]) -> Batch:
        epoch, indices = item
        index = torch.tensor(indices)
        image = self.images[self.rows[index]].float()
        if self.rotation or self.shift:  # before standardisation, while black is 0
            draws = augmentation_draws(self.seed, epoch, len(self))[index]
            image = rotate_and_shift(image, self.rotation * draws[:, 0], self.shift * draws[:, 1:])
        target = None if self.target is None else self.target[index]
        return Batch((image - self.mean) / self.std, target, index)
