"""Runs a net with only dropout in training mode, and selects the sites at which it acts."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout, check_rate, check_sites, sites_in
from thinned.models.net import net_offers
from thinned.offers import task_offers

Output = TypeVar("Output")

SCALES = (0.25, 0.5, 2.0)  # of the rates, tried by `select_sites`


def of_our_make(net: nn.Module) -> bool:
    """Returns whether a net, or the `net` of a sharded task, can be thinned: all its dropout is `Dropout`."""
    return any(net_offers(each).thin is not None for each in (net, task_offers(net).net))


def nothing_drops(net: nn.Module) -> ValueError:
    """Returns the error for a net in which no dropout acts."""
    name = type(net).__name__
    return ValueError(f"Expected dropout with a rate above 0 in {name}, but got a pass that draws nothing")


def acting_sites(net: nn.Module, sites: Collection[str] | None = None) -> tuple[str, ...]:
    """Returns the given sites, or all, at which a net has a rate above 0: none if all rates are 0.

    Raises a ValueError if `sites` is empty or names one that the net lacks, or if the net has no dropout.
    """
    of_net = check_sites({module.site for module in net.modules() if isinstance(module, Dropout)})
    if sites is not None and (not sites or set(check_sites(sites)) - set(of_net)):
        raise ValueError(f"Expected sites among those of {type(net).__name__}, {list(of_net)}, but got {list(sites)}")
    if not of_net:
        raise nothing_drops(net)
    return tuple(site for site in sites_in(net) if sites is None or site in sites)


class Acting(NamedTuple):
    """Holds the sites at which dropout acts at prediction, and the factor of its rates."""

    sites: tuple[str, ...]
    scale: float = 1.0

    def __str__(self) -> str:
        return "+".join(self.sites) + ("" if self.scale == 1 else f" × {self.scale:g}")


def select_sites(net: nn.Module, nll: Callable[[Acting], float]) -> dict[Acting, float]:
    """Scores every combination of the sites that drop in a net, then the best one at other rates; best first.

    Args:
        net: Its sites with a rate above 0 are combined in all ways, at most 2^4 - 1.
        nll: Returns the negative log-likelihood on held-out data if dropout acts in the given way, in nats.
    """
    sites = sites_in(net)
    if not sites:
        raise nothing_drops(net)
    combined = [Acting(c) for size in range(1, len(sites) + 1) for c in combinations(sites, size)]
    scores = {acting: nll(acting) for acting in combined}
    best = min(scores, key=lambda acting: scores[acting]).sites
    highest = max(m.p for m in net.modules() if isinstance(m, Dropout) and m.site in best)
    scores |= {a: nll(a) for a in (Acting(best, scale) for scale in SCALES if scale * highest < 1)}
    return dict(sorted(scores.items(), key=lambda item: item[1]))


def is_dropout(module: nn.Module) -> bool:
    """Returns whether a module drops in training mode and does nothing else.

    It knows those of torch, and others by their names, such as `DropPath` or `StochasticDepth`. A name does not count
    for a module with submodules: a whole net may be called `DropoutNet`.
    """
    if isinstance(module, nn.RNNBase) or type(module) is nn.MultiheadAttention:
        return True
    name = getattr(module, "original_name", type(module).__name__).lower()  # TorchScript keeps the class's name
    return ("drop" in name or "stochasticdepth" in name) and not any(True for _ in module.children())


@contextmanager
def restored(net: nn.Module) -> Iterator[list[str]]:
    """Restores modes, buffers, and attributes that are numbers or tensors; then lists the buffers that had changed."""
    modes = {module: module.training for module in net.modules()}
    attributes = {m: {k: v for k, v in vars(m).items() if isinstance(v, int | float | Tensor)} for m in modes}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers(remove_duplicate=False)}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for module, mode in modes.items():
            vars(module).update(attributes[module])
            module.training = mode
        now = dict(net.named_buffers(remove_duplicate=False))
        for path, (buffer, copied) in buffers.items():
            if path not in now or not torch.equal(now[path], copied):
                changed.append(path)
                with torch.no_grad():
                    buffer.copy_(copied)
                owner, _, name = path.rpartition(".")
                setattr(net.get_submodule(owner), name, buffer)  # `self.average = ...` has replaced the buffer


@contextmanager
def only_dropout_active(
    net: nn.Module, sites: Collection[str] | None = None, scale: float = 1.0, owners: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Puts only dropout into training mode within the block, and restores everything after it.

    `sites` are those of `Dropout` that act, at `scale` times their rates; None is every dropout module, and `owners`
    (see `FoundDropout`). A changed buffer is a ValueError, since such a prediction would depend on its batch.
    """
    with restored(net) as changed, ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it would skip the dropout modules of a layer
        if any(isinstance(module, nn.RNNBase) for module in net.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # it would seed its dropout only once
        for module in net.modules():
            if sites is None:
                module.training = module in owners or is_dropout(module)
            else:
                module.training = isinstance(module, Dropout) and module.site in sites
            if module.training and isinstance(module, Dropout):
                module.p = check_rate(scale * module.p, f"scale * dropout.{module.site}")
        yield
    if changed:
        raise ValueError(f"Expected dropout alone to act in {type(net).__name__}, but got changed buffers: {changed}")


def random_state() -> Tensor:
    """Returns torch's random state on the CPU and the current GPU: it changes if something is drawn."""
    return torch.cat([torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's random state, on the CPU and the current GPU, within the block, and restores it after."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach all GPUs
        if gpus:
            torch.cuda.manual_seed(seed)
        yield


def seeded_output(net: nn.Module, evaluate: Callable[[nn.Module], Output], seed: int) -> Output:
    """Runs a pass with the random state of a seed; ValueError if it draws nothing."""
    with seeded(seed):
        before = random_state()
        output = evaluate(net)
        if torch.equal(before, random_state()):
            raise nothing_drops(net)
    return output
