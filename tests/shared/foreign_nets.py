"""Nets as people write them, around attention and layers of torch, and what of them training mode can change."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    """As in nanoGPT: flash attention, or by hand."""

    def __init__(self, flash: bool, width: int = 8, heads: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(0.0)
        self.heads, self.dropout, self.flash = heads, dropout, flash

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            y = self.attn_dropout(scores.masked_fill(hidden, -torch.inf).softmax(-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class VisionAttention(nn.Module):
    """As in timm: its rate is that of a dropout module, which fused attention does not call."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.heads, self.attn_drop = nn.Linear(width, 3 * width), heads, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        p = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)


def in_turn(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), *modules, nn.Linear(2, 3)).eval()


def pooled(body: nn.Module) -> nn.Module:
    """(B, T, 8) -> the body -> the mean over T -> logits (B, 3)."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean(1))

    return Pooled()


class First(nn.Module):
    """The first of the outputs of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def state(net: nn.Module) -> list[Any]:
    """All that training mode can change: buffers, modes and attributes."""
    numbers = [value for m in net.modules() for value in vars(m).values() if isinstance(value, int | float)]
    tensors = [value for m in net.modules() for value in vars(m).values() if isinstance(value, Tensor)]
    return [numbers, [value.tolist() for value in (*net.buffers(), *net.parameters(), *tensors)]]
