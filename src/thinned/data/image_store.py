"""Reads stored images: pixels, decoded on demand, names, statistics, and hashes of their contents.

Shapes: N examples, B of them in a batch, C channels, H height, W width.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from filelock import FileLock
from PIL.Image import Image
from torch import Tensor

from thinned.data.content_split import content_hash
from thinned.data.pixels import SCALES, depth_of, header, image_of, open_image, to_array
from thinned.files import whole_file

CENSUS = np.dtype([("hash", "<u8"), ("header", "u1")])  # describes the content of an image
MANY = 10_000  # images: from here on, their census is kept on disk


@dataclass
class StoredImages:
    """Decodes stored images when they are read: `images[rows]` is (B, C, H, W), uint8 or float32."""

    stored: datasets.Dataset  # the column `image`, not decoded
    parts: dict[str, range]  # the rows of each stored split, by its name
    root: Path  # file names are relative to it
    shape: tuple[int, int, int] = (1, 1, 1)  # this and the next are settings of `to_array`
    resize: bool = False
    deep: bool = False
    background: str = "white"

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
            size = f"{self.shape[2]}x{self.shape[1]} (or data.image_size)"
            name = self.names([row])[0]
            raise ValueError(f"Expected images of {size} in data.path, grey and finite, but {name} {error}") from None

    def open(self, row: int, stored: dict[str, Any] | None = None) -> Image:
        """Decodes an image; OSError if that fails."""
        try:
            return open_image(_content(stored or self.stored[row]["image"]))
        except Exception as error:  # PIL raises many types
            raise self._unreadable(row, error) from None

    def _unreadable(self, row: int, error: Exception) -> OSError:
        """Returns the error for an unreadable image: PIL names neither file nor row."""
        if isinstance(error, OSError) and error.errno:
            return OSError(f"Expected data.path to hold all its images while they are read, but got {error}")
        cause = str(error).partition(" <_io")[0]
        return OSError(f"Expected images in data.path that can be decoded, but got {self.names([row])[0]} ({cause})")

    @cached_property
    def _paths(self) -> pa.ChunkedArray:
        return pc.struct_field(self.stored.with_format("arrow")[:]["image"], "path")

    def names(self, rows: list[int]) -> list[str]:
        """Returns the names of images: files relative to `data.path`, or stored splits and rows."""
        paths = self._paths.take(pa.array(rows, pa.int64())).to_pylist()
        return [self._name(row, path) for row, path in zip(rows, paths, strict=True)]

    def _name(self, row: int, path: str | None) -> str:
        if path and Path(path).is_relative_to(self.root):
            return Path(path).relative_to(self.root).as_posix()
        name, rows = next((name, rows) for name, rows in self.parts.items() if row in rows)
        return f"{name}[{row - rows.start}]"

    def census(self, cache: Path) -> np.ndarray:
        """Returns hash and header of the content of each image, (N,) of dtype `CENSUS`.

        The census of many images is kept in the folder `cache`, and computed again if the size or time of a file, or
        the fingerprint of the dataset, has changed.
        """
        if len(self.stored) < MANY:
            return np.fromiter(self._examined(), CENSUS, len(self.stored))
        key = self.stored._fingerprint
        if pc.struct_field(self.stored.with_format("arrow")[:]["image"], "bytes").null_count == len(self.stored):
            states = ((path, os.stat(path)) for path in self._paths.to_pylist() if path)
            key = str([(path, state.st_size, state.st_mtime_ns) for path, state in states])
        kept = cache / f"census-{content_hash(key.encode()):016x}.npy"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"Expected data.cache_dir to be a folder to write to, but got {error}") from None
        with FileLock(kept.with_suffix(".lock")):  # one process computes it, others wait
            if not kept.exists():
                examined = np.fromiter(self._examined(), CENSUS, len(self.stored))
                with whole_file(kept) as temporary:
                    np.save(temporary, examined)
            census: np.ndarray = np.load(kept)
        return census

    def _examined(self) -> Iterator[tuple[int, int]]:
        batches = self.stored.with_format("arrow").iter(1024)
        for row, stored in enumerate(stored for batch in batches for stored in batch["image"].to_pylist()):
            if stored is None:
                raise ValueError(f"Expected images in data.path, but got None in {self.names([row])[0]}")
            try:
                content = _content(stored)
                yield content_hash(content), header(content)
            except Exception as error:
                raise self._unreadable(row, error) from None


def _content(stored: dict[str, Any]) -> bytes:
    content: bytes | None = stored["bytes"]
    return Path(stored["path"]).read_bytes() if content is None else content


@dataclass(frozen=True)
class Statistics:
    """Describes the intensities of each channel, (C,). Pictures show the range from low to high."""

    mean: list[float]
    std: list[float]
    low: list[float]
    high: list[float]

    def standard(self, deep: bool) -> tuple[Tensor, Tensor]:
        """Returns mean and deviation (1 instead of 0) of intensities as `to_array` gives them, (C, 1, 1) float32."""
        unit, deviations = 1 if deep else 255, [std or 1.0 for std in self.std]
        return unit * torch.tensor(self.mean)[:, None, None], unit * torch.tensor(deviations)[:, None, None]

    def limits(self, scale: str, deep: bool) -> tuple[Tensor, Tensor]:
        """Returns the darkest and the brightest possible intensity as `to_array` gives them, (C, 1, 1) each."""
        low, high = [0.0], [1.0 if deep else 255.0]
        if scale != SCALES[0]:  # only the data know their range
            low, high = self.low, self.high
        return torch.tensor(low)[:, None, None], torch.tensor(high)[:, None, None]

    def to_uint8(self, images: Tensor) -> Tensor:
        """Returns images (n, C, H, W) of more than 8 bits as pictures of 8 bits: low becomes 0, and high 255."""
        low, high = (torch.tensor(end)[:, None, None] for end in (self.low, self.high))
        return (255 * (images - low) / (high - low).clamp_min(1e-12)).round().clamp(0, 255).to(torch.uint8)


def channel_statistics(images: Tensor | StoredImages, rows: Tensor) -> Statistics:
    """Returns the statistics of some images; 8 bits count as intensities in [0, 1].

    Parts are merged as by Chan, Golub and LeVeque (1979).
    """
    number, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    low, high = torch.tensor(math.inf), torch.tensor(-math.inf)
    for part in torch.split(rows, 64):  # as float64 they take eight times the memory of 8 bits
        stored = images[part]
        pixels = stored.double().transpose(0, 1).flatten(1)  # (C, n)
        n = pixels.shape[1]
        number += n
        variance, mean_of_part = torch.var_mean(pixels, 1, correction=0)
        delta = mean_of_part - mean
        mean = mean + delta * (n / number)
        squares = squares + n * variance + delta**2 * n * (1 - n / number)
        low, high = torch.minimum(low, pixels.amin(1)), torch.maximum(high, pixels.amax(1))
    unit = 1
    if stored.dtype == torch.uint8:
        unit, low, high = 255, torch.zeros_like(mean), torch.ones_like(mean)
    std = (squares / number).sqrt()
    return Statistics((mean / unit).tolist(), (std / unit).tolist(), low.tolist(), high.tolist())


def standardised(given: Any, state: dict[str, Any], size: int | None) -> Tensor:
    """Returns an image as input of a network whose data module had this state, (C, H, W) float32.

    ValueError if it is no image, or has another depth or more channels than the training images.
    """
    image = image_of(given)
    if (scale := SCALES[depth_of(image)]) != state["scale"]:
        raise ValueError(f"Expected an image of {state['scale']}, as in the training, but got one of {scale}")
    width, height = (size, size) if size else image.size
    shape, deep = (state["channels"], height, width), depth_of(image) > 0
    try:
        pixels = to_array(image, shape, resize=bool(size), deep=deep, background=state["background"])
    except ValueError as error:
        raise ValueError(f"Expected an image like those of the training, but got one that {error}") from None
    mean, std = Statistics(**state["statistics"]).standard(deep)
    return (torch.from_numpy(pixels.astype(np.float32)) - mean) / std
