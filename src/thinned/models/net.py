"""Lists what a net may offer besides `forward`, and computes logits some rows at a time.

Shapes: B batch, N targets, C features, K classes (for text the vocabulary V).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from thinned.offers import Offers

LOGITS_AT_ONCE = 2**22  # 16 MiB in fp32, which stay in the cache


class NetOffers(Protocol):
    """Lists the optional attributes of a net that others read, with their defaults."""

    init_args: dict[str, Any] | None = None  # of `__init__`, as primitives: a checkpoint rebuilds the net from them
    input_shape: tuple[int, ...] | None = None  # of one example: this and the next are compared with the data
    num_classes: int | None = None  # K
    vocab_size: int | None = None  # V
    context_length: int | None = None  # the number of positions
    # `thin(seed, sample, sites, scale)`: a thinned network, with masks that all inputs share.
    thin: Callable[..., nn.Module] | None = None
    # `stack(seed, samples, sites, scale)`: S of them as one module, (B, ...) -> (S, B, K), cheaper for few inputs.
    stack: Callable[..., nn.Module] | None = None
    # `features(inputs)`, (B, T, C), and `logits(features)`, (n, C) -> (n, V): with V, not all logits exist at once.
    features: Callable[[Any], Tensor] | None = None
    logits: Callable[[Tensor], Tensor] | None = None
    constrain_max_norm_: Callable[[], None] | None = None  # runs after each optimiser step
    blocks: Sequence[nn.Module] = ()  # a sharded net gathers one at a time; without them, the whole net
    flops_per_token: Callable[[], int] | None = None  # of a training step, for the utilisation of the device


def net_offers(net: object) -> NetOffers:
    """Returns the optional attributes of a net, with the defaults for those that it lacks."""
    return cast(NetOffers, Offers(net, NetOffers))


def few_rows(num_rows: int, num_classes: int) -> Iterator[slice]:
    """Yields slices of a few rows each, whose logits over K classes stay in the cache."""
    at_once = max(1, LOGITS_AT_ONCE // num_classes)
    for start in range(0, max(1, num_rows), at_once):
        yield slice(start, start + at_once)


class Logits:
    """Computes the logits of N targets when they are indexed.

    Args:
        x: Logits (N, K), or the head's input (N, C).
        head: Maps (n, C) to logits (n, K).
        num_classes: K; None computes one row to see it.
    """

    def __init__(
        self, x: Tensor, head: Callable[[Tensor], Tensor] = lambda x: x, num_classes: int | None = None
    ) -> None:
        self.x, self.head = x, head
        self.num_classes = num_classes or head(x.flatten(0, -2)[:1]).shape[-1]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Returns the logits of some rows, (n, K), in fp32 or fp64."""
        logits = self.head(self.x[rows])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def select(self, chosen: Tensor | slice) -> "Logits":
        """Returns the logits that a mask over the leading dimensions of `x`, or a slice of the first, selects."""
        return Logits(self.x[chosen], self.head, self.num_classes)

    def log_probs(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields a few rows at a time and their log-probabilities (n, K)."""
        for rows in few_rows(len(self), self.num_classes):
            yield rows, torch.log_softmax(self[rows], dim=-1)


def logits_in(net: nn.Module, inputs: Any) -> Tensor:
    """Runs a net and returns its logits: its output, `logits` of a dict or dataclass, or the first of a tuple."""
    output, name = net(inputs), type(net).__name__
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        warnings.warn(f"The first of the {len(logits)} outputs of {name} is used as the logits.", stacklevel=2)
        logits = logits[0]
    if not isinstance(logits, Tensor):
        expected = "a tensor of logits, `logits` in a dict or dataclass, or a tuple that begins with them"
        raise ValueError(f"Expected {expected} from {name}, but got {type(output).__name__}")
    return logits


def check_logits(net: nn.Module, logits: Tensor) -> None:
    """Raises a ValueError for what cannot be logits (..., K): one number for each target, or probabilities."""
    name = type(net).__name__
    if logits.dim() < 2 or logits.shape[-1] < 2:
        got = f"the shape {tuple(logits.shape)}: a net for two classes returns (B, 2), such as [0, x]"
        raise ValueError(f"Expected logits of at least 2 classes from {name}, but got {got}")
    tolerance = 1e-3 if torch.finfo(logits.dtype).eps < 1e-4 else 1e-2
    sums = logits.detach().float().sum(-1)
    if (logits >= 0).all() and (sums - 1).abs().max() < tolerance:  # by chance in 1 of 1,000 rows at most
        raise ValueError(f"Expected logits from {name}, but got probabilities (rows sum to 1): leave out its softmax")


def logits_of(net: nn.Module, inputs: Any) -> Logits:
    """Returns a net's logits of inputs, which are computed when they are indexed if the net offers `features`."""
    offers = net_offers(net)
    if offers.features is None or offers.logits is None or offers.vocab_size is None:  # not a language model of ours
        return Logits(logits_in(net, inputs))
    return Logits(offers.features(inputs), offers.logits, offers.vocab_size)
