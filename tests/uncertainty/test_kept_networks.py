"""Thinned networks: the same for few inputs and many, kept from batch to batch, and never those of other weights."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.models import MLP, Dropout, DropoutRates
from thinned.uncertainty import KeptNetworks, mc_predict, mc_samples
from thinned.uncertainty.kept_networks import ROWS_AT_ONCE, STACKED_INPUTS

FEW, MANY = 3, STACKED_INPUTS + 1
S = 5
STEMS: dict[str, dict[str, Any]] = {
    "raw": {},
    "layer-norm": {"layer_norm": True},
    "projected": {"width": 12},
    "residual": {"width": 12, "residual": True, "layer_norm": True},
    "patches": {"width": 6, "patch_size": 2},
    "residual-patches": {"width": 6, "patch_size": 2, "residual": True, "layer_norm": True},
}


class CountedMLP(MLP):
    """Counts the networks that are cut and stacked."""

    made: Counter[str]

    def thin(self, *args: Any, **settings: Any) -> nn.Sequential:
        self.made["cut"] += 1
        return super().thin(*args, **settings)

    def stack(self, seed: int, samples: Sequence[int], *args: Any, **settings: Any) -> MLP:
        self.made["stacked"] += len(samples)
        return super().stack(seed, samples, *args, **settings)


def make(stem: str = "raw", start: int = 0) -> CountedMLP:
    """A float64 MLP in evaluation mode with all the sites that it can have."""
    torch.manual_seed(start)
    options = STEMS[stem]
    rates = DropoutRates(0.2, 0.3 if "patch_size" in options else 0, 0.4 if "residual" in options else 0, 0.5)
    net = CountedMLP((2, 4, 4), 3, (40, 25), dropout=rates, **options).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    net.made = Counter()
    return net


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def samples(net: MLP, x: Tensor, kept: KeptNetworks | None = None, **settings: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack(list(mc_samples(net, x, kept=kept, **{"num_samples": S} | settings)))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("settings", [{}, {"sites": ["mlp"], "scale": 0.5}], ids=["all", "one site"])
def test_few_inputs_see_the_networks_that_many_see(stem: str, settings: dict[str, Any]) -> None:
    """More samples than a stack holds, in the last of which there are fewer."""
    net, x, count = make(stem), images(MANY), ROWS_AT_ONCE // STACKED_INPUTS * 2 + 1
    expected = torch.stack([net.thin(7, s, **settings)(x).softmax(-1) for s in range(count)])
    for size in (1, FEW, STACKED_INPUTS, MANY):
        net.made.clear()
        got = samples(net, x[:size], num_samples=count, seed=7, **settings)
        torch.testing.assert_close(got, expected[:, :size], rtol=1e-10, atol=1e-10)
        assert net.made == {"cut" if size == MANY else "stacked": count}


@pytest.mark.parametrize("size", [FEW, MANY])
def test_networks_are_made_once_for_many_batches(size: int) -> None:
    net, kept = make(), KeptNetworks()
    for start in (0, 1, 2):
        x = images(size + start)[start:]
        assert torch.equal(samples(net, x, kept), samples(make(), x))
    assert list(net.made.values()) == [S]
    samples(net, images(size))
    assert list(net.made.values()) == [2 * S]  # nothing is kept unasked


def load(assign: bool) -> Callable[[MLP], object]:
    return lambda net: net.load_state_dict(make("residual-patches", start=1).state_dict(), assign=assign)


def set_rate(net: MLP) -> None:
    next(module for module in net.modules() if isinstance(module, Dropout)).p = 0.6


@torch.no_grad()
def step(net: MLP) -> None:
    net.stages.head.weight[0, 0] += 1


def swap_storage(net: MLP) -> None:
    net.stages.pooling.query.data = torch.ones(6, dtype=torch.float64)


def replace(net: MLP) -> None:
    net.stages.pooling.query = nn.Parameter(torch.ones(6, dtype=torch.float64))


CHANGES: dict[str, Callable[[MLP], object]] = {
    "step": step,
    "behind the version": lambda net: net.stages.head.weight.data.mul_(2),
    "storage": swap_storage,
    "parameter": replace,
    "load": load(assign=False),
    "assign": load(assign=True),
    "rate": set_rate,
    "dtype": lambda net: net.float().double(),
}


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("change", CHANGES)
def test_networks_of_other_weights_are_forgotten(change: str, size: int) -> None:
    net, kept, x = make("residual-patches"), KeptNetworks(), images(size)
    before = samples(net, x, kept)
    CHANGES[change](net)
    after = samples(net, x, kept)
    assert not torch.equal(after, before)
    assert torch.equal(after, samples(net, x))


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("settings", [{"seed": 1}, {"sites": ["mlp"]}, {"scale": 0.5}, {"num_samples": S + 1}])
def test_other_settings_have_other_networks(settings: dict[str, Any], size: int) -> None:
    net, kept, x = make(), KeptNetworks(), images(size)
    samples(net, x, kept)
    for each in (settings, {}):
        assert torch.equal(samples(net, x, kept, **each), samples(net, x, **each))


def test_an_input_of_another_shape_is_not_broadcast_by_a_mask() -> None:
    with pytest.raises(ValueError, match=r"Expected inputs of shape \(2, 4, 4\)"):
        samples(make(), torch.zeros(FEW, 1, 1, 1, dtype=torch.float64))


def test_another_net_has_other_networks() -> None:
    kept = KeptNetworks()
    for size in (FEW, MANY):
        for net in (make(), make(start=1)):
            assert torch.equal(samples(net, images(size), kept), samples(net, images(size)))


def test_another_net_of_the_same_weights_has_other_networks() -> None:
    net, other = make(), make()
    other.stages.activation0 = nn.Identity()
    other.load_state_dict(net.state_dict(keep_vars=True), assign=True)
    for size in (FEW, MANY):
        kept = KeptNetworks()
        for each in (net, other):
            assert torch.equal(samples(each, images(size), kept), samples(each, images(size)))


def test_changed_device_or_dtype_gives_networks_there() -> None:
    net, kept = make(), KeptNetworks()
    for size in (FEW, MANY):
        samples(net, images(size), kept)
        assert samples(net.float(), images(size).float(), kept).dtype == torch.float32
        net.double()


def test_no_more_is_kept_than_the_budget_holds() -> None:
    net, x = make(), images(MANY)
    sizes = [sum(parameter.nbytes for parameter in net.thin(0, s).parameters()) for s in range(S)]
    net.made.clear()
    kept = KeptNetworks(max_bytes=sizes[0] + sizes[1])
    for _ in range(3):
        assert torch.equal(samples(net, x, kept), samples(make(), x))
    assert net.made["cut"] == S + 2 * (S - 2)


def test_what_networks_share_with_the_net_takes_no_room() -> None:
    """With masks on the output of a residual block alone, its last layer is a copy, and the rest is shared."""
    net = make("residual")
    down = [getattr(net.stages, f"block{i}").sublayer.down for i in (0, 1)]
    kept = KeptNetworks(max_bytes=S * sum(each.weight.nbytes + each.bias.nbytes for each in down))
    for _ in range(2):
        samples(net, images(MANY), kept, sites=["residual"])
    assert net.made["cut"] == S


def test_a_failing_pass_leaves_the_net_and_what_is_kept_as_they_were() -> None:
    net, kept, x = make(), KeptNetworks(), images(FEW)
    expected, modules = samples(net, x, kept), [*net.modules()]
    for wrong in (images(FEW)[:, :1], images(MANY)[:, :1]):
        with pytest.raises((ValueError, RuntimeError), match=r"of shape|shapes cannot be multiplied"):
            samples(net, wrong, kept)
    assert [*net.modules()] == modules
    assert not any(module.training for module in modules)
    assert torch.equal(samples(net, x, kept), expected)


def test_an_inference_leaves_no_tensors_that_gradients_cannot_use() -> None:
    net, kept, x = make("projected"), KeptNetworks(), images(FEW).requires_grad_()
    with torch.inference_mode():
        mc_predict(net, x, num_samples=S, kept=kept)
    next(mc_samples(net, x, num_samples=S, kept=kept))[0, 0].backward()
    assert x.grad is not None
    assert x.grad[0].abs().max() > 0


def test_gradients_of_inputs_are_those_of_the_networks() -> None:
    net, x = make("residual"), images(FEW).requires_grad_()
    (expected,) = torch.autograd.grad(net.thin(0, 0)(x).softmax(-1)[:, 0].sum(), x)
    (got,) = torch.autograd.grad(next(mc_samples(net, x))[:, 0].sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not next(mc_samples(net, images(FEW))).requires_grad


def test_rates_scaled_to_zero_give_the_network_itself() -> None:
    net = make()
    for size in (FEW, MANY):
        expected = net(images(size)).softmax(-1)
        torch.testing.assert_close(samples(net, images(size), scale=0.0), expected.expand(S, -1, -1))
