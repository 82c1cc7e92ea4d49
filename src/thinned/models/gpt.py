"""GPT: a causal transformer in one file (Radford et al. 2019, GPT-2; Vaswani et al. 2017), and its thinned networks.

Learned positions, layer norm before each sub-layer, fused query-key-value projection, head tied to the embedding.

Shapes: B batch, T time (tokens), P positions (the context length), C width, H heads, D = C / H, V vocabulary.
"""

import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thinned.models.dropout import Dropout, DropoutRates, sample_masks
from thinned.models.thinning import Mask, kept_units, replace_modules, thin_linear

NO_TARGET = -100  # a position whose loss is 0
LOGITS_AT_ONCE = 2**24  # of which the loss holds no more: 64 MiB in fp32


class KVCache:
    """Keys and values of the tokens seen so far, so that a forward pass takes only the new ones."""

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


class Attention(nn.Module):
    """Causal self-attention: dropout on the probabilities, after the softmax, and on the projected output."""

    def __init__(self, width: int, num_heads: int, context_length: int, bias: bool, dropout: DropoutRates) -> None:
        super().__init__()
        self.num_heads, self.context_length = num_heads, context_length
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.attention_dropout: nn.Module = Dropout(dropout.attention, "attention")
        self.projection = nn.Linear(width, width, bias=bias)
        self.residual_dropout: nn.Module = Dropout(dropout.residual, "residual")

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(self, qkv[1:], self.context_length)
        mixed = self.attend(query, key, value)  # (B, H, T, D)
        return self.residual_dropout(self.projection(mixed.transpose(1, 2).reshape(B, T, C)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(q k / sqrt(D)) with dropout, times v; the queries are the last T of S >= T positions."""
        (B, H, T, D), S = query.shape, key.shape[2]
        drop = self.attention_dropout
        active = isinstance(drop, Mask) or (isinstance(drop, Dropout) and drop.training and drop.p > 0)
        fused = isinstance(drop, Dropout) and query.is_cuda and drop.p < 1  # SDPA's dropout is slow on the CPU
        if not active or fused:
            p = drop.p if active and isinstance(drop, Dropout) else 0.0  # SDPA itself does not look at `training`
            if T in (1, S):
                return F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=T > 1)
            seen = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
            return F.scaled_dot_product_attention(query, key, value, seen, p)
        future = torch.full((T, S), -torch.inf, dtype=query.dtype, device=query.device).triu(S - T + 1)
        scores = torch.baddbmm(  # (B H, T, S)
            future.expand(B * H, T, S), query.reshape(B * H, T, D), key.reshape(B * H, S, D).mT, alpha=D**-0.5
        )
        probs = torch.softmax(scores, dim=-1).view(B, H, T, S)
        if not isinstance(drop, Mask):
            probs = drop(probs)
        elif torch.is_grad_enabled():
            probs = probs * drop.mask[:, S - T : S, :S]
        else:  # fresh memory costs more than the product
            probs.mul_(drop.mask[:, S - T : S, :S])
        return probs.to(value.dtype) @ value

    def thin(self, attention: Tensor | None, residual: Tensor | None) -> "Attention":
        """This layer under given masks: (H, P, P) stays, its scale and the residual mask (C,) go into weights."""
        qkv: nn.Linear = self.qkv
        drop: nn.Module = nn.Identity()
        if attention is not None:
            values = torch.ones(3, self.qkv.in_features, dtype=attention.dtype)
            values[2] = attention.amax()  # 1 / (1 - p)
            qkv = thin_linear(qkv, scale_out=values.flatten())
            drop = Mask((attention > 0).to(qkv.weight.device))
        projection = thin_linear(self.projection, scale_out=residual)
        return replace_modules(
            self, qkv=qkv, attention_dropout=drop, projection=projection, residual_dropout=nn.Identity()
        )


class FeedForward(nn.Module):
    """Two linear layers with a GELU, on each token alone: dropout after the GELU and on the output."""

    def __init__(self, width: int, bias: bool, gelu: str, dropout: DropoutRates) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU("tanh" if gelu == "tanh" else "none")
        self.mlp_dropout: nn.Module = Dropout(dropout.mlp, "mlp")
        self.down = nn.Linear(4 * width, width, bias=bias)
        self.residual_dropout: nn.Module = Dropout(dropout.residual, "residual")

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_dropout(self.down(self.mlp_dropout(self.gelu(self.up(x)))))

    def thin(self, mlp: Tensor | None, residual: Tensor | None) -> "FeedForward":
        """This layer under given masks: dropped hidden units are cut out, the residual mask goes into weights."""
        kept = None if mlp is None else kept_units(mlp)
        up = thin_linear(self.up, kept_out=kept)
        down = thin_linear(self.down, kept_in=kept, mask_in=mlp, scale_out=residual)
        return replace_modules(self, up=up, mlp_dropout=nn.Identity(), down=down, residual_dropout=nn.Identity())


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

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
    """A causal language model. Logits carry no dropout.

    Args:
        vocab_size: V, filled up inside to a multiple of 64, which matrix products like; null takes it from the data.
        context_length: P, the number of positions; null takes it from the data.
        num_layers: blocks.
        num_heads: H, which divides the width.
        width: C of the residual stream; hidden layers have 4 C.
        bias: whether linear layers and layer norms have one. GPT-2 has.
        gelu: exact, or tanh, the approximation that GPT-2's weights expect.
        activation_checkpointing: keep a block's input alone and compute the rest again in the backward pass, with
            the same masks: less memory, a third more time.
        dropout: rates per site. embedding: on token plus position; attention: on probabilities after the softmax;
            residual: on the output of both sub-layers; mlp: on hidden activations after the GELU.

    Raises:
        ValueError: a setting outside its range.
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
        assert vocab_size is not None
        assert context_length is not None
        self.vocab_size, self.context_length = vocab_size, context_length
        self.activation_checkpointing = activation_checkpointing

        self.token_embedding = nn.Embedding(-(-vocab_size // 64) * 64, width)
        self.position_embedding = nn.Embedding(context_length, width)
        self.embedding_dropout: nn.Module = Dropout(dropout.embedding, "embedding")
        self.blocks = nn.ModuleList(
            Block(width, num_heads, context_length, bias, gelu, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, len(self.token_embedding.weight), bias=False)
        self.head.weight = self.token_embedding.weight
        self.initialise()

    def initialise(self) -> None:
        """GPT-2's initial weights: N(0, 0.02), less by 1 / sqrt(2 layers) where a sub-layer meets the residual."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = 2 * len(self.blocks) if name.endswith(("projection.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads of tokens (B, T): (B, T, C)."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.context_length:
            raise ValueError(f"Expected at most {self.context_length} tokens (net.context_length), but got {end}")
        if tokens.is_cpu and not torch.compiler.is_compiling() and tokens.numel():
            lowest, highest = tokens.aminmax()
            if lowest < 0 or highest >= self.vocab_size:
                raise ValueError(
                    f"Expected tokens in [0, {self.vocab_size}) (net.vocab_size), but got {lowest} to {highest}"
                )
        position = torch.arange(start, end, device=tokens.device)
        x = self.embedding_dropout(self.token_embedding(tokens) + self.position_embedding(position))  # (B, T, C)
        for block in self.blocks:
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """What the head says of features (..., C): (..., V), without what fills up its rows."""
        return self.head(features)[..., : self.vocab_size]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits, or the loss where there are targets.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, the token after each, or -100 where there is none.
            cache: of the tokens before these; they are added to it.

        Returns:
            The logits (B, T, V); with targets their negative log-likelihoods (B, T) in nats, 0 where there is none,
            computed for as many tokens at once as give 2^24 logits.

        Raises:
            ValueError: more tokens than positions; on the CPU, a token outside the vocabulary.
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
        logits = self.logits(x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NO_TARGET, reduction="none")
        return losses.view_as(targets)

    def flops_per_token(self) -> int:
        """Floating point operations of a training step, per token, at the full context.

        6 N for products with the N weights (those of positions take part in none), 12 C P for attention in each
        block (Chowdhery et al. 2022, appendix B).
        """
        weights = sum(p.numel() for p in self.parameters()) - self.position_embedding.weight.numel()
        return 6 * weights + 12 * len(self.blocks) * self.norm.normalized_shape[0] * self.context_length

    def masks(
        self, seed: int, sample: int, sites: Collection[str] | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """The masks of thinned network (seed, sample): one per acting `Dropout`, by module name, to look at.

        They are shared by all sequences and, but for attention (H, P, P), by all positions: (C,) or (4 C,).
        """
        width, hidden = self.init_args["width"], 4 * self.init_args["width"]
        attention = (self.init_args["num_heads"], self.context_length, self.context_length)
        shape_at: dict[str, tuple[int, ...]] = {"attention": attention, "mlp": (hidden,)}
        shapes = {n: shape_at.get(m.site, (width,)) for n, m in self.named_modules() if isinstance(m, Dropout)}
        return sample_masks(self, shapes, seed, sample, sites, scale, self.norm.weight.dtype)

    @torch.no_grad()
    def thin(self, seed: int, sample: int, sites: Collection[str] | None = None, scale: float = 1.0) -> "GPT":
        """Thinned network `sample` of the ensemble `seed`: a GPT without dropout.

        Dropped hidden units are cut out; embedding and residual masks scale columns and rows; attention alone keeps
        a mask. Equal to the network with `masks(seed, sample, sites, scale)` applied at its dropout modules. What no
        mask touches is shared with this network, not copied.

        Args:
            seed: of the ensemble.
            sample: which network of it.
            sites: at which dropout acts; all when None.
            scale: by which all rates are multiplied.
        """
        masks = self.masks(seed, sample, sites, scale)
        blocks = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            at = f"blocks.{i}"
            attention_masks = (masks.get(f"{at}.attention.{site}_dropout") for site in ("attention", "residual"))
            mlp_masks = (masks.get(f"{at}.mlp.{site}_dropout") for site in ("mlp", "residual"))
            blocks.append(
                replace_modules(block, attention=block.attention.thin(*attention_masks), mlp=block.mlp.thin(*mlp_masks))
            )
        changed: dict[str, nn.Module] = {"blocks": nn.ModuleList(blocks), "embedding_dropout": nn.Identity()}
        if "embedding_dropout" in masks:
            for name in ("token_embedding", "position_embedding"):
                weight = getattr(self, name).weight
                scaled = weight * masks["embedding_dropout"].to(weight)
                changed[name] = nn.Embedding.from_pretrained(scaled)  # type: ignore[no-untyped-call]
        return replace_modules(self, **changed)
