"""Predicts with S networks sampled by dropout: Monte-Carlo dropout (Gal and Ghahramani 2016).

`shared` masks sample a network and evaluate it on every input. `independent` masks are drawn for every input and
element, by whatever dropout the net contains.

Few inputs pass once through the whole weights for many networks, with shared masks on the activations (`net.stack`).
Many inputs pass through one smaller network after the other (`net.thin`): the speed repays the cutting.

Shapes: B inputs, S samples, n of them at once, K classes.
"""

from collections.abc import Callable, Collection, Generator
from contextlib import closing
from itertools import repeat
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from thinned.models.dropout import derive_seed
from thinned.models.net import check_logits, logits_in, net_offers
from thinned.uncertainty.acting_dropout import acting_sites, of_our_make, only_dropout_active, seeded_output
from thinned.uncertainty.foreign_dropout import FoundDropout, find_dropout
from thinned.uncertainty.kept_networks import KeptNetworks, stacked_at_once
from thinned.uncertainty.statistics import MCPrediction, MCStatistics

Masks = Literal["auto", "shared", "independent"]
Output = TypeVar("Output")


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
    kept: KeptNetworks | None = None,
) -> MCPrediction:
    """Predicts with S networks sampled by dropout and says how much they differ.

    Args:
        net: Maps inputs to logits (B, K), to a dict or dataclass with `logits`, or to a tuple that begins with them.
            Any module will do: two or three more passes find its dropout, see `foreign_dropout`. Only dropout is in
            training mode, and all modes are restored.
        inputs: Argument of the net.
        num_samples: S, at least 2.
        masks: Shared by all inputs (a thinned network), independent per element, or auto: shared if the net has `thin`.
        seed: Seed of the ensemble. The global random state is left as it was.
        sites: Sites at which dropout acts; None for all. Only for nets built from `thinned.models.Dropout`.
        scale: Multiplies the rates of `thinned.models.Dropout`.
        kept: Keeps the thinned networks of shared masks for the next call. None keeps nothing.

    Raises:
        ValueError: S below 2, unknown site, no dropout, dropout with a rate that never draws, dropout that cannot act
            alone, or outputs that are no logits.

    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 2, bias=False))
    >>> net[1].weight.data = torch.tensor([[1.0], [0.0]])
    >>> p = mc_predict(net, torch.ones(1, 1), num_samples=1000)  # p_s is sigmoid(2), or 1/2 if the input is dropped
    >>> [round(x.item(), 1) for x in (p.mean[0, 0], p.predictive_entropy, p.expected_entropy, p.mutual_information)]
    [0.7, 0.6, 0.5, 0.1]
    """
    statistics = MCStatistics()
    settings: dict[str, Any] = {"num_samples": num_samples, "masks": masks, "seed": seed, "sites": sites}
    with closing(sampled_logits(net, inputs, **settings, scale=scale, kept=kept)) as sampled:
        for logits in sampled:  # (n, B, K)
            statistics.update_all(_probabilities(logits))
    return statistics.compute()


def mc_samples(net: nn.Module, inputs: Any, **settings: Any) -> Generator[Tensor, None, None]:
    """Yields the S sampled predictive distributions, softmax of the logits, (B, K). See `mc_predict`."""
    for logits in sampled_logits(net, inputs, **settings):
        yield from _probabilities(logits)


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def sampled_logits(
    net: nn.Module, inputs: Any, masks: Masks = "auto", sites: Collection[str] | None = None, **settings: Any
) -> Generator[Tensor, None, None]:
    """Yields the logits of S sampled networks, n at a time: (n, B, K). See `sampled_outputs`."""
    stacks = resolve_masks(net, masks) == "shared" and net_offers(net).stack is not None and acting_sites(net, sites)
    at_once = stacked_at_once(len(inputs), inputs.device) if stacks else 0
    settings |= {"masks": masks, "sites": sites, "at_once": at_once}
    with closing(sampled_outputs(net, lambda sampled: logits_in(sampled, inputs), **settings)) as outputs:
        for number, logits in enumerate(outputs):
            if number == 0 and not of_our_make(net):
                check_logits(net, logits)
            if at_once and not inputs.requires_grad:  # weights get no gradients, as those of thinned networks
                logits = logits.detach()
            yield logits if at_once else logits[None]


def sampled_outputs(
    net: nn.Module,
    evaluate: Callable[[nn.Module], Output],
    *,
    num_samples: int = 50,
    masks: Masks = "auto",
    seed: int = 0,
    sites: Collection[str] | None = None,
    scale: float = 1.0,
    found: FoundDropout | None = None,
    kept: KeptNetworks | None = None,
    at_once: int = 0,
) -> Generator[Output, None, None]:
    """Yields what `evaluate` returns for each of S sampled networks, or for stacks of `at_once` if that is above 0.

    Shared masks depend on (seed, sample) alone: the same networks whatever the inputs, the batch or the device.
    Independent masks depend on the shape of the inputs too. If all rates are 0, the deterministic network is evaluated
    once, and yielded S times. `found` is what `find_dropout` returns for a foreign net; None calls it. The modes are
    restored when the generator is closed. For other arguments and errors see `mc_predict`.
    """
    if num_samples < 2:
        raise ValueError(f"Expected num_samples to be at least 2, but got {num_samples}")
    shared = resolve_masks(net, masks) == "shared"
    if sites is not None or of_our_make(net):
        sites = acting_sites(net, sites)
        found = FoundDropout(off=not sites)
    elif found is None:
        found = find_dropout(net, evaluate)
    if found.off:
        with only_dropout_active(net, ()):
            output = evaluate(net)
        yield from repeat(output, num_samples)
    elif shared:
        networks = (kept or KeptNetworks(max_bytes=0)).networks(net, num_samples, at_once, seed, sites, scale)
        yield from map(evaluate, networks)
    else:
        with only_dropout_active(net, sites, scale, found.owners):
            for sample in range(num_samples):
                yield seeded_output(net, evaluate, derive_seed(seed, sample))


def resolve_masks(net: nn.Module, masks: Masks) -> Literal["shared", "independent"]:
    """Resolves `auto` to `shared` if the net has `thin`; ValueError for shared masks of a net without it."""
    if masks not in get_args(Masks):
        raise ValueError(f"Expected masks to be auto, shared or independent, but got {masks!r}")
    thinnable = net_offers(net).thin is not None
    if masks == "shared" and not thinnable:
        name = type(net).__name__
        raise ValueError(f"Expected a net with `thin(seed, sample, sites)` for masks=shared, but got {name}")
    return "shared" if thinnable and masks != "independent" else "independent"
