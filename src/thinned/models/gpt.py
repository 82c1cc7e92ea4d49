"""Defines the GPT, a causal transformer (Radford et al. 2019, GPT-2; Vaswani et al. 2017), and its thinned networks.

It has learned positions, layer norm before each sub-layer, one query-key-value projection, and tied embeddings.

Shapes: B batch, T time (tokens), P positions (the context length), C width, H heads, D = C / H, V vocabulary.
"""

import math
from collections.abc import Collection
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thinned.models.dropout import Dropout, DropoutRates, Mask, sample_masks
from thinned.models.thinning import thin_linear, thin_modules

LOGITS_AT_ONCE = 2**24  # the most that the loss holds: 64 MiB in fp32


class KVCache:
    """Holds keys and values of the tokens seen so far, so that a forward pass takes only the new ones."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, new: Tensor, capacity: int) -> Tensor:
        """Adds a layer's keys and values (2, B, H, T, D) and returns all that it has, (2, B, H, length + T, D)."""
        if layer not in self._layers:
            self._layers[layer] = new.new_empty((*new.shape[:3], capacity, new.shape[4]))
        end = self.length + new.shape[3]
        self._layers[layer][:, :, :, self.length : end] = new
        return self._layers[layer][:, :, :, :end]


class AttentionMask(Mask):
    """Multiplies attention probabilities (B, H, T, S), of the last T of S positions, by a fixed mask (H, P, P)."""

    def forward(self, probs: Tensor) -> Tensor:
        T, S = probs.shape[-2:]
        mask = self.mask[:, S - T : S, :S]
        return probs * mask if self.watched or torch.is_grad_enabled() else probs.mul_(mask)  # fresh memory is slow


class Attention(nn.Module):
    """Attends to earlier tokens, with dropout on the probabilities, after the softmax, and on the projected output."""

    def __init__(self, width: int, num_heads: int, context_length: int, bias: bool, dropout: DropoutRates) -> None:
        super().__init__()
        self.num_heads, self.context_length = num_heads, context_length
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        mask_shape = (num_heads, context_length, context_length)
        self.attention_dropout: nn.Module = Dropout(dropout.attention, "attention", mask_shape)
        self.projection = nn.Linear(width, width, bias=bias)
        self.residual_dropout = Dropout(dropout.residual, "residual", (width,))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(self, qkv[1:], self.context_length)
        mixed = self.attend(query, key, value)  # (B, H, T, D)
        return self.residual_dropout(self.projection(mixed.transpose(1, 2).reshape(B, T, C)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns softmax(q k / sqrt(D)) v, with dropout after the softmax; queries are the last T of S positions."""
        (B, H, T, D), S = query.shape, key.shape[2]
        drop = self.attention_dropout
        p = drop.p if isinstance(drop, Dropout) and drop.training else 0.0
        fused = p == 0 or (p < 1 and query.is_cuda and not drop.watched)  # SDPA's dropout is slow on the CPU
        if fused and not isinstance(drop, Mask):
            seen = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
            return F.scaled_dot_product_attention(query, key, value, seen, p, is_causal=T == S)
        future = torch.full((T, S), -torch.inf, dtype=query.dtype, device=query.device).triu(S - T + 1)
        scores = torch.baddbmm(future, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=D**-0.5)  # (B H, T, S)
        probs = drop(torch.softmax(scores, dim=-1).view(B, H, T, S))
        return probs.to(value.dtype) @ value


class FeedForward(nn.Module):
    """Applies two linear layers with a GELU to each token, with dropout after the GELU and on the output."""

    def __init__(self, width: int, bias: bool, gelu: str, dropout: DropoutRates) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU("tanh" if gelu == "tanh" else "none")
        self.mlp_dropout = Dropout(dropout.mlp, "mlp", (4 * width,))
        self.down = nn.Linear(4 * width, width, bias=bias)
        self.residual_dropout = Dropout(dropout.residual, "residual", (width,))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_dropout(self.down(self.mlp_dropout(self.gelu(self.up(x)))))


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, width: int, num_heads: int, context_length: int, bias: bool, gelu: str, dropout: DropoutRates
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, num_heads, context_length, bias, dropout)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.mlp = FeedForward(width, bias, gelu, dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Predicts the next token at every position. Logits carry no dropout.

    Args:
        vocab_size: V, padded inside to a multiple of 64 for fast matrix products; null takes it from the data.
        context_length: P, the number of positions; null takes it from the data.
        num_layers: Number of blocks.
        num_heads: H, which divides the width.
        width: C of the residual stream; hidden layers have 4 C.
        bias: Whether linear layers and layer norms have one, as in GPT-2.
        gelu: exact, or tanh, the approximation that GPT-2's weights expect.
        activation_checkpointing: Keep only each block's input and recompute the rest: less memory, a third more time.
        dropout: Rates per site. embedding is on the sum of token and position; residual is on both sub-layers.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        context_length: int | None = None,
        num_layers: int = 6,
        num_heads: int = 6,
        width: int = 384,
        bias: bool = False,
        gelu: Literal["exact", "tanh"] = "exact",
        activation_checkpointing: bool = False,
        dropout: DropoutRates = DropoutRates(),
    ) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {
            "vocab_size": vocab_size, "context_length": context_length, "num_layers": num_layers,
            "num_heads": num_heads, "width": width, "bias": bias, "gelu": gelu,
            "activation_checkpointing": activation_checkpointing, "dropout": vars(dropout).copy(),
        }  # fmt: skip
        for key in ("vocab_size", "context_length", "num_layers", "num_heads", "width"):
            value = self.init_args[key]
            if value is None or value < 1:
                raise ValueError(f"Expected net.{key} to be at least 1, but got {value}")
        if width % num_heads:
            raise ValueError(f"Expected net.num_heads to divide net.width {width}, but got {num_heads}")
        if gelu not in ("exact", "tanh"):
            raise ValueError(f"Expected net.gelu to be exact or tanh, but got {gelu!r}")
        self.vocab_size, self.context_length = cast(int, vocab_size), cast(int, context_length)
        self.activation_checkpointing = activation_checkpointing

        self.token_embedding = nn.Embedding(-(-self.vocab_size // 64) * 64, width)
        self.position_embedding = nn.Embedding(self.context_length, width)
        self.embedding_dropout = Dropout(dropout.embedding, "embedding", (width,))
        blocks = [Block(width, num_heads, self.context_length, bias, gelu, dropout) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, len(self.token_embedding.weight), bias=False)
        self.head.weight = self.token_embedding.weight
        self.initialise()

    def initialise(self) -> None:
        """Draws GPT-2's initial weights: N(0, 0.02), divided by sqrt(2 layers) where a sub-layer meets the residual."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = 2 * len(self.blocks) if name.endswith(("projection.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Returns the head's input (B, T, C) for tokens (B, T)."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.context_length:
            raise ValueError(f"Expected at most {self.context_length} tokens (net.context_length), but got {end}")
        if tokens.is_cpu and not torch.compiler.is_compiling() and tokens.numel():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"Expected tokens in [0, {self.vocab_size}) (net.vocab_size), but got {low} to {high}")
        position = torch.arange(start, end, device=tokens.device)
        x = self.embedding_dropout(self.token_embedding(tokens) + self.position_embedding(position))  # (B, T, C)
        for block in self.blocks:
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits (..., V) of features (..., C), without the rows that pad the vocabulary."""
        return self.head(features)[..., : self.vocab_size]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Returns the logits (B, T, V), or with targets their negative log-likelihoods (B, T) in nats; -100 gives 0.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, the token after each, or -100 if there is none.
            cache: Keys and values of the tokens before these; those of `tokens` are added.

        Raises:
            ValueError: More tokens than positions; on the CPU, a token outside the vocabulary.
        """
        x = self.features(tokens, cache)
        if targets is None:
            return self.logits(x)
        rows = max(1, LOGITS_AT_ONCE // self.head.out_features)
        if targets.numel() <= rows:
            return self._nll(x, targets)
        chunks = zip(torch.split(x.flatten(0, 1), rows), torch.split(targets.flatten(), rows), strict=True)
        parts = [checkpoint(self._nll, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
        return torch.cat(parts).view_as(targets)

    def _nll(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(x).flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def flops_per_token(self) -> int:
        """Returns the floating point operations of a training step, per token (Chowdhery et al. 2022, appendix B).

        They are 6 per weight, positions excepted, and 12 C P per block for attention over the full context.
        """
        weights = sum(p.numel() for p in self.parameters()) - self.position_embedding.weight.numel()
        return 6 * weights + 12 * len(self.blocks) * self.norm.normalized_shape[0] * self.context_length

    @torch.no_grad()
    def thin(self, seed: int, sample: int, sites: Collection[str] | None = None, scale: float = 1.0) -> "GPT":
        """Returns a thinned network: a GPT without dropout that computes what this one does under `sample_masks`.

        The same masks act on all sequences. Those of attention stay, the others go into the weights.
        """
        masks = sample_masks(self, seed, sample, sites, scale, self.norm.weight.dtype)
        of_embedding = masks.pop("embedding_dropout", None)
        of_attention = {name: masks.pop(name) for name in [*masks] if name.endswith("attention_dropout")}
        changed: dict[str, nn.Module] = {}
        for name, mask in of_attention.items():  # (H, P, P)
            qkv: Any = self.get_submodule(at := name.replace("attention_dropout", "qkv"))
            scale_of_values = mask.new_ones(3, qkv.in_features)
            scale_of_values[2] = mask.amax()  # 1 / (1 - p)
            changed[at] = thin_linear(qkv, scale_out=scale_of_values.flatten())
            changed[name] = AttentionMask((mask > 0).to(qkv.weight.device))
        if of_embedding is not None:
            for name in ("token_embedding", "position_embedding"):
                weight = self.get_parameter(f"{name}.weight")
                scaled = weight * of_embedding.to(weight)
                changed[name] = nn.Embedding.from_pretrained(scaled)  # type: ignore[no-untyped-call]
        return thin_modules(self, masks, **changed)
