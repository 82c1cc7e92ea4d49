"""Draws masks: what thinned networks drop and share, and what becomes of a prompt or an image in them.

A rate p drops a unit with probability p and scales what it keeps by 1 / (1 - p). A row of causal attention over t
positions is emptied with probability p^t.

In all functions `net` is a net with `thin` and a rate above 0, else a ValueError; `seed` is that of its ensemble, and
`samples` are networks of it.

Shapes: H heads, P positions, T tokens, S networks.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.models.dropout import Dropout, derive_seed, dropout_mask, sample_masks, watched
from thinned.models.net import net_offers
from thinned.models.thinning import with_masks
from thinned.uncertainty.estimates import wilson
from thinned.uncertainty.intervals import t_interval

KEPT, DROPPED, EMPTY = "#1f3b63", "#f3c18a", "#c2410c"
MASKS = LinearSegmentedColormap.from_list("masks", [DROPPED, "#8aa5c9", KEPT])
VALUES = colormaps["viridis"].with_extremes(under=DROPPED, bad="white")
COLOURS = "dark is kept, orange dropped, light blue kept by one of the two networks"
POSITIONS, UNITS = 64, 256  # that are drawn at most: more would be smaller than a pixel
SMALL: dict[str, Any] = {"fontsize": 7}


def mask_figures(net: nn.Module, seed: int = 0, samples: tuple[int, int] = (0, 1), draws: int = 2) -> dict[str, Figure]:
    """Plots the masks of two thinned networks, what they share, and masks as training samples them.

    There is a figure for each layer of causal attention, with its heads side by side and the causal half alone, and one
    for each other site.
    """
    figures: dict[str, Figure] = {}
    units: dict[str, dict[str, Tensor]] = {}
    acting, both = _acting(net), [sample_masks(net, seed, sample) for sample in samples]
    for name, module in acting.items():
        one, other = ((masks[name] > 0).double() for masks in both)
        rows = {f"network {samples[0]}": one, f"network {samples[1]}": other, "together": (one + other) / 2}
        for draw in range(draws):
            drawn = dropout_mask(tuple(one.shape), module.p, seed=derive_seed("training", seed, draw, name))
            rows[f"training {draw + 1}"] = (drawn > 0).double()
        if _causal(module):
            layer = len(figures)
            title = f"{_place(layer, name, module)}: {COLOURS}"
            figures[f"masks_attention_layer{layer}"] = _heads(title, rows, MASKS, Normalize(0, 1), kept_above=0.5)
        else:
            units.setdefault(module.site, {})[name] = torch.stack([row.flatten() for row in rows.values()])
    for site, panels in units.items():
        figure, grid = _grid(len(panels), 1, f"Masks, site {site}: {COLOURS}", 1.3, 7.5)
        for (axes,), (name, lines) in zip(grid, panels.items(), strict=True):
            one, other, together = ((lines[:3] < 1).double().mean(1)).tolist()
            axes.imshow(lines[:, :UNITS].numpy(), MASKS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            shares = f"dropped {one:.3f} and {other:.3f}, by either {together:.3f}"
            axes.set_title(f"{name}: p = {acting[name].p:g}, {shares}, n = {lines.shape[1]}", **SMALL)
            axes.set_yticks(range(len(lines)), list(rows))
        grid[-1, 0].set_xlabel(f"unit (at most {UNITS} are shown)", **SMALL)
        figures[f"masks_{site}"] = figure
    return figures


def attention_figures(
    net: nn.Module, tokens: Tensor, labels: Sequence[str], seed: int = 0, sample: int = 0
) -> dict[str, Figure]:
    """Draws the attention probabilities of a prompt (T,), whose tokens have labels, in a network: a figure a layer.

    They are shown before dropout, after it (times the mask, over 1 - p), and as the network multiplies them with the
    values: under the mask alone, since 1 / (1 - p) is in the weights of its values. Empty rows are marked.
    """
    acting = _acting(net, causal=True)
    seen: dict[str, list[Tensor]] = {}
    network, T = net_offers(net).thin(seed, sample), len(tokens)  # type: ignore[misc]  # `_acting` has looked
    with torch.no_grad(), watched(network, lambda name, _, *pair: seen.update({name: [x[0].double() for x in pair]})):
        network(tokens[None])
    masks, figures = sample_masks(net, seed, sample), {}
    for layer, (name, module) in enumerate(acting.items()):
        before, used = seen[name]  # (H, T, T)
        after = before * masks[name][:, :T, :T].to(before)
        rows = {"before dropout": before, f"after: × mask / {1 - module.p:g}": after, "as used: × mask": used}
        title = f"{_place(layer, name, module)}: attention in network {sample}, orange is dropped"
        norm = PowerNorm(0.5, 1e-30, float(after.max()))  # 0 is below it
        figures[f"prompt_layer{layer}"] = figure = _heads(title, rows, VALUES, norm, 0.0, labels)
        _colour_bar(figure, figure.axes[0].images[0], figure.axes, "attention weight", 0.4)
    return figures


def example_figure(
    net: nn.Module, example: Tensor, title: str, seed: int = 0, samples: Sequence[int] = (0, 1)
) -> Figure:
    """Draws the activations of an image (C, H, W), or of features (D,), before and after each mask of networks.

    Pixels lie as in the image, the attention on patches as the patches do, and units in lines of 32.
    """
    acting = _acting(net)
    figure, grid = _grid(len(acting), 2 * len(samples), f"{title}. Orange is dropped", 1.6, 2.0)
    for column, sample in enumerate(samples):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        network = with_masks(net, sample_masks(net, seed, sample, dtype=example.dtype))
        with torch.no_grad(), watched(network, lambda name, _, *pair, to=seen: to.update({name: pair})):
            network(example[None])
        for (name, module), panels in zip(acting.items(), grid[:, 2 * column : 2 * column + 2], strict=True):
            before, after = (x[0] for x in seen[name])
            gone = (after == 0) & (before != 0)
            low, high = (float(end) for end in torch.stack([before, after]).aminmax())
            norm = Normalize(low, high)
            for axes, values in zip(panels, (before, after.masked_fill(gone, low - 1)), strict=True):
                picture, aspect = _laid_out(values, module.site, example)
                axes.imshow(picture.numpy(), VALUES, norm, aspect=aspect, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            active = int((before != 0).sum())
            dropped = f"dropped {int(gone.sum()) / active:.3f} of n = {active} active"
            panels[0].set_title(f"{name.removeprefix('stages.')}\nnetwork {sample}, before", **SMALL)
            panels[1].set_title(f"site {module.site}, p = {module.p:g}, after\n{dropped}", **SMALL)
            _colour_bar(figure, panels[1].images[0], panels[1], "activation", 1.0)
    return figure


def empty_rows_figure(net: nn.Module, seed: int = 0, num_networks: int = 50) -> Figure:
    """Draws the share of rows over t positions that S networks have emptied, beside p^t.

    The bars are 95 % intervals over networks, layers and heads (Wilson 1927). That of all rows, in the title, is
    Student's over networks.
    """
    acting = _acting(net, causal=True)
    networks = (sample_masks(net, seed, sample, ["attention"]) for sample in range(num_networks))
    empty = torch.stack(
        [torch.cat([masks[name].tril().count_nonzero(-1) == 0 for name in acting]) for masks in networks]
    )
    n, counts = empty[..., 0].numel(), empty.sum((0, 1)).numpy()  # (P,)
    p, t = next(iter(acting.values())).p, np.arange(1, len(counts) + 1)
    over = t_interval(empty.double().mean((1, 2)).tolist())
    shown = t[: np.flatnonzero(counts).max(initial=0) + 1]
    share, bounds = counts[: len(shown)] / n, np.transpose([wilson(int(count), n) for count in counts[: len(shown)]])
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(shown, p**shown, color=KEPT, label=f"$p^t$, p = {p:g}")
    label = f"observed, n = {n} for each t"
    axes.errorbar(shown, share, np.abs(bounds - share), fmt="o", color=EMPTY, markersize=4, capsize=2, label=label)
    axes.set(xlabel="positions t that a row attends to", ylabel="share of rows that are empty", yscale="log")
    axes.set(xticks=shown)
    said = f"{over.value:.5f} [{over.low:.5f}, {over.high:.5f}] of all rows in {num_networks} networks are empty"
    axes.set_title(f"{said},\nexpected are {(p**t).mean():.5f}", fontsize=8)
    axes.legend(frameon=False)
    return figure


def _acting(net: nn.Module, causal: bool = False) -> dict[str, Dropout]:
    """Returns the dropout modules with a rate above 0, or those of causal attention alone, by their names."""
    modules = {name: module for name, module in net.named_modules() if isinstance(module, Dropout) and module.p > 0}
    found = {name: module for name, module in modules.items() if _causal(module) or not causal}
    thins = net_offers(net).thin is not None
    if not thins or not found:
        got = f"{type(net).__name__} with {'rates of 0 alone' if thins else 'one without `thin`'}"
        raise ValueError(f"Expected a net with `thin` and {'attention ' if causal else ''}dropout, but got {got}")
    return found


def _causal(module: Dropout) -> bool:
    return module.shape is not None and len(module.shape) == 3  # (H, P, P)


def _place(layer: int, name: str, module: Dropout) -> str:
    return f"Layer {layer} ({name.rpartition('.')[0]}), site {module.site}, p = {module.p:g}"


def _heads(
    title: str, rows: dict[str, Tensor], colours: Any, norm: Normalize, kept_above: float, labels: Sequence[str] = ()
) -> Figure:
    """Draws the causal half of (H, T, T), a line of panels for each row, and marks rows that are empty."""
    H, T, _ = next(iter(rows.values())).shape
    size, below = min(T, POSITIONS), torch.ones(T, T).tril() > 0
    figure, grid = _grid(len(rows), H, title, 1.7, 1.9)
    for (label, values), panels in zip(rows.items(), grid, strict=True):
        for head, axes in enumerate(panels):
            half = values[head].where(below, torch.nan)[:size, :size]
            axes.imshow(half.numpy(), colours, norm, interpolation="nearest")
            empty = (values[head].tril().count_nonzero(-1) == 0).nonzero().flatten()
            at = empty[empty < size].numpy()
            axes.plot(at + 1 + size / 40, at, marker="<", linestyle="", color=EMPTY, markersize=4)
            dropped = 1 - float((values[head][below] > kept_above).double().mean())
            axes.set_title(
                f"head {head}: dropped {dropped:.3f},\n{len(empty)} empty rows, n = {int(below.sum())}", **SMALL
            )
            if 0 < len(labels) <= 24:
                axes.set_xticks(range(T), labels, parse_math=False)
                axes.set_yticks(range(T), labels, parse_math=False)
        panels[0].set_ylabel(f"{label}\nquery", **SMALL)
    for axes in grid[-1]:
        axes.set_xlabel("key" if size == T else f"key (the first {size} of {T})", **SMALL)
    return figure


def _grid(lines: int, columns: int, title: str, height: float, width: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * columns + 0.7, height * lines + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.tick_params(labelsize=6)
    return figure, grid


def _colour_bar(figure: Figure, image: AxesImage, beside: Any, label: str, shrink: float) -> None:
    bar = figure.colorbar(image, ax=beside, shrink=shrink).ax
    bar.set_ylabel(label, **SMALL)
    bar.tick_params(labelsize=6)


def _laid_out(values: Tensor, site: str, example: Tensor) -> tuple[Tensor, str]:
    """Returns activations of an example as a picture, and its aspect: pixels, patches, or units."""
    if example.dim() == 3:
        if site == "embedding" and values.shape == (example.numel(),):
            return values.view(-1, example.shape[2]), "equal"  # channels below each other
        if site == "attention":
            return values.view(-1, example.shape[2] // math.isqrt(example[0].numel() // len(values))), "equal"
    lines = values if values.dim() == 2 else F.pad(values, (0, -len(values) % 32), value=torch.nan).view(-1, 32)
    return lines, "auto"
