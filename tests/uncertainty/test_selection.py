"""How the sites at which dropout acts at prediction, and their rates, are chosen."""

import math

import pytest
from torch import nn

from thinned.models import MLP, DropoutRates
from thinned.uncertainty import select_sites
from thinned.uncertainty.acting_dropout import Acting


def all_sites(*rates: float) -> MLP:
    """A net with all four sites, at these rates or 0.3."""
    return MLP((1, 4, 4), 3, (20,), width=6, patch_size=2, residual=True, dropout=DropoutRates(*rates or [0.3] * 4))


def test_every_combination_of_sites_is_scored_then_the_best_at_other_rates() -> None:
    """The rates of the best are 0.1 and 0.3, of which a quarter, half and double are tried."""
    best, asked = ("embedding", "mlp"), []

    def nll(acting: Acting) -> float:
        asked.append(acting)
        return (0.5 if acting.sites == best else 1 + len(acting.sites)) + abs(acting.scale - 0.4)

    net = MLP((16,), 5, (32,), dropout=DropoutRates(embedding=0.1, mlp=0.3))
    selection = select_sites(net, nll)
    assert asked == [Acting(("embedding",)), Acting(("mlp",)), Acting(best), *(Acting(best, s) for s in (0.25, 0.5, 2))]
    order = [*((best, scale) for scale in (0.5, 0.25, 1, 2)), (("embedding",), 1), (("mlp",), 1)]
    assert [*selection] == order
    assert [*selection.values()] == pytest.approx([0.6, 0.65, 1.1, 2.1, 2.6, 2.6])


def test_rates_are_not_scaled_to_one_or_above() -> None:
    """Twice 0.5 drops everything; twice the 0.4 of another site does not."""
    net = MLP((16,), 5, (32,), dropout=DropoutRates(embedding=0.4, mlp=0.5))
    for best, scales in (("mlp", [0.25, 0.5, 1.0]), ("embedding", [0.25, 0.5, 1.0, 2.0])):
        selection = select_sites(net, lambda acting, best=best: float(acting.sites != (best,)))
        assert sorted(acting.scale for acting in selection if acting.sites == (best,)) == scales


def test_sites_without_a_rate_are_not_combined() -> None:
    assert len(select_sites(all_sites(), lambda acting: 0.0)) == 2**4 - 1 + 3
    assert len(select_sites(all_sites(0.3, 0, 0.3, 0), lambda acting: 0.0)) == 2**2 - 1 + 3
    with pytest.raises(ValueError, match="rate above 0 in Linear"):
        select_sites(nn.Linear(1, 1), lambda acting: 0.0)


def test_ways_to_act_by_name() -> None:
    assert str(Acting(("embedding", "mlp"))) == "embedding+mlp"
    assert str(Acting(("mlp",), 0.25)) == "mlp × 0.25"
    assert str(Acting(("mlp",), 2.0)) == "mlp × 2"


def test_highest_rate_of_the_best_sites_bounds_their_scale() -> None:
    """Two sites together are best: twice the 0.1 of one would do, twice the 0.5 of the other would not."""
    net, best = MLP((16,), 5, (32,), dropout=DropoutRates(embedding=0.1, mlp=0.5)), ("embedding", "mlp")
    selection = select_sites(net, lambda acting: float(acting.sites != best))
    assert sorted(acting.scale for acting in selection if acting.sites == best) == [0.25, 0.5, 1.0]


def test_own_rates_of_the_best_sites_may_be_the_best() -> None:
    net = MLP((16,), 5, (32,), dropout=DropoutRates(embedding=0.1, mlp=0.3))
    selection = select_sites(net, lambda acting: len(acting.sites) + abs(math.log(acting.scale)))
    assert next(iter(selection.items())) == (Acting(("embedding",)), 1.0)
