"""Defines a multi-layer perceptron with up to four dropout sites, and its thinned networks.

The plain network is Srivastava et al. 2014 (sections 4 to 6 and appendix A); residual blocks are the transformer's
(Vaswani et al. 2017) without its attention; attention pooling is a softmax over image patches for one learned query.

Shapes: B batch, C channels, H x W image, P patches, E width, K classes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout, DropoutRates, sample_masks
from thinned.models.thinning import thin_modules, with_masks

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),  # nothing else reads its input, and fresh memory is slow
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class PatchEmbedding(nn.Module):
    """Projects square patches, which do not overlap, to the width E and adds learned positions. Out: (B, P, E)."""

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
    """Attends over patches with one learned query: softmax(q k / sqrt(E)), dropout, then the values. Out: (B, E)."""

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
    """Computes x + sublayer(x)."""

    def __init__(self, sublayer: nn.Module) -> None:
        super().__init__()
        self.sublayer = sublayer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sublayer(x)


class MLP(nn.Module):
    """Classifies images or feature vectors. Logits carry no dropout.

    Args:
        input_shape: Shape of one example, (C, H, W) for images or (D,) for features; null takes it from the data.
        num_classes: K; null takes it from the data.
        hidden: Width of each hidden layer, or with `residual` of each block's hidden layer.
        activation: The non-linearity.
        layer_norm: Normalise before each non-linearity, or with `residual` at each block's start and at the end.
        width: Project the input to this width first; None reads the raw input. The next two need it.
        residual: Each hidden layer becomes a block x + W2 act(W1 x) on a stream of `width`.
        patch_size: Embed square patches of this size and pool them by attention; None takes the image whole.
        max_norm: Bound on the L2 norm of each hidden unit's incoming weights after each step; None is no bound.
        dropout: Rates per site. embedding: on the raw input, or on its projection or patches; mlp: on hidden
            activations; residual: on a block's output; attention: on the softmax over patches.

    Raises:
        ValueError: A setting is outside its range, or a rate is for a site that this architecture lacks.
    """

    def __init__(
        self,
        input_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
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
        if input_shape is None or num_classes is None:
            raise ValueError(f"Expected net.input_shape and net.num_classes, but got {input_shape} and {num_classes}")
        self.init_args: dict[str, Any] = {
            "input_shape": list(input_shape), "num_classes": num_classes, "hidden": list(hidden),
            "activation": activation, "layer_norm": layer_norm, "width": width, "residual": residual,
            "patch_size": patch_size, "max_norm": max_norm, "dropout": vars(dropout).copy(),
        }  # fmt: skip
        _check(self.init_args)
        self.input_shape, self.num_classes, self.max_norm = tuple(input_shape), num_classes, max_norm

        size = width or math.prod(input_shape)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        if patch_size is None:
            stages["flatten"] = nn.Flatten()
            if width is not None:
                stages["embedding"] = nn.Linear(math.prod(input_shape), width)
            stages["embedding_dropout"] = Dropout(dropout.embedding, "embedding", (size,))
        else:
            stages["embedding"] = embedding = PatchEmbedding(input_shape, patch_size, size)
            patches = len(embedding.position)
            stages["embedding_dropout"] = Dropout(dropout.embedding, "embedding", (patches, size))
            query, key_value = nn.Parameter(torch.randn(size)), nn.Linear(size, 2 * size)
            attention_dropout = Dropout(dropout.attention, "attention", (patches,))
            stages["pooling"] = AttentionPooling(query, key_value, attention_dropout)
        for i, units in enumerate(hidden):
            if residual:
                block = OrderedDict[str, nn.Module](norm=nn.LayerNorm(size)) if layer_norm else OrderedDict()
                block["up"] = nn.Linear(size, units)
                block["activation"] = ACTIVATIONS[activation]()
                block["mlp_dropout"] = Dropout(dropout.mlp, "mlp", (units,))
                block["down"] = nn.Linear(units, size)
                block["residual_dropout"] = Dropout(dropout.residual, "residual", (size,))
                stages[f"block{i}"] = Residual(nn.Sequential(block))
            else:
                stages[f"linear{i}"] = nn.Linear(size, units)
                if layer_norm:
                    stages[f"norm{i}"] = nn.LayerNorm(units)
                stages[f"activation{i}"] = ACTIVATIONS[activation]()
                stages[f"mlp_dropout{i}"] = Dropout(dropout.mlp, "mlp", (units,))
                size = units
        if residual and layer_norm:
            stages["norm"] = nn.LayerNorm(size)
        stages["head"] = nn.Linear(size, num_classes)
        self.stages = nn.Sequential(stages)

    def forward(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        if shape != self.input_shape:
            raise ValueError(f"Expected inputs of shape {self.input_shape} (net.input_shape), but got {shape}")
        return self.stages(x)  # (B, K)

    @torch.no_grad()
    def constrain_max_norm_(self) -> None:
        """Scales down, in place, the incoming weights of each hidden unit whose L2 norm exceeds `max_norm`."""
        if self.max_norm is not None:
            for name, module in self.stages.named_modules():
                if isinstance(module, nn.Linear) and name.rpartition(".")[2].startswith(("linear", "up")):
                    norms = torch.linalg.vector_norm(module.weight, dim=1, keepdim=True)  # sharded weights lack renorm
                    module.weight.mul_((self.max_norm / (norms + 1e-7)).clamp_max(1))

    @torch.no_grad()
    def thin(self, seed: int, sample: int, sites: Collection[str] | None = None, scale: float = 1.0) -> nn.Sequential:
        """Returns a thinned network: layers without dropout that compute what this net does under `sample_masks`.

        All examples share the masks. Those of patches and of attention stay, the others go into the weights.

        >>> net = MLP((4,), 3, (100,), dropout=DropoutRates(mlp=0.5))
        >>> net.thin(seed=0, sample=0).linear0  # 49 of 100 units are kept, padded to a multiple of 16
        Linear(in_features=4, out_features=64, bias=True)
        """
        return thin_modules(self, sample_masks(self, seed, sample, sites, scale)).stages

    def stack(
        self, seed: int, samples: Sequence[int], sites: Collection[str] | None = None, scale: float = 1.0
    ) -> "MLP":
        """Returns S thinned networks as one module, from inputs (B, ...) to logits (S, B, K).

        It shares all weights. The first mask, (S, 1, ...), repeats its input S times: what is before it runs once.
        """
        each = [sample_masks(self, seed, sample, sites, scale) for sample in samples]
        stacked = {name: torch.stack([masks[name] for masks in each]) for name in each[0]}
        if not stacked:
            embedding: Any = self.stages.get_submodule("embedding_dropout")
            stacked["stages.embedding_dropout"] = torch.ones(len(samples), *embedding.shape)
        weights = next(self.parameters())
        return with_masks(self, {name: masks.unsqueeze(1).to(weights) for name, masks in stacked.items()})


def _check(config: dict[str, Any]) -> None:
    """Raises ValueError for a setting outside its range, and for a rate at a site that the net lacks."""
    given = config | {f"dropout.{site}": rate for site, rate in config["dropout"].items()}
    shape, hidden, width, patch = (given[key] for key in ("input_shape", "hidden", "width", "patch_size"))
    divides = patch is None or (patch >= 1 and len(shape) == 3 and not any(size % patch for size in shape[1:]))
    for key, valid, expected in (
        ("input_shape", min(shape, default=0) >= 1, "to hold positive sizes"),
        ("num_classes", given["num_classes"] >= 2, "to be at least 2"),
        ("hidden", min(hidden, default=1) >= 1, "to hold positive widths"),
        ("activation", given["activation"] in ACTIVATIONS, f"to be one of {list(ACTIVATIONS)}"),
        ("width", width is None or width >= 1, "to be positive or null"),
        ("width", width or not (given["residual"] or patch), "to be set if net.residual or net.patch_size is"),
        ("patch_size", divides, f"to divide the height and width of net.input_shape (C, H, W) {shape}"),
        ("max_norm", given["max_norm"] is None or given["max_norm"] > 0, "to be positive or null"),
        ("dropout.attention", patch or not given["dropout.attention"], "to be 0 without net.patch_size"),
        ("dropout.residual", (given["residual"] and hidden) or not given["dropout.residual"],
         "to be 0 without net.residual and net.hidden"),
        ("dropout.mlp", hidden or not given["dropout.mlp"], "to be 0 without net.hidden"),
    ):  # fmt: skip
        if not valid:
            raise ValueError(f"Expected net.{key} {expected}, but got {given[key]!r}")
