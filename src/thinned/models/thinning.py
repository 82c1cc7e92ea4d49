"""What networks are built of beside torch's own layers, before and after thinning.

Shapes: B batch, C channels, P patches, E width of the embedding.
"""

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


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

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))


def kept_units(mask: Tensor) -> Tensor:
    """Indices of the kept units, filled up with dropped ones (whose mask is 0) to a multiple of 16.

    Matrix products over odd sizes are slower than over the next multiple of a cache line: 921 takes longer than 1024.
    """
    kept, dropped = mask.nonzero().squeeze(1), (mask == 0).nonzero().squeeze(1)
    size = -(-max(len(kept), 1) // 16) * 16  # never 0: torch warns of empty layers
    return torch.cat([kept, dropped])[:size]


def thin_linear(
    linear: nn.Linear,
    *,
    kept_in: Tensor | None = None,
    mask_in: Tensor | None = None,
    kept_out: Tensor | None = None,
    scale_out: Tensor | None = None,
) -> nn.Linear:
    """A linear layer with rows and columns cut (indices) or scaled (masks); the original where nothing is asked."""
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if kept_out is not None:
        kept_out = kept_out.to(weight.device)
        weight = weight.index_select(0, kept_out)
        bias = None if bias is None else bias.index_select(0, kept_out)
    if mask_in is not None:
        if kept_in is not None:
            weight, mask_in = weight.index_select(1, kept_in.to(weight.device)), mask_in[kept_in]
        # In place where the weights are a copy already: a fresh block of memory costs more than the product.
        weight = torch.mul(weight, mask_in.to(weight), out=None if weight is linear.weight else weight)
    if scale_out is not None:
        weight = torch.mul(weight, scale_out.to(weight)[:, None], out=None if weight is linear.weight else weight)
        bias = None if bias is None else bias * scale_out.to(bias)
    return linear if weight is linear.weight else GivenLinear(weight, bias)


def replace_modules(module: M, **changed: nn.Module) -> M:
    """Returns a copy of a module that shares everything with it but the given submodules."""
    copied = copy.copy(module)
    vars(copied).update({name: value.copy() for name, value in vars(copied).items() if isinstance(value, dict)})
    for name, submodule in changed.items():  # into the copy's own dict of submodules
        setattr(copied, name, submodule)
    return copied
