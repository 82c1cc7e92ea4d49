"""Images with classes: scikit-learn's digits, or a Hugging Face dataset from a folder or from the hub.

Images stay uint8 until a batch is made, by a few operations on the whole batch.

Shapes: N examples, B of them in a batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from thinned.data.image_sources import StoredImages, channel_statistics, find_column, read_labels, read_splits
from thinned.data.module import SplitDataModule
from thinned.data.order import Split, stratified_split


class Batch(NamedTuple):
    """Images, their classes, and their rows in the split."""

    image: Tensor  # (B, C, H, W) float32, standardised
    target: Tensor  # (B,) int64
    index: Tensor  # type: ignore[assignment]  # (B,) int64, row in its split of the dataset


def rotate_and_shift(image: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Rotates each image about its centre, then shifts it. Interpolation is bilinear, and the outside is black (0).

    Args:
        image: Shape (B, C, H, W), float.
        angle: Degrees counter-clockwise, shape (B,).
        shift: Pixels to the right and down, shape (B, 2).

    Returns:
        The moved images, shape (B, C, H, W).
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
    """Returns three draws from U(-1, 1) for each example, (N, 3), kept for one epoch."""
    generator = np.random.default_rng((seed, epoch, 1))  # the order of examples is drawn from (seed, epoch)
    return torch.from_numpy(generator.uniform(-1, 1, (num_examples, 3))).float()


@dataclass
class ImageBatches(Dataset[Batch]):
    """A split as batches: `split[epoch, indices]`. Augmentation is a function of (seed, epoch, index)."""

    images: Tensor | StoredImages
    rows: Tensor  # (N,) int64, rows of the split in `images`
    target: Tensor  # (N,) int64
    mean: Tensor  # (C, 1, 1) float32, of intensities in [0, 255]
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
        return Batch((image - self.mean) / self.std, self.target[index], index)


class ImageDataModule(SplitDataModule):
    """Images and classes in standardised batches, divided among the processes.

    A stored "test" is the test split, and a stored "validation" or "valid" the validation split, or the test split if
    there is no "test". A missing split is taken from "train", stratified by class.

    Args:
        path: "digits" for scikit-learn's, a folder for `datasets.load_dataset` or `load_from_disk`, or the id of a
            dataset on the Hugging Face Hub.
        image_column: Column of the images; None if it is the only one of its kind.
        label_column: Column of the classes; None if it is the only one of its kind.
        image_size: Height and width in pixels to which images are resized; None keeps their size.
        batch_size: Size of a training batch, over all processes.
        eval_batch_size: Size of a batch in validation, test and prediction, over all processes.
        val_fraction: Fraction of the stored "train" for validation, if no split is stored for it.
        test_fraction: Fraction of the stored "train" for the test, if no split is stored for it.
        predict_split: The split to predict.
        shift: Largest random shift of training images along each axis, in pixels.
        rotation: Largest random rotation of training images either way, in degrees.
        cache_gib: Memory in GiB for decoded images; if they do not fit, they are decoded for each batch.
        num_workers: Number of worker processes that make batches; 0 makes them in the main process.
        seed: Seed of splits, order and augmentation.

    Raises:
        ValueError: If an argument is out of range.
    """

    INDIFFERENT = SplitDataModule.INDIFFERENT | {"cache_gib", "rotation", "shift"}
    # Available after setup:
    image_shape: tuple[int, int, int]  # (C, H, W)
    num_classes: int
    class_names: list[str]
    rows: dict[Split, Tensor]  # rows of the examples in the stored split from which they come
    target: dict[Split, Tensor]

    def __init__(
        self,
        path: str = "digits",
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 1024,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        predict_split: Split = "test",
        shift: float = 0.0,
        rotation: float = 0.0,
        cache_gib: float = 4.0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.check_settings(
            ("path", path, "to be 'digits', a folder or an id"),
            ("image_size", image_size is None or image_size >= 1, "to be at least 1"),
            ("test_fraction", 0 < test_fraction < 1, "in (0, 1)"),
            ("shift", 0 <= shift < math.inf, "in [0, inf)"),
            ("rotation", 0 <= rotation <= 180, "in [0, 180]"),
            ("cache_gib", cache_gib >= 0, "to be at least 0"),
        )
        self._images: dict[Split, StoredImages] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the dataset, once for all stages; images are decoded when first needed."""
        if self._images:
            return
        stored = read_splits(self.path)
        train = stored["train"]
        image_column = find_column(train.features, "image", self.hparams["image_column"])
        label_column = find_column(train.features, "label", self.hparams["label_column"])
        test = next((name for name in ("test", "validation", "valid") if name in stored), "train")
        val = next((name for name in ("validation", "valid") if name in stored and name != test), "train")
        sources: dict[Split, str] = {"train": "train", "test": test, "val": val}

        names: list[str] | None = getattr(train.features[label_column], "names", None)
        labels = {"train": read_labels(train, label_column, "train", len(names) if names else None)}
        self.class_names = names or [str(label) for label in range(int(labels["train"].max()) + 1)]
        self.num_classes = len(self.class_names)
        for source in {val, test} - {"train"}:
            labels[source] = read_labels(stored[source], label_column, source, self.num_classes)

        self.rows = {split: torch.arange(len(labels[source])) for split, source in sources.items()}
        for split, source in sources.items():
            if split != "train" and source == "train":
                fraction = self.hparams[f"{split}_fraction"]
                size = round(fraction * len(train))
                try:
                    parts = stratified_split(labels["train"], self.rows["train"], size, self.hparams["seed"])
                except ValueError as error:
                    raise ValueError(
                        f"Expected data.{split}_fraction to leave every class on both sides of the split, "
                        f"but got {fraction} for {len(train)} examples: {error}"
                    ) from None
                self.rows["train"], self.rows[split] = parts
        self.target = {split: labels[source][self.rows[split]] for split, source in sources.items()}

        first = train[0][image_column]
        image_size = self.hparams["image_size"]
        width, height = (image_size, image_size) if image_size else first.size
        self.image_shape = (1 if first.mode in ("1", "L") else 3, height, width)
        images = {
            name: StoredImages(stored[name].select_columns(image_column), name, self.image_shape, bool(image_size))
            for name in labels
        }
        num_bytes = sum(map(len, labels.values())) * math.prod(self.image_shape)
        self._cached = num_bytes <= self.hparams["cache_gib"] * 2**30
        self._images = {split: images[source] for split, source in sources.items()}

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        # Not computed in setup, which runs before a checkpoint is loaded.
        return channel_statistics(self._pixels("train"), self.rows["train"])

    @property
    def mean(self) -> list[float]:
        """Mean of the training split per channel, of intensities in [0, 1]."""
        return self._statistics[0]

    @property
    def std(self) -> list[float]:
        """Standard deviation of the training split per channel, of intensities in [0, 1]."""
        return self._statistics[1]

    def _pixels(self, split: Split) -> Tensor | StoredImages:
        return self._images[split].pixels if self._cached else self._images[split]

    def raw_images(self, split: Split, indices: Sequence[int] | Tensor) -> Tensor:
        """Returns images before standardisation, uint8 (n, C, H, W), by their `Batch.index`."""
        return self._pixels(split)[self.rows[split][torch.as_tensor(indices, dtype=torch.int64, device="cpu")]]

    def state_dict(self) -> dict[str, list[float]]:
        """Returns what a trained network relies on: mean and standard deviation."""
        return {"mean": self.mean, "std": self.std} if self._images or "_statistics" in vars(self) else {}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """Takes mean and standard deviation from a checkpoint, instead of computing them."""
        self._statistics = state_dict["mean"], state_dict["std"]

    def num_examples(self, split: Split) -> int:
        """Returns the number of images in a split, after setup."""
        return len(self.rows[split])

    def batches(self, split: Split, *, training: bool) -> ImageBatches:
        """Returns a split as batches, augmented for training."""
        if len(self.mean) != self.image_shape[0]:
            raise ValueError(
                f"Expected data.path to have images with {len(self.mean)} channels, as the checkpoint has, "
                f"but got {self.image_shape[0]}"
            )
        return ImageBatches(
            self._pixels(split),
            self.rows[split],
            self.target[split],
            mean=255 * torch.tensor(self.mean)[:, None, None],
            std=255 * torch.tensor(self.std)[:, None, None],
            rotation=self.hparams["rotation"] if training else 0.0,
            shift=self.hparams["shift"] if training else 0.0,
            seed=self.hparams["seed"],
        )
