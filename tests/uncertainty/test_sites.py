"""Where dropout acts at prediction, and by what its rates are multiplied."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.models import MLP, Dropout, DropoutRates
from thinned.uncertainty import mc_predict, mc_samples
from thinned.uncertainty.acting_dropout import only_dropout_active


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def all_sites(*rates: float) -> MLP:
    """A net with all four sites, at these rates or 0.3, in float64 and evaluation mode."""
    dropout = DropoutRates(*rates or [0.3] * 4)
    return MLP((1, 4, 4), 3, (20,), width=6, patch_size=2, residual=True, dropout=dropout).double().eval()


def inputs(count: int) -> Tensor:
    return torch.randn(count, 1, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("sites", [["embedding"], ["attention"], ["residual"], ["mlp"], ["mlp", "embedding"]])
def test_only_the_chosen_sites_act(sites: list[str]) -> None:
    net, x, acted = all_sites(), inputs(50), set()

    def record(module: Dropout, args: tuple[Tensor], output: Tensor) -> None:
        if not torch.equal(args[0], output):
            acted.add(module.site)

    for module in net.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(record)
    mc_predict(net, x, num_samples=2, masks="independent", sites=sites)
    assert acted == set(sites)
    shared, alone = (next(mc_samples(net, x, seed=3, sites=s)) for s in (sites, None))
    torch.testing.assert_close(shared, net.thin(3, 0, sites)(x).softmax(-1))
    assert not torch.allclose(shared, alone)


def test_chosen_sites_leave_dropout_without_a_site_off() -> None:
    net = nn.Sequential(Dropout(0.5, "mlp"), nn.Dropout(0.5))
    with only_dropout_active(net, ["mlp"]):
        assert [module.training for module in net] == [True, False]


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize(("sites", "said"), [(["hidden"], "hidden"), (["attention"], "attention"), ([], r"\[\]")])
def test_sites_that_a_net_lacks_are_refused(masks: Any, sites: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"Expected sites among .*but got .*{said}"):
        mc_predict(MLP((4,), 3, (4,), dropout=DropoutRates(mlp=0.3)), torch.ones(1, 4), masks=masks, sites=sites)


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_rate_of_zero_is_a_rate(masks: Any) -> None:
    """Such a site drops nothing: alone it gives the deterministic network, beside others it changes nothing."""
    net, x = all_sites(0.3, 0, 0.3, 0.3), inputs(4)
    alone, without, both = (
        mc_predict(net, x, num_samples=4, masks=masks, sites=sites)
        for sites in (["attention"], ["mlp"], ["mlp", "attention"])
    )
    torch.testing.assert_close(alone.mean, net(x).softmax(-1))
    assert alone.variance.max() == 0
    assert torch.equal(without.mean, both.mean)
    assert (both.variance > 0).all()


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("sites", [None, ["residual", "mlp"]])
def test_scale_multiplies_the_rates(masks: Any, sites: list[str] | None) -> None:
    """At half the rates a net predicts as one that was built with them, and not as at its own."""
    net, half, x = all_sites(0.5, 0.25, 0.5, 0.5), all_sites(0.25, 0.125, 0.25, 0.25), inputs(20)
    half.load_state_dict(net.state_dict())
    settings: dict[str, Any] = {"num_samples": 4, "masks": masks, "sites": sites}
    scaled, built, own = (mc_predict(n, x, **settings, scale=s) for n, s in ((net, 0.5), (half, 1.0), (net, 1.0)))
    torch.testing.assert_close(scaled.mean, built.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.variance, built.variance, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scaled.mean, own.mean)


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_rates_stay_as_they_were(masks: Any) -> None:
    net = all_sites(0.1, 0.2, 0.3, 0.4)
    rates = [module.p for module in net.modules() if isinstance(module, Dropout)]
    mc_predict(net, inputs(2), num_samples=2, masks=masks, scale=2.0)
    with pytest.raises(ValueError, match=r"scale \* dropout.mlp to be a probability in \[0, 1\], but got 1.2"):
        mc_predict(net, inputs(2), num_samples=2, masks=masks, sites=["mlp"], scale=3.0)
    assert [module.p for module in net.modules() if isinstance(module, Dropout)] == rates
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_scale_is_for_the_chosen_sites_alone(masks: Any) -> None:
    """Four times the other rates would be no probabilities."""
    predicted = mc_predict(
        all_sites(0.1, 0.5, 0.5, 0.5), inputs(2), num_samples=2, masks=masks, sites=["embedding"], scale=4.0
    )
    assert (predicted.variance > 0).all()
