"""Makes batches of images, augmented for training and standardised, by a few operations on the whole batch.

Shapes: N examples, B of them in a batch, C channels, H height, W width.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


class Batch(NamedTuple):
    """Holds images, their classes, and their rows in the split."""

    image: Tensor  # (B, C, H, W) float32, standardised
    target: Tensor | None  # (B,) int64; None if the labels are hidden
    index: Tensor  # type: ignore[assignment]  # (B,) int64, row in its split of the dataset


def rotate_and_shift(image: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Returns images (B, C, H, W), each rotated about its centre, then shifted, bilinearly; the outside is black (0).

    Args:
        image: The images, float.
        angle: Degrees counter-clockwise, (B,).
        shift: Pixels to the right and down, (B, 2).
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


@dataclass
class ImageBatches(Dataset[Batch]):
    """Reads a split in batches: `split[epoch, indices]`. Augmentation is a function of (seed, epoch, index)."""

    images: Any  # such as a Tensor (N, C, H, W) or `StoredImages`: `images[rows]` is (B, C, H, W)
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
