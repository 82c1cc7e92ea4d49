"""Monte-Carlo dropout (Gal and Ghahramani 2016): the predictions of S networks sampled by dropout.

`shared` masks sample a network and evaluate it on every input (`net.thin`); `independent` masks are drawn anew for
every input and element, by switching on whatever dropout the net contains, and only that.
"""

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from thinned.models.dropout import Dropout, check_rate, check_sites, derive_seed, sites_in
from thinned.models.net import net_offers
from thinned.uncertainty.statistics import MCPrediction, MCStatistics

Masks = Literal["auto", "shared", "independent"]
Output = TypeVar("Output")

# Modules that do something other than dropout when `training` is set. Spectral norm's class has no public name.
SPECTRAL_NORM = type([*spectral_norm(nn.Linear(1, 1, device="meta")).modules()][-1])
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NOT_DROPOUT = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, SPECTRAL_NORM, nn.RReLU)


def resolve_masks(net: nn.Module, masks: Masks) -> Literal["shared", "independent"]:
    """`auto` is `shared` where the net has `thin`; ValueError for shared masks of a net without it."""
    if masks not in ("auto", "shared", "independent"):
        raise ValueError(f"Expected masks to be auto, shared or independent, but got {masks!r}")
    thinnable = net_offers(net).thin is not None
    if masks == "shared" and not thinnable:
        raise ValueError(f"Expected a net with `thin(seed, sample, sites)` for masks=shared, but got {_name(net)}")
    return "shared" if masks != "independent" and thinnable else "independent"


def sampled_outputs(
    net: nn.Module,
    evaluate: Callable[[nn.Module], Output],
    *,
    num_samples: int = 50,
    masks: Masks = "auto",
    seed: int = 0,
    sites: Collection[str] | None = None,
    scale: float = 1.0,
) -> Generator[Output, None, None]:
    """What `evaluate` returns for each of the S sampled networks, one at a time.

    Shared masks depend on (seed, sample) alone: the same networks whatever the inputs, the batch or the device.
    Independent masks depend on the shape of the inputs too. Args and Raises: see `mc_predict`.
    """
    if num_samples < 2:
        raise ValueError(f"Expected num_samples to be at least 2, but got {num_samples}")
    if sites is not None and (not sites or set(check_sites(sites)) - set(sites_in(net))):
        raise ValueError(
            f"Expected sites among those that drop in {_name(net)}, {list(sites_in(net))}, but got {list(sites)}"
        )
    if resolve_masks(net, masks) == "shared":
        if not sites_in(net):
            raise nothing_drops(net)
        for sample in range(num_samples):
            yield evaluate(net.thin(seed, sample, sites, scale))  # type: ignore[operator]
    else:
        with only_dropout_active(net, sites, scale):
            for sample in range(num_samples):
                yield _seeded(net, evaluate, derive_seed(seed, sample))


def mc_samples(net: nn.Module, inputs: Any, **settings: Any) -> Generator[Tensor, None, None]:
    """The S sampled predictive distributions, one at a time: softmax of the logits, (B, K). See `mc_predict`."""
    with closing(sampled_outputs(net, lambda sampled: sampled(inputs), **settings)) as outputs:
        for logits in outputs:  # closed on an exception, which restores the modes at once
            yield torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


@torch.no_grad()
def mc_predict(
    net: nn.Module,
    inputs: Any,
    *,
    num_samples: int = 50,
    masks: Masks = "auto",
    seed: int = 0,
    sites: Collection[str] | None = None,
    scale: float = 1.0,
) -> MCPrediction:
    """Predicts with S networks sampled by dropout and says how much they differ.

    Args:
        net: maps inputs to logits (B, K). Any module will do for independent masks, whether its dropout is a
            module, `F.dropout(..., self.training)`, or inside `nn.MultiheadAttention` or
            `scaled_dot_product_attention`. Normalisation layers stay in evaluation mode, all modes are restored.
        inputs: what the net is called with.
        num_samples: S, at least 2.
        masks: shared by all inputs (a thinned network), independent per element, or auto: shared where `net.thin`
            exists.
        seed: of the ensemble. The global random state is left as it was.
        sites: at which dropout acts; all when None. Only for nets built from `thinned.models.Dropout`.
        scale: by which the rates of `thinned.models.Dropout` are multiplied.

    Raises:
        ValueError: S below 2, unknown site, no dropout that acts, or a module that changes its buffers.
    """
    statistics = MCStatistics()
    samples = mc_samples(net, inputs, num_samples=num_samples, masks=masks, seed=seed, sites=sites, scale=scale)
    with closing(samples):  # an exception here restores the modes at once
        for probs in samples:
            statistics.update(probs)
    return statistics.compute()


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
        raise ValueError(f"Expected dropout alone to act in {_name(net)}, but got changed buffers: {changed}")


def _seeded(net: nn.Module, evaluate: Callable[[nn.Module], Output], seed: int) -> Output:
    """One pass with the random state set to seed, and put back after; ValueError when the pass draws nothing."""
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
    """Equal element by element, a NaN equal to a NaN."""
    return torch.equal(now, then) or (now.is_floating_point() and torch.allclose(now, then, 0, 0, equal_nan=True))


def _name(net: nn.Module) -> str:
    return type(net).__name__


def nothing_drops(net: nn.Module) -> ValueError:
    """The error for a net in which no dropout acts."""
    return ValueError(f"Expected dropout with a rate above 0 in {_name(net)}, but got a pass that draws nothing")
