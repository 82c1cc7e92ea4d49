"""Puts masks into a network: in place of its dropout, or into its weights."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout, Mask

M = TypeVar("M", bound=nn.Module)


def with_masks(net: M, masks: dict[str, Tensor]) -> M:
    """Returns a copy of a net in which a mask, by module name, or nothing replaces each dropout. All else is shared."""
    dropouts = [name for name, module in net.named_modules() if isinstance(module, Dropout)]
    return replace_modules(net, **{n: Mask(masks[n]) if n in masks else nn.Identity() for n in dropouts})


def thin_modules(net: M, masks: dict[str, Tensor], **others: nn.Module) -> M:
    """Returns a copy of a net without dropout that computes what the net does under masks, by module name.

    A mask (C,) scales the rows of the linear layer before it, or the columns of the one behind it. Units that it drops
    between two of them are cut out of both. Any other mask stays. `others` replace modules too, by name. All else is
    shared. Layers have to be registered in the order of a pass. If a mask scales columns, nothing but the layer behind
    may read what the dropout returns: a skip connection around that layer would miss the mask.
    """
    weights = next(net.parameters())
    layers = [(name, module) for name, module in net.named_modules() if not any(True for _ in module.children())]
    linears = {i: layer for i, (_, layer) in enumerate(layers) if isinstance(layer, nn.Linear)}
    folded: dict[int, dict[str, Tensor]] = {i: {} for i in linears}
    changed: dict[str, nn.Module] = {}
    for i, (name, layer) in enumerate(layers):
        if not isinstance(layer, Dropout):
            continue
        changed[name], mask = nn.Identity(), masks.get(name)
        if mask is None:
            continue
        foldable = mask.dim() == 1 and layer.site != "attention"
        if foldable and i - 1 in linears:
            folded[i - 1]["scale_out"] = mask
        elif foldable and i + 1 in linears:
            folded[i + 1]["mask_in"] = mask
            if layer.site == "mlp" and i - 2 in linears:  # an activation is in between
                folded[i - 2]["kept_out"] = folded[i + 1]["kept_in"] = kept_units(mask)
        else:
            changed[name] = Mask(mask.to(weights))
    changed |= {layers[i][0]: thin_linear(linear, **folded[i]) for i, linear in linears.items() if folded[i]}
    return replace_modules(net, **changed | others)


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
    """Returns a copy of the layer with rows and columns cut (indices) or scaled (masks)."""
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
    thinned = replace_modules(linear)
    thinned.out_features, thinned.in_features = weight.shape
    thinned.weight = nn.Parameter(weight, requires_grad=False)
    thinned.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return thinned


def replace_modules(module: M, **changed: nn.Module) -> M:
    """Returns a copy of a module with other submodules, by name, such as `blocks.0.mlp`. All else is shared."""
    copied = type(module).__new__(type(module))
    for name, value in vars(module).items():
        vars(copied)[name] = value.copy() if isinstance(value, dict) else value
    for name, part in module.named_children():
        below = {path.removeprefix(f"{name}."): new for path, new in changed.items() if path.startswith(f"{name}.")}
        if name in changed or below:
            setattr(copied, name, changed[name] if name in changed else replace_modules(part, **below))
    return copied
