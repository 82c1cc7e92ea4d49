"""Makes the thinned networks of a net, one by one or many in a stack, and keeps them for the next batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout
from thinned.models.net import net_offers

KEPT_BYTES = 2**29  # 512 MiB: 50 networks of 784-1024-1024-1024-10 take 182 MiB at a rate of 0.5
# On a CPU, for 784-1024-1024-1024-10 (`scripts/bench mc_batch`), a stack is cheaper below about 100 inputs at a rate of
# 0.5, and below 25 if networks are kept; at a rate of 0.1 below more than 128, and about 130.
STACKED_INPUTS, ROWS_AT_ONCE = 64, 512  # networks times inputs in a stack: their activations stay in the cache
# On an H200, cutting 50 networks takes 69 ms, and a pass through kept ones 15 ms. A stack takes 1 ms for 128
# inputs, 6 for 1,000, 24 for 4,000 and 67 for 10,000.
STACKED_INPUTS_ON_GPU, ROWS_AT_ONCE_ON_GPU = 4096, 2**15


def rows_at_once(device: torch.device) -> int:
    """Returns how many rows of activations, networks times inputs, are computed at once."""
    return ROWS_AT_ONCE if device.type == "cpu" else ROWS_AT_ONCE_ON_GPU


def stacked_at_once(num_inputs: int, device: torch.device) -> int:
    """Returns how many networks to stack for this number of inputs; 0 if it is cheaper to run one after the other."""
    most = STACKED_INPUTS if device.type == "cpu" else STACKED_INPUTS_ON_GPU
    return rows_at_once(device) // max(num_inputs, 1) if num_inputs <= most else 0


class KeptNetworks:
    """Makes the thinned networks of a net, and keeps them for the batches to come.

    They are used again only if the net, its rates, its weights and the settings are the same. Weights from which
    networks were cut are compared element by element, since their versions miss some changes.

    Args:
        max_bytes: Memory for networks, beside a copy of the weights. Networks that do not fit are made in each pass.
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
        """Yields S networks one by one (`net.thin`), or in stacks of `at_once` (`net.stack`) if that is above 0."""
        weights = [*net.parameters(), *net.buffers()]
        make: Any = net_offers(net).stack if at_once else net_offers(net).thin
        rates = [module.p for module in net.modules() if isinstance(module, Dropout)]
        identity = {id(tensor): (tensor.dtype, tensor.device) for tensor in weights}
        made_of = (net, seed, sites, scale, rates, identity, torch.is_inference_mode_enabled())
        if made_of != self._made_of or not (at_once or all(map(torch.equal, weights, self._weights))):
            self._made_of, self._weights, self._kept, self._bytes = made_of, [], {}, 0
        if self.max_bytes and not (at_once or self._weights):
            self._weights = [tensor.detach().clone() for tensor in weights]
        for first in range(0, num_samples, at_once or 1):
            key = range(first, min(first + at_once, num_samples)) if at_once else first
            made = self._kept.get(key)
            if made is None:
                made = make(seed, key, sites, scale)
                own = (*made.parameters(), *made.buffers())
                size = sum(tensor.nbytes for tensor in own if id(tensor) not in identity)
                if self._bytes + size <= self.max_bytes:
                    self._kept[key] = made
                    self._bytes += size
            yield made
