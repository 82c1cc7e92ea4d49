"""Windows of consecutive tokens in batches, with the token that follows each.

Shapes: B windows in a batch, T tokens in a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from thinned.data.text_distortion import HeldTokens
from thinned.data.tokens import Tokens

NO_TARGET = -100  # cross_entropy ignores it


class TokenBatch(NamedTuple):
    """Windows of tokens, the tokens that follow, and the numbers of the windows in the split."""

    input: Tensor  # (B, T) int64
    target: Tensor  # (B, T) int64, the token after each; -100 where there is none
    index: Tensor  # type: ignore[assignment]  # (B,) int64, window of the split


@dataclass
class TokenBatches(Dataset[TokenBatch]):
    """A split as batches: `split[epoch, indices]`.

    - Training: window j begins at j T plus an offset below T that is a function of (seed, epoch). Every epoch has the
      windows that fit with the largest offset.
    - Evaluation: window j begins at j T, and each token but the first is a target once; the last window is padded.
    """

    tokens: Tokens | HeldTokens
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
            window = self.tokens.read(start, min(start + length + 1, len(self.tokens)))
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return TokenBatch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.tensor(indices))
