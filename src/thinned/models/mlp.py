"""A multi-layer perceptron with up to four dropout sites, and its thinned networks.

The plain network is Srivastava et al. 2014 (sections 4, 6 and appendix A); residual blocks are the transformer's
(Vaswani et al. 2017) without its attention; attention pooling is a softmax over image patches for one learned query.

Shapes: B batch, C channels, H x W image, K classes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout, DropoutRates, sample_masks
from thinned.models.thinning import AttentionPooling, Mask, PatchEmbedding, Residual, kept_units, thin_linear

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),  # nothing else reads its input, and fresh memory is slow
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """A classifier for images or feature vectors. Logits carry no dropout.

    Args:
        input_shape: of one example, (C, H, W) for images or (D,) for features.
        num_classes: K.
        hidden: width of each hidden layer (with `residual`: of each block's hidden layer).
        activation: relu, gelu, silu or tanh.
        layer_norm: normalise before each non-linearity (with `residual`: at each block's start and at the end).
        width: project the input to this width first; None reads the raw input. Needed by the next two.
        residual: each hidden layer becomes a block x + W2 act(W1 x) on a stream of `width`.
        patch_size: embed square patches of this size and pool them by attention; None takes the image whole.
        max_norm: bound on the L2 norm of each hidden unit's incoming weights; None for no bound. The training
            task applies it after each optimiser step (Srivastava et al. 2014, section 5.1).
        dropout: rates per site. embedding: on the raw input, or on its projection or patches; mlp: on hidden
            activations; residual: on a block's output; attention: on the softmax over patches.

    Raises:
        ValueError: a setting outside its range, or a rate for a site that this architecture lacks.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu",
        layer_norm: bool = False,
        width: int | None = None,
        residual: bool = False,
        patch_size: int | None = None,
        max_norm: float | None = None,
        dropout: DropoutRates = DropoutRates(),
    ) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {
            "input_shape": list(input_shape), "num_classes": num_classes, "hidden": list(hidden),
            "activation": activation, "layer_norm": layer_norm, "width": width, "residual": residual,
            "patch_size": patch_size, "max_norm": max_norm, "dropout": vars(dropout).copy(),
        }  # fmt: skip
        _check(self.init_args)
        self.input_shape, self.num_classes, self.max_norm = tuple(input_shape), num_classes, max_norm

        size = math.prod(input_shape)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        if patch_size is None:
            stages["flatten"] = nn.Flatten()
            if width is not None:
                stages["embedding"], size = nn.Linear(size, width), width
        else:
            assert width is not None
            stages["embedding"], size = PatchEmbedding(input_shape, patch_size, width), width
        stages["embedding_dropout"] = Dropout(dropout.embedding, "embedding")
        if patch_size is not None:
            query, key_value = nn.Parameter(torch.randn(size)), nn.Linear(size, 2 * size)
            stages["pooling"] = AttentionPooling(query, key_value, Dropout(dropout.attention, "attention"))
        for i, units in enumerate(hidden):
            if residual:
                stages[f"block{i}"] = Residual(_residual_sublayer(size, units, activation, layer_norm, dropout))
            else:
                stages[f"linear{i}"] = nn.Linear(size, units)
                if layer_norm:
                    stages[f"norm{i}"] = nn.LayerNorm(units)
                stages[f"activation{i}"] = ACTIVATIONS[activation]()
                stages[f"mlp_dropout{i}"] = Dropout(dropout.mlp, "mlp")
                size = units
        if residual and layer_norm:
            stages["norm"] = nn.LayerNorm(size)
        stages["head"] = nn.Linear(size, num_classes)
        self.stages = nn.Sequential(stages)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"Expected inputs of shape {self.input_shape} (net.input_shape), but got {tuple(x.shape[1:])}"
            )
        return self.stages(x)  # (B, K)

    @torch.no_grad()
    def constrain_max_norm_(self) -> None:
        """Scales down, in place, the incoming weights of each hidden unit whose L2 norm exceeds `max_norm`."""
        if self.max_norm is not None:
            for name, module in self.stages.named_modules():
                if isinstance(module, nn.Linear) and name.rpartition(".")[2].startswith(("linear", "up")):
                    norms = torch.linalg.vector_norm(module.weight, dim=1, keepdim=True)  # sharded weights lack renorm
                    module.weight.mul_((self.max_norm / (norms + 1e-7)).clamp_max(1))

    def masks(
        self, seed: int, sample: int, sites: Collection[str] | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """The masks of thinned network (seed, sample): one per acting `Dropout`, by module name, to look at.

        Each has the shape of one example at its place and is shared by all examples.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for path, chain in self.named_modules():
            size: tuple[int, ...] = (math.prod(self.input_shape),)
            for name, module in chain.named_children() if isinstance(chain, nn.Sequential) else ():
                if isinstance(module, nn.Linear):
                    size = (module.out_features,)
                elif isinstance(module, PatchEmbedding):
                    size = tuple(module.position.shape)
                elif isinstance(module, AttentionPooling):
                    shapes[f"{path}.{name}.attention_dropout"] = size[:1]
                elif isinstance(module, Dropout):
                    shapes[f"{path}.{name}"] = size
        return sample_masks(self, shapes, seed, sample, sites, scale)

    @torch.no_grad()
    def thin(self, seed: int, sample: int, sites: Collection[str] | None = None, scale: float = 1.0) -> nn.Sequential:
        """Thinned network `sample` of the ensemble `seed`: an ordinary module without dropout.

        Dropped hidden units are cut out of the weight matrices; embedding and residual masks scale rows or columns;
        only the masks on patches and on attention, which no weight can carry, stay as buffers. Equal to the
        network with `masks(seed, sample, sites, scale)` applied at its dropout modules. What no mask touches (uncut
        layers, norms) is shared with this network, not copied.
        """
        return _thin_chain(self.stages, _within(self.masks(seed, sample, sites, scale), "stages."))


def _residual_sublayer(size: int, units: int, activation: str, layer_norm: bool, dropout: DropoutRates) -> nn.Module:
    stages: OrderedDict[str, nn.Module] = OrderedDict(norm=nn.LayerNorm(size)) if layer_norm else OrderedDict()
    stages["up"] = nn.Linear(size, units)
    stages["activation"] = ACTIVATIONS[activation]()
    stages["mlp_dropout"] = Dropout(dropout.mlp, "mlp")
    stages["down"] = nn.Linear(units, size)
    stages["residual_dropout"] = Dropout(dropout.residual, "residual")
    return nn.Sequential(stages)


def _thin_chain(chain: nn.Sequential, masks: dict[str, Tensor]) -> nn.Sequential:
    """The chain without dropout, each mask folded into the linear layer before or after its place."""
    names, modules = zip(*chain.named_children(), strict=True)
    activations = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh)
    weights = next(chain.parameters())
    thinned: OrderedDict[str, nn.Module] = OrderedDict()
    kept: Tensor | None = None  # hidden units that the last linear layer still has; None for all
    mask_in: Tensor | None = None  # on the inputs of the next linear layer

    for i, (name, module) in enumerate(zip(names, modules, strict=True)):
        following = (*zip(names[i + 1 :], modules[i + 1 :], strict=True), ("", None), ("", None))
        if isinstance(module, nn.Linear):
            scale_out = masks.get(following[0][0])  # a dropout right behind this layer scales its rows
            hidden = masks.get(following[1][0]) if isinstance(following[0][1], activations) else None
            kept_out = None if hidden is None else kept_units(hidden)
            thinned[name] = thin_linear(module, kept_in=kept, mask_in=mask_in, kept_out=kept_out, scale_out=scale_out)
            kept, mask_in = kept_out, None
        elif isinstance(module, Dropout):
            if name not in masks or (i and isinstance(modules[i - 1], nn.Linear)):
                continue
            if isinstance(following[0][1], nn.Linear):
                mask_in = masks[name]
            else:
                thinned[name] = Mask(masks[name].to(weights))
        elif isinstance(module, Residual):
            assert isinstance(module.sublayer, nn.Sequential)
            thinned[name] = Residual(_thin_chain(module.sublayer, _within(masks, f"{name}.sublayer.")))
        elif isinstance(module, AttentionPooling):
            mask = masks.get(f"{name}.attention_dropout")
            attention_dropout = nn.Identity() if mask is None else Mask(mask.to(weights))
            thinned[name] = AttentionPooling(module.query, module.key_value, attention_dropout)
        else:
            thinned[name] = module
    return nn.Sequential(thinned)


def _within(masks: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The masks whose names start with the prefix, named without it."""
    return {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}


def _check(config: dict[str, Any]) -> None:
    """Raises ValueError for a setting outside its range, and for a rate at a site that is not there."""
    shape, hidden, width, patch_size = (config[key] for key in ("input_shape", "hidden", "width", "patch_size"))
    needs_width = config["residual"] or patch_size is not None
    divides = patch_size is None or (
        patch_size >= 1 and len(shape) == 3 and not any(size % patch_size for size in shape[1:])
    )
    max_norm = config["max_norm"]
    for key, valid, expected in (
        ("input_shape", shape and min(shape) >= 1, "to hold positive sizes"),
        ("num_classes", config["num_classes"] >= 2, "to be at least 2"),
        ("hidden", not hidden or min(hidden) >= 1, "to hold positive widths"),
        ("activation", config["activation"] in ACTIVATIONS, f"to be one of {list(ACTIVATIONS)}"),
        ("width", width is None or width >= 1, "to be positive or null"),
        ("width", width is not None or not needs_width, "to be set where net.residual or net.patch_size is"),
        ("patch_size", divides, f"to divide the height and width of net.input_shape (C, H, W) {shape}"),
        ("max_norm", max_norm is None or max_norm > 0, "to be positive or null"),
    ):
        if not valid:
            raise ValueError(f"Expected net.{key} {expected}, but got {config[key]!r}")
    lacking = {
        "attention": "" if patch_size is not None else "set net.patch_size and net.width",
        "residual": ""
        if config["residual"] and hidden
        else "set net.residual and net.width, with at least one net.hidden",
        "mlp": "" if hidden else "give at least one width in net.hidden",
    }
    for site, remedy in lacking.items():
        rate = config["dropout"][site]
        if remedy and rate > 0:
            raise ValueError(
                f"Expected net.dropout.{site} to be 0 for an MLP without that site, but got {rate}: "
                f"{remedy} to create it"
            )
