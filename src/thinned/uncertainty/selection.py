"""Selects the sites, and the scale of their rates, at which dropout should act at prediction."""

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

from torch import nn

from thinned.models.dropout import Dropout, sites_in
from thinned.uncertainty.acting_dropout import nothing_drops

SCALES = (0.25, 0.5, 2.0)  # of the rates, tried by `select_sites`


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
