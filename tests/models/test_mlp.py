"""The MLP against hand-worked passes, and its thinned networks against the masks that they stand for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, combinations, product
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from thinned.models import MLP, Dropout, DropoutRates
from thinned.models.dropout import sample_masks, sites_in
from thinned.models.mlp import AttentionPooling, PatchEmbedding, Residual

ACTIVATIONS = ["relu", "gelu", "silu", "tanh"]
STEMS: dict[str, dict[str, Any]] = {
    "raw": {},
    "projected": {"width": 12},
    "residual": {"width": 12, "residual": True},
    "patches": {"width": 6, "patch_size": 2},
    "residual-patches": {"width": 6, "patch_size": 2, "residual": True},
}
ARCHITECTURES = list(product(STEMS, [False, True], [(), (40,), (40, 25)]))


def make(stem: str = "raw", layer_norm: bool = False, hidden: tuple[int, ...] = (40, 25), p: float = 0.4) -> MLP:
    """A float64 MLP in evaluation mode, with all the sites that it can have and no parameter left at 0 or 1."""
    torch.manual_seed(0)
    options = STEMS[stem]
    rates = DropoutRates(
        embedding=p,
        attention=p if "patch_size" in options else 0,
        residual=p if "residual" in options and hidden else 0,
        mlp=p if hidden else 0,
    )
    activation = ACTIVATIONS[(len(hidden) + list(STEMS).index(stem)) % 4]
    net = MLP((2, 4, 4), 3, hidden, activation, layer_norm, dropout=rates, **options).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


@contextmanager
def masked(net: MLP, masks: dict[str, Tensor]) -> Iterator[None]:
    """Multiplies what the named modules return by their masks, whose shape must be that of one example there."""

    def multiply_by(mask: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            assert output.shape[1:] == mask.shape
            return output * mask

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(multiply_by(mask)) for name, mask in masks.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("stem", "layer_norm", "hidden"), ARCHITECTURES)
def test_thinned_network_is_the_network_under_its_masks(stem: str, layer_norm: bool, hidden: tuple[int, ...]) -> None:
    net = make(stem, layer_norm, hidden)
    x, sites = torch.randn(3, 2, 4, 4, dtype=torch.float64), sites_in(net)
    subsets = [None, *chain.from_iterable(combinations(sites, n) for n in range(1, len(sites) + 1))]
    for subset, sample in product(subsets, range(3)):
        masks = sample_masks(net, 7, sample, subset)
        dropouts = {name: m for name, m in net.named_modules() if isinstance(m, Dropout) and m.p > 0}
        assert set(masks) == {name for name, m in dropouts.items() if subset is None or m.site in subset}
        with masked(net, masks):
            expected = net(x)
        torch.testing.assert_close(net.thin(7, sample, subset)(x), expected, rtol=1e-12, atol=1e-12)
        if masks:
            _, logits = net.stack(7, [sample + 1, sample], subset)(x)
            torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stem", "layer_norm", "hidden"), ARCHITECTURES)
def test_thinned_network_has_no_dropout(stem: str, layer_norm: bool, hidden: tuple[int, ...]) -> None:
    thinned = make(stem, layer_norm, hidden).train().thin(0, 0)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    stack = make(stem, layer_norm, hidden).train().stack(0, [0, 1], ["embedding"])
    for module in (thinned, stack):
        assert not any(isinstance(part, Dropout) for part in module.modules())
        assert torch.equal(module.train()(x), module.eval()(x))


@pytest.mark.parametrize("training", [False, True])
def test_thinning_draws_nothing_and_leaves_the_net_as_it_was(training: bool) -> None:
    net = make("residual-patches").train(training)
    net.stages.head.eval()  # a mode of its own
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes, state = [module.training for module in net.modules()], torch.get_rng_state()
    for thinned in (net.thin(0, 0), net.stack(0, [0, 1])):
        thinned(torch.ones(1, 2, 4, 4, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_dropped_hidden_units_are_cut_out_in_multiples_of_16() -> None:
    net = MLP((64,), 10, (256, 256), dropout=DropoutRates(mlp=0.5))
    kept = [int((sample_masks(net, 0, 11)[f"stages.mlp_dropout{i}"] > 0).sum()) for i in (0, 1)]
    widths = [-(-n // 16) * 16 for n in kept]
    assert all(0 < n % 16 <= 8 for n in kept)  # so that no other multiple would do
    shapes = [tuple(m.weight.shape) for m in net.thin(0, 11) if isinstance(m, nn.Linear)]
    assert shapes == [(widths[0], 64), (widths[1], widths[0]), (10, widths[1])]
    assert [tuple(m.weight.shape) for m in net.thin(0, 11, []) if isinstance(m, nn.Linear)][1] == (256, 256)


@pytest.mark.parametrize("stem", STEMS)
def test_dropping_everything_leaves_what_bypasses_dropout(stem: str) -> None:
    net, x = make(stem, p=1.0), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    bypass = torch.zeros(1, net.stages.head.in_features, dtype=torch.float64)
    expected = net.stages.head(bypass).expand(3, 3)
    torch.testing.assert_close(net.thin(0, 0)(x), expected)
    torch.testing.assert_close(net.train()(x), expected)


@pytest.mark.parametrize("stem", ["raw", "residual-patches"])
def test_shared_and_independent_masks_agree_in_distribution(stem: str) -> None:
    """False failure: 1e-6 (Kolmogorov-Smirnov) plus 4e-8 (means within 5.5 standard errors) for one logit."""
    net, x = make(stem, hidden=(40,)), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    shared = torch.stack([net.thin(0, sample)(x)[0, 0] for sample in range(1000)]).detach()
    independent = net.train()(x.expand(10_000, -1, -1, -1))[:, 0].detach()
    assert stats.ks_2samp(shared.numpy(), independent.numpy()).pvalue > 1e-6
    standard_error = (shared.var() / len(shared) + independent.var() / len(independent)).sqrt()
    assert abs(shared.mean() - independent.mean()) < 5.5 * standard_error


def test_two_two_two_network_by_hand() -> None:
    net = MLP((2,), 2, (2,), dropout=DropoutRates(mlp=0.5))
    with torch.no_grad():
        net.stages.linear0.weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
        net.stages.linear0.bias.copy_(torch.tensor([0.0, 1.0]))
        net.stages.head.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 3.0]]))
        net.stages.head.bias.copy_(torch.tensor([0.5, 0.0]))
    x = torch.tensor([[3.0, 1.0], [1.0, 2.0]])  # hidden: relu(2, 7), relu(-1, 3)
    assert net.eval()(x).tolist() == [[16.5, 19.0], [6.5, 9.0]]
    with masked(net, {"stages.mlp_dropout0": torch.tensor([2.0, 0.0])}):  # hidden: (4, 0), (0, 0)
        assert net(x).tolist() == [[4.5, -4.0], [0.5, 0.0]]


def test_patches_are_cut_in_reading_order() -> None:
    embedding = PatchEmbedding((1, 2, 4), patch_size=2, width=1)
    nn.init.zeros_(embedding.projection.bias)
    with torch.no_grad():
        embedding.projection.weight.copy_(torch.tensor([[1000.0, 100.0, 10.0, 1.0]]))
        embedding.position.copy_(torch.tensor([[0.25], [0.5]]))
    image = torch.tensor([[[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]])
    assert embedding(image).tolist() == [[[1256.25], [3478.5]]]


def test_attention_dropout_acts_after_the_softmax() -> None:
    key_value = nn.Linear(4, 8)
    with torch.no_grad():
        key_value.weight.copy_(torch.cat([torch.eye(4), 20 * torch.eye(4)]))
        key_value.bias.copy_(torch.tensor([0.0] * 4 + [10.0] * 4))
    query = nn.Parameter(torch.tensor([2 * math.log(3), 0, 0, 0]))
    pooling = AttentionPooling(query, key_value, nn.Identity())
    x = torch.tensor([[[0.0] * 4, [1.0] * 4]])  # scores 0 and log 3, attention 1/4 and 3/4; values 10 and 30
    assert pooling(x)[0].tolist() == pytest.approx([25] * 4)
    pooling.attention_dropout.register_forward_hook(lambda module, args, weights: weights * torch.tensor([2.0, 0.0]))
    assert pooling(x)[0].tolist() == pytest.approx([5] * 4)  # on the scores it would give 20, renormalised 10


def test_residual_adds_its_input() -> None:
    assert Residual(nn.Flatten())(torch.tensor([[1.0, -2.0]])).tolist() == [[2.0, -4.0]]


def test_residual_block_by_hand() -> None:
    net = MLP((1,), 2, (1,), width=1, residual=True)
    values = {"embedding": (2, 1), "block0.sublayer.up": (3, 0), "block0.sublayer.down": (-1, 5)}
    with torch.no_grad():
        for name, (weight, bias) in values.items():
            net.stages.get_submodule(name).weight.fill_(weight)
            net.stages.get_submodule(name).bias.fill_(bias)
        net.stages.head.weight.copy_(torch.tensor([[1.0], [10.0]]))
        net.stages.head.bias.zero_()
    # Stream 2 * 1 + 1 = 3; block 5 - relu(3 * 3) = -4; stream -1.
    assert net(torch.ones(1, 1)).tolist() == [[-1.0, -10.0]]


@pytest.mark.parametrize(("stem", "layer_norm", "hidden"), ARCHITECTURES)
def test_no_dropout_on_logits(stem: str, layer_norm: bool, hidden: tuple[int, ...]) -> None:
    net = make(stem, layer_norm, hidden, p=0.9).train()
    assert isinstance(net.stages[-1], nn.Linear)
    assert (net(torch.randn(50, 2, 4, 4, dtype=torch.float64)) != 0).all()


def test_layer_norm_comes_before_the_nonlinearity_and_ends_the_residual_stream() -> None:
    names = [name for name, _ in MLP((4,), 2, (3,), layer_norm=True).stages.named_children()]
    assert names == ["flatten", "embedding_dropout", "linear0", "norm0", "activation0", "mlp_dropout0", "head"]
    stages = MLP((4,), 2, (3,), layer_norm=True, width=4, residual=True).stages
    assert [name for name, _ in stages.block0.sublayer.named_children()] == [
        "norm", "up", "activation", "mlp_dropout", "down", "residual_dropout",
    ]  # fmt: skip
    assert isinstance(stages[-2], nn.LayerNorm)


@pytest.mark.parametrize(("stem", "hidden_layer"), [("projected", "linear0"), ("residual", "block0.sublayer.up")])
def test_max_norm_bounds_the_incoming_weights_of_hidden_units_alone(stem: str, hidden_layer: str) -> None:
    net = make(stem, hidden=(40,))
    net.max_norm = 1.7
    before = {name: value.clone() for name, value in net.stages.state_dict().items()}
    net.constrain_max_norm_()
    after = net.stages.state_dict()
    old, new = before.pop(f"{hidden_layer}.weight"), after[f"{hidden_layer}.weight"]
    norm = old.norm(dim=1)
    small = norm <= 1.7
    assert 0 < small.sum() < len(small)
    assert torch.equal(new[small], old[small])
    torch.testing.assert_close(new[~small], (old * 1.7 / norm[:, None])[~small], rtol=1e-6, atol=0)
    assert new.norm(dim=1).max() <= 1.7
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_without_max_norm_nothing_is_constrained() -> None:
    net = make()
    before = net.stages.linear0.weight.clone()
    net.constrain_max_norm_()
    assert torch.equal(net.stages.linear0.weight, before)


@pytest.mark.parametrize(
    ("site", "options", "needed"),
    [
        ("attention", {}, "net.patch_size"),
        ("residual", {"width": 4}, "net.residual and net.hidden"),
        ("residual", {"width": 4, "residual": True, "hidden": ()}, "net.residual and net.hidden"),
        ("mlp", {"hidden": ()}, "net.hidden"),
    ],
)
def test_rate_for_a_lacking_site_is_refused(site: str, options: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=f"net.dropout.{site} to be 0 without {needed}, but got 0.1"):
        MLP((1, 4, 4), 2, dropout=DropoutRates(**{site: 0.1}), **options)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("input_shape", {"input_shape": ()}),
        ("input_shape", {"input_shape": (1, 0, 4)}),
        ("num_classes", {"num_classes": 1}),
        ("hidden", {"hidden": (8, 0)}),
        ("activation", {"activation": "step"}),
        ("width", {"width": 0}),
        ("width", {"residual": True}),
        ("width", {"patch_size": 2}),
        ("patch_size", {"patch_size": 3, "width": 4}),
        ("patch_size", {"patch_size": 2, "width": 4, "input_shape": (16,)}),
        ("patch_size", {"patch_size": 0, "width": 4}),
        ("max_norm", {"max_norm": 0.0}),
    ],
)
def test_setting_outside_its_range_is_refused_by_its_name(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Expected net\.{key} .*but got"):
        MLP(**{"input_shape": (1, 4, 4), "num_classes": 2} | options)


def test_input_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 4, 4\) .* but got \(4, 8\)"):
        make()(torch.zeros(1, 4, 8, dtype=torch.float64))


def test_config_rebuilds_the_net() -> None:
    net = make("residual-patches", layer_norm=True)
    twin = MLP(**net.init_args | {"dropout": DropoutRates(**net.init_args["dropout"])})
    assert str(twin) == str(net)
    assert twin.init_args == net.init_args
    twin.load_state_dict(net.state_dict())
