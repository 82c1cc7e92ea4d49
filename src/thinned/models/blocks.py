"""What networks are built of beside torch's own layers, before and after thinning.

Shapes: B batch, C channels, P patches, E width of the embedding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Non-overlapping square patches, each projected to the width E, plus a learned position. Out: (B, P, E)."""

    def __init__(self, input_shape: Sequence[int], patch_size: int, width: int) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        self.patch_size = patch_size
        self.num_patches = (height // patch_size) * (image_width // patch_size)
        self.projection = nn.Linear(channels * patch_size**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.num_patches, width))

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, self.patch_size, stride=self.patch_size)  # (B, C * size^2, P)
        return self.projection(patches.transpose(1, 2)) + self.position  # (B, P, E)


class AttentionPooling(nn.Module):
    """One learned query attends over the patches: softmax(q k / sqrt(E)), dropout, then the values. Out: (B, E)."""

    def __init__(self, query: nn.Parameter, key_value: nn.Linear, attention_dropout: nn.Module) -> None:
        super().__init__()
        self.query = query  # (E,)
        self.key_value = key_value  # E -> 2 E
        self.attention_dropout = attention_dropout

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key_value(x).chunk(2, dim=-1)  # (B, P, E) each
        attention = torch.softmax(key @ self.query / math.sqrt(len(self.query)), dim=-1)  # (B, P)
        return torch.einsum("bp,bpe->be", self.attention_dropout(attention), value)


class Residual(nn.Module):
    """x + sublayer(x)."""

    def __init__(self, sublayer: nn.Module) -> None:
        super().__init__()
        self.sublayer = sublayer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sublayer(x)


class Mask(nn.Module):
    """Multiplies by a fixed mask: what is left of a dropout that cannot be folded into weights."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class GivenLinear(nn.Linear):
    """A linear layer with given weights, which draws no initial ones."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
