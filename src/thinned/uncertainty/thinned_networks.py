"""The thinned networks of a net: each batch is evaluated the cheaper way, and what was made is kept for the next one.

Shapes: B inputs, S networks, K classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout
from thinned.models.net import net_offers

STACKED_INPUTS = 64
ROWS_AT_ONCE = 512  # networks times inputs in a stack: their activations stay in the cache
KEPT_BYTES = 2**29  # 512 MiB: 50 networks of 784-1024-1024-1024-10 take 182 MiB at a rate of 0.5


class ThinnedNetworks:
    """Makes the thinned networks of a net, and keeps them from one batch to the next.

    At most `STACKED_INPUTS` inputs pass through all weights, with the masks of many networks on the activations
    (`net.stack`). More inputs pass through the smaller weights of one network after the other (`net.thin`), which is
    cheaper as soon as it repays the cutting. The networks are the same, so the logits are too, up to rounding.

    What is kept depends on the net, its rates, its weights and the settings. They are compared in each pass: the
    weights element by element before a network that was cut from them is used, as their versions miss some changes.

    Args:
        max_bytes: What is kept takes no more, beside a copy of the weights. Networks beyond it are made in each pass.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._made_of: Any = None
        self._weights: list[Tensor] = []  # copies of those that networks were cut from
        self._kept: dict[int | range, nn.Module] = {}  # a network by its sample, a stack by its samples
        self._bytes = 0

    def sampled(self, net: nn.Module, num_samples: int, **settings: Any) -> Iterator[nn.Module]:
        """Yields S networks, modules from inputs (B, ...) to logits; settings are `seed`, `sites` and `scale`."""
        rates = [module.p for module in net.modules() if isinstance(module, Dropout)]
        weights = [(id(tensor), tensor.dtype, tensor.device) for tensor in _tensors(net)]
        made_of = (net, settings, rates, weights, torch.is_inference_mode_enabled())
        if made_of != self._made_of:
            self._forget()
            self._made_of = made_of
        passing = _Pass(self, net, num_samples, settings)
        stacks = net_offers(net).stack is not None and settings["scale"] > 0
        for sample in range(num_samples):
            yield _Sampled(passing, sample) if stacks else passing.network(sample)

    def kept_or_made(self, net: nn.Module, key: int | range, make: Callable[[], nn.Module]) -> nn.Module:
        """Returns what is kept under a key, or else makes it, and keeps it if there is room."""
        if key in self._kept:
            return self._kept[key]
        made = make()
        shared = {id(tensor) for tensor in _tensors(net)}
        size = sum(tensor.nbytes for tensor in _tensors(made) if id(tensor) not in shared)
        if self._bytes + size <= self.max_bytes:
            self._kept[key] = made
            self._bytes += size
        return made

    def forget_if_changed(self, net: nn.Module) -> None:
        """Forgets everything if a weight is not what it was when networks were cut from it."""
        weights = _tensors(net)
        if len(weights) != len(self._weights) or not all(map(torch.equal, weights, self._weights)):
            self._forget()
            self._weights = [tensor.detach().clone() for tensor in weights] if self.max_bytes else []

    def _forget(self) -> None:
        self._kept, self._bytes, self._weights = {}, 0, []


class _Pass:
    """What S networks make of a batch; the latest stack's logits wait for its other networks to be asked."""

    def __init__(self, kept: ThinnedNetworks, net: nn.Module, num_samples: int, settings: dict[str, Any]) -> None:
        self.kept, self.net, self.num_samples, self.settings = kept, net, num_samples, settings
        self._compared = False
        self._inputs: Any = None
        self._samples = range(0)
        self._logits = torch.empty(0)  # (networks of the stack, B, K)

    def network(self, sample: int) -> nn.Module:
        """Returns a network, cut from the weights as they are."""
        if not self._compared:
            self.kept.forget_if_changed(self.net)
            self._compared = True
        thin = net_offers(self.net).thin
        assert thin is not None, "Expected a net with `thin`"
        return self.kept.kept_or_made(self.net, sample, lambda: thin(sample=sample, **self.settings))

    def logits(self, sample: int, inputs: Any) -> Tensor:
        """Returns what a network makes of inputs: (B, K)."""
        if len(inputs) > STACKED_INPUTS:
            return self.network(sample)(inputs)
        at_once = max(1, ROWS_AT_ONCE // max(len(inputs), 1))
        first = sample - sample % at_once
        samples = range(first, min(first + at_once, self.num_samples))
        if self._inputs is not inputs or self._samples != samples:
            stack = net_offers(self.net).stack
            assert stack is not None, "Expected a net with `stack`"
            made = self.kept.kept_or_made(self.net, samples, lambda: stack(samples=samples, **self.settings))
            with torch.set_grad_enabled(torch.is_grad_enabled() and inputs.requires_grad):  # weights have no gradients
                self._inputs, self._samples, self._logits = inputs, samples, made(inputs)
        return self._logits[sample - first]


class _Sampled(nn.Module):
    """A network of a pass, which is made when the number of inputs is known."""

    def __init__(self, passing: _Pass, sample: int) -> None:
        super().__init__()
        self.passing, self.sample = passing, sample

    def forward(self, inputs: Any) -> Tensor:
        return self.passing.logits(self.sample, inputs)


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
