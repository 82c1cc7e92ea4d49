"""Reads images from scikit-learn's digits, a folder or the Hugging Face hub: their columns, labels and pixels.

Shapes: N examples, B of them in a batch, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import datasets
import numpy as np
import torch
from PIL.Image import Resampling
from sklearn.datasets import load_digits
from torch import Tensor

from thinned.data.hugging_face import read_stored


def read_digits() -> datasets.Dataset:
    """Returns scikit-learn's 1,797 digits of 8x8 pixels, 17 grey levels scaled to 0..255."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    classes = datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    return datasets.Dataset.from_dict(
        {"image": list(images), "label": digits.target},
        features=datasets.Features(image=datasets.Image(), label=classes),
    )


def read_splits(path: str) -> dict[str, datasets.Dataset]:
    """Returns the stored splits of the dataset at `data.path`, "train" among them; errors as of `read_stored`."""
    if path == "digits":
        return {"train": read_digits()}
    return read_stored(path, "'digits', the folder of a dataset or its id on the Hugging Face Hub")


def find_column(features: datasets.Features, kind: Literal["image", "label"], given: str | None) -> str:
    """Returns the given column, or the only one of its kind; ValueError if there is none or a choice."""
    if kind == "image":
        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    else:
        scalars = (datasets.ClassLabel, datasets.Value)
        found = [name for name, feature in features.items() if isinstance(feature, scalars) and "int" in feature.dtype]
        if not given:
            classes = [name for name in found if isinstance(features[name], datasets.ClassLabel)]
            found = classes or [name for name in found if name in ("label", "labels", "target")]
    if given in found or (given is None and len(found) == 1):
        return given or found[0]
    raise ValueError(
        f"Expected data.{kind}_column to be one of the {kind} columns {found}, but got {given!r} "
        f"(all columns: {list(features)})"
    )


def read_labels(stored: datasets.Dataset, column: str, split: str, num_classes: int | None) -> Tensor:
    """Returns the labels of a stored split, int64 (N,). If `num_classes` is None, any label of at least 0 is valid.

    Raises:
        ValueError: If there are no labels, or one is missing or out of range.
    """
    if column not in stored.column_names or not len(stored):
        raise ValueError(
            f"Expected labels in column {column!r} of split {split!r} of data.path, "
            f"but got {len(stored)} rows of {stored.column_names}"
        )
    table = stored.with_format("arrow", columns=[column])[:]
    labels = table[column].to_numpy()  # if a label is missing, all are float and this one is nan
    if num_classes is None:
        num_classes = int(np.nanmax(labels, initial=0)) + 1
    wrong = labels[~((labels >= 0) & (labels < num_classes))]
    if len(wrong):
        raise ValueError(
            f"Expected labels in [0, {num_classes}) in column {column!r} of split {split!r} of data.path, "
            f"but got {wrong[0]} ({len(wrong)} of {len(labels)} labels are out of range)"
        )
    return torch.from_numpy(labels.astype(np.int64))


@dataclass
class StoredImages:
    """Images of one stored split, decoded when they are read: `images[rows]` is uint8 (B, C, H, W)."""

    stored: datasets.Dataset  # the column of images alone
    split: str
    shape: tuple[int, int, int]  # (C, H, W)
    resize: bool

    @cached_property
    def pixels(self) -> Tensor:
        """All images, uint8 (N, C, H, W); they are decoded once and kept."""
        pixels = torch.empty(len(self.stored), *self.shape, dtype=torch.uint8)
        for rows in torch.split(torch.arange(len(pixels)), 1024):
            pixels[rows] = self[rows]
        return pixels

    def __getitem__(self, rows: Tensor) -> Tensor:
        channels, height, width = self.shape
        (column,) = self.stored.column_names
        images = []
        try:
            stored = self.stored[rows.tolist()][column]
        except OSError as error:  # the files of a folder are read only now
            raise OSError(f"Expected data.path to hold all its images while they are read, but got {error}") from None
        for row, image in zip(rows.tolist(), stored, strict=True):
            if image is None:
                raise ValueError(f"Expected images in split {self.split!r} of data.path, but got None in row {row}")
            image = image.convert("L" if channels == 1 else "RGB")
            if self.resize:
                image = image.resize((width, height), Resampling.BILINEAR)
            elif image.size != (width, height):
                raise ValueError(
                    f"Expected data.image_size, as not all images are {width}x{height} like the first: "
                    f"row {row} of split {self.split!r} is {image.width}x{image.height}, but got None"
                )
            images.append(np.asarray(image).reshape(height, width, channels))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def channel_statistics(images: Tensor | StoredImages, rows: Tensor) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation (1 instead of 0) per channel, of intensities in [0, 1]."""
    counts = torch.zeros(images.shape[-3], 256, dtype=torch.int64)  # histograms are exact in any order of rows
    for part in torch.split(rows, 1024):
        for channel, pixels in enumerate(images[part].unbind(1)):
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256)
    weights = counts.double() / counts.sum(1, keepdim=True)  # (C, 256)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()
