"""Reads tokens of a memory-mapped file, and windows of them in batches, with the token that follows each.

Shapes: B windows in a batch, T tokens in a window.
"""

import mmap
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

NO_TARGET = -100  # cross_entropy ignores it


class Tokens:
    """Reads slices of consecutive tokens of a file, which is memory-mapped, so that it stays readable when deleted.

    The workers of a data loader can read them too: unpickling opens the file again.
    """

    def __init__(self, path: Path, dtype: str, start: int, stop: int, content: mmap.mmap | None = None) -> None:
        self.path, self.dtype, self.start, self.stop = path, dtype, start, stop
        if content is None:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._content = content

    def __reduce__(self) -> tuple[type[Self], tuple[Path, str, int, int]]:
        return type(self), (self.path, self.dtype, self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Self:
        """Returns the tokens from start to stop, without reading them."""
        assert 0 <= start <= stop <= len(self)
        return type(self)(self.path, self.dtype, self.start + start, self.start + stop, self._content)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Returns consecutive tokens, int64 (n,); ValueError if the file has become shorter."""
        start, stop, _ = part.indices(len(self))
        return self.read(start, stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens from start to stop, as a slice does."""
        width = np.dtype(self.dtype).itemsize
        if self._content.size() < (self.start + stop) * width:  # reading it would kill the process with a bus error
            got = f"a shorter file {self.path}: start again to make them again"
            raise ValueError(f"Expected the tokens that were written to data.cache_dir, but got {got}")
        count, offset = max(stop - start, 0), (self.start + start) * width
        return np.frombuffer(self._content, self.dtype, count, offset).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Returns a hash of the tokens and their number."""
        digest, step = blake2b(digest_size=16), 2**22
        for start in range(0, len(self), step):
            digest.update(self[start : start + step].astype("<u4").tobytes())
        return digest.hexdigest()


class TokenBatch(NamedTuple):
    """Holds windows of tokens, the tokens that follow, and the numbers of the windows in the split."""

    input: Tensor  # (B, T) int64
    target: Tensor  # (B, T) int64, the token after each; or -100
    index: Tensor  # type: ignore[assignment]  # (B,) int64, window of the split


@dataclass
class TokenBatches(Dataset[TokenBatch]):
    """Reads a split in batches: `split[epoch, indices]`.

    - Training: window j begins at j T plus an offset below T that is a function of (seed, epoch). Every epoch has the
      windows that fit with the largest offset.
    - Evaluation: window j begins at j T, and each token but the first is a target once; the last window is padded.
    """

    tokens: Tokens | np.ndarray  # (N,)
    context_length: int
    seed: int
    training: bool

    def __len__(self) -> int:
        pairs = len(self.tokens) - 1  # a token and the next
        if self.training:
            return max(pairs // self.context_length - 1, 1)
        return -(-pairs // self.context_length)

    def offset(self, epoch: int) -> int:
        """Returns where the first window of an epoch begins."""
        if not self.training or len(self.tokens) <= 2 * self.context_length:
            return 0
        return int(np.random.default_rng((self.seed, epoch, 1)).integers(self.context_length))  # order: (seed, epoch)

    def __getitem__(self, item: tuple[int, list[int]]) -> TokenBatch:
        epoch, indices = item
        length, offset = self.context_length, self.offset(epoch)
        inputs = np.zeros((len(indices), length), np.int64)
        targets = np.full((len(indices), length), NO_TARGET, np.int64)
        for row, index in enumerate(indices):
            start = offset + index * length
            window = self.tokens[start : start + length + 1]
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return TokenBatch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.tensor(indices))
