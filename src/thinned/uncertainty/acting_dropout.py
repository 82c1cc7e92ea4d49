"""Passes of a net in which dropout acts and nothing else does, with a given random state."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout, check_rate, check_sites, sites_in
from thinned.models.net import net_offers
from thinned.offers import task_offers
from thinned.uncertainty.dropout_calls import is_dropout, random_state, same_state

Output = TypeVar("Output")


def of_our_make(net: nn.Module) -> bool:
    """Whether a net, or the `net` of a task that is sharded, can be thinned: its dropout is in `Dropout` alone."""
    return any(net_offers(each).thin is not None for each in (net, task_offers(net).net))


def acting_sites(net: nn.Module, sites: Collection[str] | None = None) -> tuple[str, ...]:
    """Returns those of the sites, or of all, at which a net has a rate above 0: none if all rates are 0.

    Raises:
        ValueError: No sites are given, the net lacks one of them, or it has no dropout.
    """
    of_net = check_sites({module.site for module in net.modules() if isinstance(module, Dropout)})
    if sites is not None and (not sites or set(check_sites(sites)) - set(of_net)):
        raise ValueError(f"Expected sites among those of {type(net).__name__}, {list(of_net)}, but got {list(sites)}")
    if not of_net:
        raise nothing_drops(net)
    return tuple(site for site in sites_in(net) if sites is None or site in sites)


@contextmanager
def restored(net: nn.Module) -> Iterator[list[str]]:
    """Restores every module's mode and buffers on the way out, and then lists the buffers that had changed."""
    modes = {module: module.training for module in net.modules()}
    buffers = {
        (module, name): (f"{path}.{name}".strip("."), buffer, buffer.clone())
        for path, module in net.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
    }
    changed: list[str] = []
    try:
        yield changed
    finally:
        for module, mode in modes.items():
            module.training = mode
        for (module, name), (path, then, copied) in buffers.items():
            now = getattr(module, name)
            if now is None or not _equal(now, copied):
                changed.append(path)
                with torch.no_grad():
                    then.copy_(copied)
                if now is not then:  # `self.average = 0.9 * self.average + ...`
                    setattr(module, name, then)


@contextmanager
def only_dropout_active(
    net: nn.Module, sites: Collection[str] | None = None, scale: float = 1.0, owners: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Within the block dropout modules (of the sites, or all) and nothing else are in training mode.

    The rates of each `Dropout` that acts are multiplied by `scale`. Rates and every module's mode are restored on the
    way out. A buffer that changed inside is restored too and raises ValueError, since such a prediction would depend on
    its batch.

    Args:
        net: The net. Functions that drop (`F.dropout`) are the matter of `FoundDropout`.
        sites: Those of `Dropout`; None is every dropout module.
        scale: Factor on the rates of `Dropout`.
        owners: More modules that go into training mode, for dropout that acts in that mode alone.
    """
    rates = {module: module.p for module in net.modules() if isinstance(module, Dropout)}
    with restored(net) as changed:
        try:
            for module in net.modules():
                if sites is None:
                    module.training = module in owners or is_dropout(module)
                else:
                    module.training = isinstance(module, Dropout) and module.site in sites
            for module, p in rates.items():
                if module.training:
                    module.p = check_rate(scale * p, f"scale * dropout.{module.site}")
            yield
        finally:
            for module, p in rates.items():
                module.p = p
    if changed:
        raise ValueError(f"Expected dropout alone to act in {type(net).__name__}, but got changed buffers: {changed}")


def seeded_output(net: nn.Module, evaluate: Callable[[nn.Module], Output], seed: int) -> Output:
    """Runs a pass with the random state of a seed, and puts the state back; ValueError if the pass draws nothing."""
    with kept_random_state():
        seed_generators(seed)
        before = random_state()
        output = evaluate(net)
        if same_state(before, random_state()):
            raise nothing_drops(net)
    return output


def kept_random_state() -> AbstractContextManager[None]:
    """Returns a context that puts back torch's random state, of the CPU and of the current GPU."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def seed_generators(seed: int) -> None:
    """Seeds torch's generators of the CPU and of the current GPU."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def nothing_drops(net: nn.Module) -> ValueError:
    """Returns the error for a net in which no dropout acts."""
    return ValueError(
        f"Expected dropout with a rate above 0 in {type(net).__name__}, but got a pass that draws nothing"
    )


def _equal(now: Tensor, then: Tensor) -> bool:
    """Compares element by element; a NaN equals a NaN."""
    same_kind = now.shape == then.shape and now.is_floating_point()
    return torch.equal(now, then) or (same_kind and torch.allclose(now, then, 0, 0, equal_nan=True))
