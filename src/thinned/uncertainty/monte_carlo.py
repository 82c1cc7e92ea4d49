"""Monte-Carlo dropout (Gal and Ghahramani 2016): the predictions of S networks sampled by dropout.

`shared` masks sample a network and evaluate it on every input (`net.thin`). `independent` masks are drawn for every
input and element, by whatever dropout the net contains.
"""

from collections.abc import Callable, Collection, Generator
from contextlib import closing
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from thinned.models.dropout import check_sites, derive_seed, sites_in
from thinned.models.net import net_offers
from thinned.uncertainty.acting_dropout import nothing_drops, only_dropout_active, seeded_output
from thinned.uncertainty.statistics import MCPrediction, MCStatistics

Masks = Literal["auto", "shared", "independent"]
Output = TypeVar("Output")


def resolve_masks(net: nn.Module, masks: Masks) -> Literal["shared", "independent"]:
    """Resolves `auto` to `shared` if the net has `thin`; ValueError for shared masks of a net without it."""
    if masks not in ("auto", "shared", "independent"):
        raise ValueError(f"Expected masks to be auto, shared or independent, but got {masks!r}")
    thinnable = net_offers(net).thin is not None
    if masks == "shared" and not thinnable:
        raise ValueError(
            f"Expected a net with `thin(seed, sample, sites)` for masks=shared, but got {type(net).__name__}"
        )
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
    """Yields what `evaluate` returns for each of the S sampled networks.

    Shared masks depend on (seed, sample) alone: the same networks whatever the inputs, the batch or the device.
    Independent masks depend on the shape of the inputs too. Args and Raises: see `mc_predict`.
    """
    if num_samples < 2:
        raise ValueError(f"Expected num_samples to be at least 2, but got {num_samples}")
    if sites is not None and (not sites or set(check_sites(sites)) - set(sites_in(net))):
        drop = f"{type(net).__name__}, {list(sites_in(net))}"
        raise ValueError(f"Expected sites among those that drop in {drop}, but got {list(sites)}")
    if resolve_masks(net, masks) == "shared":
        if not sites_in(net):
            raise nothing_drops(net)
        for sample in range(num_samples):
            yield evaluate(net.thin(seed, sample, sites, scale))  # type: ignore[operator]
    else:
        with only_dropout_active(net, sites, scale):
            for sample in range(num_samples):
                yield seeded_output(net, evaluate, derive_seed(seed, sample))


def mc_samples(net: nn.Module, inputs: Any, **settings: Any) -> Generator[Tensor, None, None]:
    """Yields the S sampled predictive distributions: softmax of the logits, (B, K). See `mc_predict`."""
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
        net: Maps inputs to logits (B, K). Any module will do for independent masks, whether its dropout is a
            module, `F.dropout(..., self.training)`, or inside `nn.MultiheadAttention` or
            `scaled_dot_product_attention`. Normalisation layers stay in evaluation mode, all modes are restored.
        inputs: The net is called with them.
        num_samples: S, at least 2.
        masks: Shared by all inputs (a thinned network), independent per element, or auto: shared if the net has `thin`.
        seed: Of the ensemble. The global random state is left as it was.
        sites: Those at which dropout acts; None for all. Only for nets built from `thinned.models.Dropout`.
        scale: Multiplies the rates of `thinned.models.Dropout`.

    Raises:
        ValueError: S below 2, unknown site, no dropout that acts, or a module that changes its buffers.
    """
    statistics = MCStatistics()
    samples = mc_samples(net, inputs, num_samples=num_samples, masks=masks, seed=seed, sites=sites, scale=scale)
    with closing(samples):  # an exception here restores the modes at once
        for probs in samples:
            statistics.update(probs)
    return statistics.compute()
