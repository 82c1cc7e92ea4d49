"""Reads images from scikit-learn's digits, a folder or the Hugging Face hub: their splits, contents and pixels.

Shapes: N examples, B of them in a batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from torch import Tensor

from thinned.data.hugging_face import by_column, declares_its_files, is_saved, read_stored, sizes_of
from thinned.data.image_folder import is_image, read_image_folder
from thinned.data.image_letters import read_letters
from thinned.data.pixels import open_image, to_array
from thinned.data.split_names import split_of, stored_split, walk

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # of `datasets`, for files with images in them
EXPECTED = "'digits', 'letters', a folder of images, the folder of a dataset or its id on the Hugging Face Hub"


def read_digits() -> datasets.Dataset:
    """Returns scikit-learn's 1,797 digits of 8x8 pixels, 17 grey levels scaled to 0..255."""
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    # PGM is the pixels as they are, so that their hashes are the same everywhere; PNG depends on a library's version.
    contents = [{"bytes": b"P5 8 8 255\n" + image.tobytes(), "path": None} for image in images]
    classes = datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    return datasets.Dataset.from_dict(
        {"image": contents, "label": digits.target},
        features=datasets.Features(image=datasets.Image(), label=classes),
    )


def read_splits(
    path: str, label: str | None = None, size: tuple[int, int] = (28, 28)
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Returns the stored splits of the dataset at `data.path`, and what it leaves out.

    Args:
        path: The value of `data.path`.
        label: Column of the labels, if it is not called like one.
        size: Height and width of images that are drawn.
    """
    if path in ("digits", "letters"):
        return {"train": read_digits() if path == "digits" else read_letters(*size)}, []
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix.lower() in BUILDERS:
        return by_column(_read_tables({"train": [folder]}), [])
    if folder.is_dir() and not is_saved(folder) and not declares_its_files(folder):
        files = list(walk(folder))
        if tables := _tables_by_split(folder, files):
            used = {table for of_split in tables.values() for table in of_split}
            splits, left_out = _read_tables(tables), [file for file in files if file not in used]
        elif any(map(is_image, files)):
            splits, left_out = read_image_folder(folder, files, label)
        else:
            return read_stored(path, EXPECTED, needs_train=False), []  # which says what is wrong
        return by_column(splits, [str(file.relative_to(folder)) for file in left_out])
    return by_column(read_stored(path, EXPECTED, needs_train=False), [])


def _tables_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Returns files of rows by the split that a folder or the name of the file tells; all of them if none does."""
    names = {file: stored_split(file.relative_to(folder)) for file in files if file.suffix.lower() in BUILDERS}
    if not any(map(split_of, filter(None, names.values()))):
        names = dict.fromkeys(names, "train")
    return {name: [file for file in names if names[file] == name] for name in dict.fromkeys(names.values()) if name}


def _read_tables(tables: dict[str, list[Path]]) -> dict[str, datasets.Dataset]:
    """Returns the rows of files, in which the images are."""
    splits = {}
    for name, files in tables.items():
        groups: dict[bytes, list[str]] = defaultdict(list)  # `datasets` gives all files the class names of the first
        try:
            for file in files:
                is_parquet = file.suffix.lower() == ".parquet"
                groups[repr(pq.read_schema(file).metadata).encode() if is_parquet else bytes(file)].append(str(file))
            parts = [
                datasets.load_dataset(
                    BUILDERS[Path(group[0]).suffix.lower()],
                    data_files={"train": group},
                    description=sizes_of(map(Path, group)),
                )["train"]
                for group in groups.values()
            ]
            if len({repr(part.features) for part in parts}) > 1:
                parts = list(map(_with_names, parts))
            splits[name] = datasets.concatenate_datasets(parts)
        except Exception as error:  # of many types; the user needs to know which setting it is about
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"Expected data.path to hold rows with images, but got {cause} ({files[0]})") from None
    return splits


def _with_names(stored: datasets.Dataset) -> datasets.Dataset:
    """Returns rows with the names of classes instead of their numbers."""
    for column, feature in list(stored.features.items()):
        if isinstance(feature, datasets.ClassLabel):
            names = [None if value is None or value < 0 else feature.int2str(value) for value in stored[column][:]]
            stored = stored.remove_columns(column).add_column(column, names)
    return stored


def image_column(features: datasets.Features, given: str | None) -> str:
    """Returns the given column, or the only one of images: encoded bytes, or bytes and path, will do.

    Raises:
        ValueError: If there is none, or a choice.
    """
    binary = ("binary", "large_binary")
    found = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or (isinstance(feature, datasets.Value) and feature.dtype in binary)
    ]
    if given in found or (given is None and len(found) == 1):
        return given or found[0]
    raise ValueError(
        f"Expected data.image_column to be one of the image columns {found}, but got {given!r} "
        f"(all columns: {list(features)})"
    )


@dataclass
class StoredImages:
    """Stored images, decoded when they are read: `images[rows]` is (B, C, H, W), uint8 or float32.

    Args:
        stored: The column `image`, not decoded.
        parts: Name and size of each stored split that it consists of, in order.
        root: Folder to which the names of files are relative.
    """

    stored: datasets.Dataset
    parts: dict[str, int]
    root: Path
    # What `to_array` makes of them, after `ImageDataModule.setup`.
    shape: tuple[int, int, int] = (1, 1, 1)
    resize: bool = False
    deep: bool = False
    background: str = "white"

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def num_bytes(self) -> int:
        """Size of all images when they are decoded."""
        return len(self.stored) * math.prod(self.shape) * (4 if self.deep else 1)

    @cached_property
    def pixels(self) -> Tensor:
        """All images, (N, C, H, W); they are decoded once and kept."""
        pixels = torch.empty(len(self.stored), *self.shape, dtype=torch.float32 if self.deep else torch.uint8)
        for rows in torch.split(torch.arange(len(pixels)), 1024):
            pixels[rows] = self[rows]
        return pixels

    def __getitem__(self, rows: Tensor) -> Tensor:
        stored = self.stored[rows.tolist()]["image"]
        return torch.from_numpy(np.stack([self._pixels(*each) for each in zip(rows.tolist(), stored, strict=True)]))

    def _pixels(self, row: int, stored: dict[str, Any]) -> np.ndarray:
        image = self.open(row, stored)
        try:
            return to_array(image, self.shape, resize=self.resize, deep=self.deep, background=self.background)
        except ValueError as error:
            _, height, width = self.shape
            change = f"{width}x{height} or data.image_size" if image.size != (width, height) else "grey and finite"
            raise ValueError(
                f"Expected all images of data.path to be {change}, but {self.names([row])[0]} {error}"
            ) from None

    def open(self, row: int, stored: dict[str, Any] | None = None) -> Image:
        """Decodes an image; OSError if it cannot be."""
        try:
            return open_image(stored or self.stored[row]["image"])
        except Exception as error:  # PIL raises many types
            raise self.unreadable(row, error) from None

    def unreadable(self, row: int, error: Exception) -> OSError:
        """Returns the error for an image that cannot be read, since PIL names neither file nor row."""
        if isinstance(error, OSError) and error.errno:
            return OSError(f"Expected data.path to hold all its images while they are read, but got {error}")
        cause = str(error).partition(" <_io")[0]
        return OSError(f"Expected images in data.path that can be decoded, but got {self.names([row])[0]} ({cause})")

    @cached_property
    def _paths(self) -> pa.ChunkedArray:
        return pc.struct_field(self.stored.with_format("arrow")[:]["image"], "path")

    def names(self, rows: list[int]) -> list[str]:
        """Returns the names of the images' files, relative to `data.path`, or their stored splits and rows."""
        root, ends = f"{self.root}{os.sep}", list(accumulate(self.parts.values(), initial=0))
        names = []
        for row, path in zip(rows, self._paths.take(pa.array(rows, pa.int64())).to_pylist(), strict=True):
            if path and path.startswith(root):
                names.append(Path(path.removeprefix(root)).as_posix())
            else:
                part = bisect_right(ends, row) - 1
                names.append(f"{[*self.parts][part]}[{row - ends[part]}]")
        return names


@dataclass(frozen=True)
class Statistics:
    """Describes the intensities of each channel, (C,). Pictures show the range from low to high."""

    mean: list[float]
    std: list[float]
    low: list[float]
    high: list[float]

    def to_uint8(self, images: Tensor) -> Tensor:
        """Returns images (n, C, H, W) of more than 8 bits as pictures, in which the range is that of 8 bits."""
        low, high = (torch.tensor(end)[:, None, None] for end in (self.low, self.high))
        return (255 * (images - low) / (high - low).clamp_min(1e-12)).round().clamp(0, 255).to(torch.uint8)


def channel_statistics(images: Tensor | StoredImages, rows: Tensor) -> Statistics:
    """Returns the statistics of some images; 8 bits count as intensities in [0, 1]."""
    parts = (images[part].transpose(0, 1).flatten(1) for part in torch.split(rows, 1024))  # (C, n)
    first = next(parts)
    channels = len(first)
    if first.dtype == torch.uint8:
        counts = torch.zeros(channels, 256, dtype=torch.int64)  # histograms are exact in any order of rows
        for part in chain([first], parts):
            for channel, pixels in enumerate(part):
                counts[channel] += torch.bincount(pixels, minlength=256)
        weights = counts.double() / counts.sum(1, keepdim=True)  # (C, 256)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = weights @ values
        std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
        return Statistics(mean.tolist(), std.tolist(), [0.0] * channels, [1.0] * channels)
    number, mean, squares = 0, torch.zeros(channels).double(), torch.zeros(channels).double()
    low, high = first.amin(1), first.amax(1)
    for part in chain([first], parts):
        pixels, count = part.double(), part.shape[1]
        delta = pixels.mean(1) - mean  # two parts are joined as in Chan, Golub and LeVeque 1983
        squares += pixels.var(1, correction=0) * count + delta**2 * number * count / (number + count)
        mean += delta * count / (number + count)
        number += count
        low, high = torch.minimum(low, part.amin(1)), torch.maximum(high, part.amax(1))
    return Statistics(mean.tolist(), (squares / number).sqrt().tolist(), low.tolist(), high.tolist())
