"""Defines dropout (Srivastava et al. 2014, JMLR 15): one module for every site, and masks as a function of a seed.

A unit is kept with probability 1 - p and scaled by 1 / (1 - p) in training, so evaluation is the identity.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS_AT_ONCE = 2**15  # 256 KiB of random bits, which stay in the cache
SITES = ("embedding", "attention", "residual", "mlp")


def check_sites(sites: Collection[str]) -> tuple[str, ...]:
    """Returns the sites in canonical order; ValueError for a name that is not in `SITES`."""
    if unknown := [site for site in sites if site not in SITES]:  # a string gives its letters
        raise ValueError(f"Expected sites among {list(SITES)}, but got {unknown}")
    return tuple(site for site in SITES if site in sites)


def check_rate(p: float, name: str) -> float:
    """Returns p as a float; ValueError if it is no probability."""
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:  # also False for NaN
        raise ValueError(f"Expected {name} to be a probability in [0, 1], but got {p!r}")
    return float(p)


@dataclass(frozen=True)
class DropoutRates:
    """Holds the probability of dropping a unit, per site.

    Args:
        embedding: On the embedded input.
        attention: On attention probabilities, after the softmax and before the product with the values.
        residual: On a sub-layer's output, before it is added back.
        mlp: On hidden activations, after the non-linearity.
    """

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0
    mlp: float = 0.0

    def __post_init__(self) -> None:
        for site, p in asdict(self).items():
            object.__setattr__(self, site, check_rate(p, f"dropout.{site}"))


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed: equal parts give equal seeds, on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def dropout_mask(shape: tuple[int, ...], p: float, dtype: torch.dtype | None = None, seed: int | None = None) -> Tensor:
    """Returns a scaled mask on the CPU: 0 with probability p, else 1 / (1 - p), independently per element.

    `bernoulli_` costs 8 to 20 ns an element on a CPU. A threshold on small random integers costs a tenth: 8 bits
    meet a p that is a multiple of 1/256 exactly, 16 bits meet p to 2^-17, and 32 bits, for p below 0.001 or above 0.5,
    to 2^-33. SFC64 (Doty-Humphrey 2010) draws the bits faster than torch's Mersenne twister.

    Args:
        shape: Shape of the mask.
        p: Probability of a zero, in [0, 1].
        dtype: The mask's dtype; None is torch's default dtype.
        seed: Seed of the mask; None draws one from torch's global generator.

    >>> dropout_mask((2, 4), 0.5, seed=0)
    tensor([[2., 2., 2., 0.],
            [2., 0., 0., 0.]])
    """
    mask = torch.empty(shape, dtype=dtype or torch.get_default_dtype())
    if p == 1:
        return mask.zero_()
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
    bits = 8 if (256 * p).is_integer() else 16 if 0.001 <= p <= 0.5 else 32
    half = 2 ** (bits - 1)
    least_kept = min(round(2 * half * p) - half, half - 1)  # the integers are signed
    words = np.random.SFC64(seed)
    for part in torch.split(mask.view(-1), WORDS_AT_ONCE * 64 // bits):
        drawn = torch.from_numpy(words.random_raw(-(-len(part) * bits // 64)).view(f"i{bits // 8}"))[: len(part)]
        part.copy_(drawn.ge_(least_kept)).mul_(1 / (1 - p))
    return mask


class Dropout(nn.Module):
    """Multiplies by a fresh mask in each call, while `training` is set.

    Args:
        p: Probability of zeroing an element, in [0, 1]; else a ValueError.
        site: Where this module stands, one of `SITES`; else a ValueError.
        shape: Shape of a mask that all examples share, without a batch dimension: `sample_masks` needs it.
    """

    watched = False  # whether the function `watched` sees its inputs and outputs

    def __init__(self, p: float, site: str, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        check_sites([site])
        self.p = check_rate(p, f"dropout.{site}")
        self.site, self.shape = site, shape

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.is_cpu and not torch.compiler.is_compiling():
            return x * dropout_mask(tuple(x.shape), self.p, x.dtype)
        return F.dropout(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"


class Mask(nn.Module):
    """Multiplies by a fixed mask, in place of a dropout that cannot be folded into weights."""

    watched = False  # as in `Dropout`

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def sites_in(net: nn.Module) -> tuple[str, ...]:
    """Returns the sites of a net at which something can be dropped (p > 0), in canonical order."""
    return check_sites({m.site for m in net.modules() if isinstance(m, Dropout) and m.p > 0})


def sample_masks(
    net: nn.Module,
    seed: int,
    sample: int,
    sites: Collection[str] | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Returns the masks of thinned network `sample`: one per `Dropout` of the net that acts, by module name.

    They lie on the CPU. What is dropped depends on (seed, sample, module name, p) alone, so the network is the same on
    every device and in every `dtype`. Only `sites` drop, or all if None; `scale` multiplies each rate.
    """
    chosen = SITES if sites is None else check_sites(sites)
    masks = {}
    for name, module in net.named_modules():
        if isinstance(module, Dropout) and module.p * scale > 0 and module.site in chosen:
            assert module.shape is not None, f"Expected a shape of the mask of {name}"
            p = check_rate(scale * module.p, f"scale * dropout.{module.site}")
            masks[name] = dropout_mask(module.shape, p, dtype, derive_seed(seed, sample, name))
    return masks


@contextmanager
def watched(net: nn.Module, see: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `see(name, module, before, after)` in each pass within the block, for each dropout and mask that acts.

    Attention computes its probabilities, even on CUDA, where a fused kernel hides them. No random number is drawn, and
    nothing else changes. Compiled nets may show nothing.
    """

    @torch.no_grad()
    def tell(name: str, module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, Mask) or (module.training and module.p > 0):
            see(name, module, inputs[0], output)

    with ExitStack() as stack:
        for name, module in net.named_modules():
            if isinstance(module, Dropout | Mask):
                stack.enter_context(module.register_forward_hook(partial(tell, name)))
                stack.callback(setattr, module, "watched", False)
                module.watched = True
        yield
