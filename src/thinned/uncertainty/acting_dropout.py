"""Passes of a net in which dropout acts and nothing else does, with a given random state."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from thinned.models.dropout import Dropout, check_rate

Output = TypeVar("Output")

# Modules that do something other than dropout when `training` is set. Spectral norm's class has no public name.
SPECTRAL_NORM = type([*spectral_norm(nn.Linear(1, 1, device="meta")).modules()][-1])
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NOT_DROPOUT = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, SPECTRAL_NORM, nn.RReLU)


@contextmanager
def only_dropout_active(net: nn.Module, sites: Collection[str] | None = None, scale: float = 1.0) -> Iterator[None]:
    """Within the block dropout acts (at the sites, or everywhere) and nothing else is in training mode.

    The rates of each `Dropout` that acts are multiplied by `scale`. Rates and every module's mode are restored on the
    way out. A buffer that changed inside (running statistics of a functional batch norm, say) is restored too and
    raises ValueError, since such a prediction would depend on its batch.
    """
    modes = {module: module.training for module in net.modules()}
    rates = {module: module.p for module in modes if isinstance(module, Dropout)}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers()}
    try:
        for module in modes:
            if sites is None:
                module.training = not isinstance(module, NOT_DROPOUT)
            else:
                module.training = isinstance(module, Dropout) and module.site in sites
        for module, p in rates.items():
            if module.training:
                module.p = check_rate(scale * p, f"scale * dropout.{module.site}")
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, p in rates.items():
            module.p = p
        changed = [name for name, (now, then) in buffers.items() if not _equal(now, then)]
        for name in changed:
            buffers[name][0].copy_(buffers[name][1])
    if changed:
        raise ValueError(f"Expected dropout alone to act in {type(net).__name__}, but got changed buffers: {changed}")


def seeded_output(net: nn.Module, evaluate: Callable[[nn.Module], Output], seed: int) -> Output:
    """Runs a pass with the random state of a seed, and puts the state back; ValueError if the pass draws nothing."""
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        before = _random_state(cuda)
        output = evaluate(net)
        if all(map(torch.equal, before, _random_state(cuda))):
            raise nothing_drops(net)
    return output


def _random_state(cuda: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]


def _equal(now: Tensor, then: Tensor) -> bool:
    """Compares element by element; a NaN equals a NaN."""
    return torch.equal(now, then) or (now.is_floating_point() and torch.allclose(now, then, 0, 0, equal_nan=True))


def nothing_drops(net: nn.Module) -> ValueError:
    """Returns the error for a net in which no dropout acts."""
    return ValueError(
        f"Expected dropout with a rate above 0 in {type(net).__name__}, but got a pass that draws nothing"
    )
