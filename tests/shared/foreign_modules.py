"""Modules as people write them. Those of `SITES` drop, and say what comes out for each mask; those of `OTHERS` do not.

Shapes: B batch, 2 channels. A mask has a bit, 0 or 2 (kept at the rate 0.5), for each of what a site can drop.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

P = 0.5


class Site(nn.Module):
    """Drops in training mode; `masked` is what it then returns for a mask of `bits` numbers."""

    bits = 2

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class Functional(Site):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, P, self.training)


class OwnModule(Site):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(P)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class InTrainingAlone(Site):
    """Whose dropout is not called in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, P) if self.training else x


class ModuleInTrainingAlone(Site):
    """Whose dropout module is not called in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(P)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training else x


class RateByMode(Site):
    """As the eager attention of `transformers`: the rate is 0 in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, P if self.training else 0.0, self.training)


class DropPath(nn.Module):
    """As in timm: drops the whole of an example."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (len(x), *[1] * (x.dim() - 1))
        return x * x.new_empty(shape).bernoulli_(P) / P if self.training else x


class Path(Site):
    bits = 1

    def __init__(self) -> None:
        super().__init__()
        self.path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + self.path(x)

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.tanh() + x * mask


class Attention(Site):
    """Of one query over two keys: a mask has a bit for each key."""

    def __init__(self) -> None:
        super().__init__()
        self.key_value = nn.Linear(2, 8)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.key_value(x).view(len(x), 2, 4).chunk(2, -1)
        return x[:, None], key, value

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=P if self.training else 0)[:, 0]

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return ((q @ k.mT / 2**0.5).softmax(-1) * mask @ v)[:, 0]


class MultiheadAttention(Site):
    """Of one query over two keys, by torch's module, which asks for its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, dropout=P, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.stack([x, x.flip(1)], 1)
        return self.attention(x[:, None], keys, keys, need_weights=False)[0][:, 0]

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        keys, of = torch.stack([x, x.flip(1)], 1), self.attention
        (q, k, v), bias = of.in_proj_weight.chunk(3), of.in_proj_bias.chunk(3)
        weights = (F.linear(x[:, None], q, bias[0]) @ F.linear(keys, k, bias[1]).mT / 2**0.5).softmax(-1)
        return of.out_proj(weights * mask @ F.linear(keys, v, bias[2]))[:, 0]


class Recurrent(Site):
    """The dropout of a GRU acts between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.GRU(2, 2, 2, dropout=P, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None])[0][:, 0]

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in (0, 1):
            weights = [getattr(self.layers, f"{n}_l{layer}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            x = torch.gru_cell(x if layer == 0 else x * mask, x.new_zeros(len(x), 2), *weights)
        return x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class HandWrittenNorm(nn.Module):
    """Assigns new averages, as in many textbooks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.25, -0.25]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return x - x.mean(0)
        return x - self.mean


class Counter(nn.Module):
    """Its state is a number and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.average = 0, torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps, self.average = self.steps + 1, 0.5 * self.average
        return x * self.average / (1 + self.steps)


class NeverActs(nn.Module):
    """Has a dropout that is switched off by a setting of its own."""

    apply_dropout = False

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, P, self.training and self.apply_dropout)


def batch_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(2)
    norm.running_mean.copy_(torch.tensor([0.5, -1.0]))
    norm.running_var.copy_(torch.tensor([0.5, 2.0]))
    return norm


SITES = [
    Functional, OwnModule, InTrainingAlone, ModuleInTrainingAlone, RateByMode, Path, Attention, MultiheadAttention,
    Recurrent,
]  # fmt: skip
OTHERS = [
    Noise, HandWrittenNorm, Counter, NeverActs, batch_norm, nn.RReLU, nn.Tanh, lambda: nn.Linear(2, 2),
    lambda: spectral_norm(nn.Linear(2, 2)), lambda: hooked_spectral_norm(nn.Linear(2, 2)),
]  # fmt: skip
