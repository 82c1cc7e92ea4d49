"""The thinned networks of a net, one by one or many in a stack, kept from one batch to the next.

Shapes: B inputs, S networks, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout
from thinned.models.net import net_offers

KEPT_BYTES = 2**29  # 512 MiB: 50 networks of 784-1024-1024-1024-10 take 182 MiB at a rate of 0.5


class KeptNetworks:
    """Makes the thinned networks of a net, and keeps them for the batches to come.

    They depend on the net, its rates, its weights and the settings. All are compared before any is used again: the
    weights element by element if networks were cut from them, since their versions miss some changes.

    Args:
        max_bytes: What is kept takes no more, beside a copy of the weights. Networks beyond it are made in each pass.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._made_of: Any = None
        self._weights: list[Tensor] = []  # copies of those that networks were cut from
        self._kept: dict[int | range, nn.Module] = {}  # a network by its sample, a stack by its samples
        self._bytes = 0

    def networks(
        self, net: nn.Module, num_samples: int, at_once: int, seed: int, sites: Sequence[str] | None, scale: float
    ) -> Iterator[nn.Module]:
        """Yields S networks one by one (`net.thin`), or if `at_once` is above 1, so many in a stack (`net.stack`)."""
        rates = [module.p for module in net.modules() if isinstance(module, Dropout)]
        weights = [(id(tensor), tensor.dtype, tensor.device) for tensor in _tensors(net)]
        made_of = (net, seed, sites, scale, rates, weights, torch.is_inference_mode_enabled())
        if made_of != self._made_of:
            self._forget()
            self._made_of = made_of
        offers = net_offers(net)
        if at_once > 1:
            assert offers.stack is not None, "Expected a net with `stack`"
            for first in range(0, num_samples, at_once):
                samples = range(first, min(first + at_once, num_samples))
                yield self._kept_or_made(net, samples, partial(offers.stack, seed, samples, sites, scale))
            return
        assert offers.thin is not None, "Expected a net with `thin`"
        self._forget_if_changed(net)
        for sample in range(num_samples):
            yield self._kept_or_made(net, sample, partial(offers.thin, seed, sample, sites, scale))

    def _kept_or_made(self, net: nn.Module, key: int | range, make: Callable[[], nn.Module]) -> nn.Module:
        if key in self._kept:
            return self._kept[key]
        made = make()
        shared = {id(tensor) for tensor in _tensors(net)}
        size = sum(tensor.nbytes for tensor in _tensors(made) if id(tensor) not in shared)
        if self._bytes + size <= self.max_bytes:
            self._kept[key] = made
            self._bytes += size
        return made

    def _forget_if_changed(self, net: nn.Module) -> None:
        """Forgets everything if a weight is not what it was when networks were cut."""
        weights = _tensors(net)
        if len(weights) != len(self._weights) or not all(map(torch.equal, weights, self._weights)):
            self._forget()
            self._weights = [tensor.detach().clone() for tensor in weights] if self.max_bytes else []

    def _forget(self) -> None:
        self._kept, self._bytes, self._weights = {}, 0, []


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
