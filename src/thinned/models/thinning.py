"""Parts of networks that torch lacks, and how a mask becomes a part of the weights.

Shapes: B batch, C channels, P patches, E width of the embedding.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout

M = TypeVar("M", bound=nn.Module)


class PatchEmbedding(nn.Module):
    """Non-overlapping square patches, each projected to the width E, plus a learned position. Out: (B, P, E)."""

    def __init__(self, input_shape: Sequence[int], patch_size: int, width: int) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        self.patch_size = patch_size
        num_patches = (height // patch_size) * (image_width // patch_size)
        self.projection = nn.Linear(channels * patch_size**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(num_patches, width))

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
        return torch.einsum("...p,...pe->...e", self.attention_dropout(attention), value)


class Residual(nn.Module):
    """x + sublayer(x)."""

    def __init__(self, sublayer: nn.Module) -> None:
        super().__init__()
        self.sublayer = sublayer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sublayer(x)


class Mask(nn.Module):
    """Multiplies by a fixed mask, in place of a dropout that cannot be folded into weights."""

    watched = False  # as of `Dropout`

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def with_masks(module: M, masks: dict[str, Tensor], prefix: str = "") -> M:
    """Returns a copy of a module in which each dropout is a mask, by its name, or nothing. All else is shared."""
    changed: dict[str, nn.Module] = {}
    for name, part in module.named_children():
        path = prefix + name
        if isinstance(part, Dropout):
            changed[name] = Mask(masks[path]) if path in masks else nn.Identity()
        elif any(isinstance(inner, Dropout) for inner in part.modules()):
            changed[name] = with_masks(part, masks, f"{path}.")
    return replace_modules(module, **changed)


def kept_units(mask: Tensor) -> Tensor:
    """Returns the indices of the kept units, filled up with dropped ones (whose mask is 0) to a multiple of 16."""
    kept, dropped = mask.nonzero().squeeze(1), (mask == 0).nonzero().squeeze(1)
    size = -(-max(len(kept), 1) // 16) * 16  # other sizes are slower, and torch warns of 0
    return torch.cat([kept, dropped])[:size]


def thin_linear(
    linear: nn.Linear,
    *,
    kept_in: Tensor | None = None,
    mask_in: Tensor | None = None,
    kept_out: Tensor | None = None,
    scale_out: Tensor | None = None,
) -> nn.Linear:
    """Returns the layer with rows and columns cut (indices) or scaled (masks); itself if nothing is given."""
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if kept_out is not None:
        kept_out = kept_out.to(weight.device)
        weight = weight.index_select(0, kept_out)
        bias = None if bias is None else bias.index_select(0, kept_out)
    if mask_in is not None:
        if kept_in is not None:
            weight, mask_in = weight.index_select(1, kept_in.to(weight.device)), mask_in[kept_in]
        # In place if the weights are a copy already: fresh memory costs more than the product.
        weight = torch.mul(weight, mask_in.to(weight), out=None if weight is linear.weight else weight)
    if scale_out is not None:
        weight = torch.mul(weight, scale_out.to(weight)[:, None], out=None if weight is linear.weight else weight)
        bias = None if bias is None else bias * scale_out.to(bias)
    if weight is linear.weight:
        return linear
    thinned = nn.Linear.__new__(nn.Linear)  # its __init__ would draw initial weights
    nn.Module.__init__(thinned)
    thinned.out_features, thinned.in_features = weight.shape
    thinned.weight = nn.Parameter(weight, requires_grad=False)
    thinned.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return thinned


def replace_modules(module: M, **changed: nn.Module) -> M:
    """Returns a copy of a module that shares all parts with it but the given submodules."""
    copied = type(module).__new__(type(module))
    for name, value in vars(module).items():
        vars(copied)[name] = value.copy() if isinstance(value, dict) else value
    for name, submodule in changed.items():
        setattr(copied, name, submodule)
    return copied
