"""Puts masks into a network: in place of its dropout, or into its weights."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout, Mask

M = TypeVar("M", bound=nn.Module)


def with_masks(module: M, masks: dict[str, Tensor], prefix: str = "") -> M:
    """Returns a copy in which a mask, by module name, or nothing replaces each dropout. All else is shared."""
    changed: dict[str, nn.Module] = {}
    for name, part in module.named_children():
        path = prefix + name
        if isinstance(part, Dropout):
            changed[name] = Mask(masks[path]) if path in masks else nn.Identity()
        elif any(isinstance(inner, Dropout) for inner in part.modules()):
            changed[name] = with_masks(part, masks, f"{path}.")
    return replace_modules(module, **changed)


def kept_units(mask: Tensor) -> Tensor:
    """Returns the indices of the kept units, padded with dropped ones (whose mask is 0) to a multiple of 16."""
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
    thinned = replace_modules(linear)
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
