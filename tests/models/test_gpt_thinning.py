"""The GPT's thinned networks against a second implementation of its forward pass, with masks in its four places."""

import math
from collections import OrderedDict
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.models import GPT, SITES, Dropout, DropoutRates, KVCache
from thinned.models.dropout import sample_masks
from thinned.models.thinning import replace_modules

V, P, H, C = 21, 8, 4, 16
CHOICES = [None, *([site] for site in SITES), ["attention", "mlp"], ["embedding", "residual"], []]


def make(p: float | None = 0.3, **options: Any) -> GPT:
    """A float64 GPT of two layers in evaluation mode, with no parameter left at 0 or 1; its rates differ for p None."""
    torch.manual_seed(0)
    rates = DropoutRates(0.2, 0.3, 0.4, 0.6) if p is None else DropoutRates(p, p, p, p)
    shape = {"vocab_size": V, "context_length": P, "num_layers": 2, "num_heads": H, "width": C, "dropout": rates}
    net = GPT(**shape | options).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def some_tokens(length: int = P) -> Tensor:
    return torch.randint(V, (3, length), generator=torch.Generator().manual_seed(1))


def reference(net: GPT, tokens: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """The logits by sums and products alone, from the weights, with masks multiplied in where dropout stands."""
    weights, T = net.state_dict(), tokens.shape[1]

    def mask(name: str) -> Tensor:
        return masks.get(name, torch.ones((), dtype=torch.float64))

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.einsum("btc,oc->bto", x, weights[f"{name}.weight"]) + weights.get(f"{name}.bias", 0)

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def gelu(x: Tensor) -> Tensor:
        if net.init_args["gelu"] == "tanh":
            return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))

    def attention(at: str, x: Tensor) -> Tensor:
        query, key, value = linear(f"{at}.qkv", x).chunk(3, -1)
        heads = []
        for h, part in enumerate(torch.arange(C).chunk(H)):
            scores = torch.einsum("btd,bsd->bts", query[..., part], key[..., part]) / math.sqrt(C // H)
            powers = scores.exp() * torch.ones(T, T, dtype=torch.float64).tril()
            probs = powers / powers.sum(-1, keepdim=True)
            dropped = mask(f"{at}.attention_dropout")
            dropped = dropped[..., h, :T, :T] if dropped.dim() else dropped
            heads.append(torch.einsum("bts,bsd->btd", probs * dropped, value[..., part]))
        return linear(f"{at}.projection", torch.cat(heads, -1)) * mask(f"{at}.residual_dropout")

    def mlp(at: str, x: Tensor) -> Tensor:
        hidden = gelu(linear(f"{at}.up", x)) * mask(f"{at}.mlp_dropout")
        return linear(f"{at}.down", hidden) * mask(f"{at}.residual_dropout")

    x = weights["token_embedding.weight"][tokens] + weights["position_embedding.weight"][:T]
    x = x * mask("embedding_dropout")
    for i in range(net.init_args["num_layers"]):
        x = x + attention(f"blocks.{i}.attention", norm(f"blocks.{i}.attention_norm", x))
        x = x + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.mlp_norm", x))
    return torch.einsum("btc,vc->btv", norm("norm", x), weights["token_embedding.weight"][:V])


@pytest.mark.parametrize(("gelu", "length"), [("exact", P), ("tanh", 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_evaluation_is_the_reference_without_masks(bias: bool, gelu: str, length: int) -> None:
    net, tokens = make(bias=bias, gelu=gelu), some_tokens(length)
    torch.testing.assert_close(net(tokens), reference(net, tokens, {}), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sites", CHOICES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_thinned_network_is_the_network_under_its_masks(bias: bool, sites: list[str] | None) -> None:
    net = make(None, bias=bias)
    for scale, sample, length in product((1.0, 0.5), range(3), (P, 5)):
        masks, tokens = sample_masks(net, 7, sample, sites, scale), some_tokens(length)
        acting = {n for n, m in net.named_modules() if isinstance(m, Dropout) and (sites is None or m.site in sites)}
        assert set(masks) == acting
        thinned = net.thin(7, sample, sites, scale)
        torch.testing.assert_close(thinned(tokens), reference(net, tokens, masks), rtol=0, atol=1e-10)


def test_training_is_the_reference_under_the_masks_that_it_drew() -> None:
    """Of each sequence and position its own."""
    net, tokens = make(None, bias=True).train(), some_tokens()
    inputs, masks = {}, {}
    for name, module in net.named_modules():
        if isinstance(module, Dropout):

            def before(module: Any, args: tuple[Tensor], name: str = name) -> None:
                inputs[name] = args[0].clone()  # which may be overwritten

            def after(module: Any, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                x = inputs[name]
                masks[name] = torch.where(x != 0, output / x, 1)  # future tokens have no probability

            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    logits = net(tokens)
    assert len(masks) == 1 + 2 * 4
    torch.testing.assert_close(logits, reference(net, tokens, masks), rtol=0, atol=1e-10)


def test_masks_have_the_rates_and_are_shared_by_positions_but_for_attention() -> None:
    net = make(None)
    shapes = {"embedding": (C,), "attention": (H, P, P), "residual": (C,), "mlp": (4 * C,)}
    for scale in (1.0, 0.5):
        for name, mask in sample_masks(net, 0, 0, scale=scale).items():
            module = net.get_submodule(name)
            assert tuple(mask.shape) == shapes[module.site], name
            kept = 1 / (1 - scale * module.p)
            assert mask.unique().tolist() == pytest.approx([0, kept], rel=1e-15), name


def test_rate_of_one_leaves_what_bypasses_dropout() -> None:
    net, tokens = make(1.0, bias=True), some_tokens()
    torch.testing.assert_close(net.thin(0, 0)(tokens), net.train()(tokens), rtol=0, atol=1e-12)
    for sites in CHOICES[1:5]:
        masks = sample_masks(net, 0, 0, sites)
        torch.testing.assert_close(net.thin(0, 0, sites)(tokens), reference(net, tokens, masks), rtol=0, atol=1e-10)


def test_dropped_hidden_units_are_cut_out_in_multiples_of_16() -> None:
    net = make(0.5, width=64)
    for i, block in enumerate(net.thin(0, 0).blocks):
        kept = int((sample_masks(net, 0, 0)[f"blocks.{i}.mlp.mlp_dropout"] > 0).sum())
        width = -(-kept // 16) * 16
        assert width <= 160
        assert block.mlp.up.weight.shape == (width, 64)
        assert block.mlp.down.weight.shape == (64, width)


def changed(net: GPT, thinned: GPT) -> set[str]:
    """Names of the parameters that lie elsewhere in memory than the net's, without the number of their block."""
    before = {name: value.data_ptr() for name, value in net.named_parameters(remove_duplicate=False)}
    after = {name: value.data_ptr() for name, value in thinned.named_parameters(remove_duplicate=False)}
    assert before.keys() == after.keys()
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in before if
            before[name] != after[name]}  # fmt: skip


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("embedding", {"token_embedding.weight", "position_embedding.weight"}),
        ("attention", {"blocks.attention.qkv.weight", "blocks.attention.qkv.bias"}),
        ("mlp", {"blocks.mlp.up.weight", "blocks.mlp.up.bias", "blocks.mlp.down.weight"}),
        ("residual", {f"blocks.{name}.{kind}" for name in ("attention.projection", "mlp.down")
                      for kind in ("weight", "bias")}),
    ],
)  # fmt: skip
def test_what_no_mask_touches_is_shared(site: str, expected: set[str]) -> None:
    net = make(bias=True)
    thinned = net.thin(0, 0, [site])
    assert changed(net, thinned) == expected
    assert changed(net, net.thin(0, 0, [])) == set()
    buffers = [f"blocks.{i}.attention.attention_dropout.mask" for i in range(2)]
    assert [name for name, _ in thinned.named_buffers()] == (buffers if site == "attention" else [])


def test_thinning_draws_nothing_and_leaves_the_net_as_it_was() -> None:
    net, tokens = make(bias=True).train(), some_tokens()
    net.norm.eval()  # a mode of its own
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes, state = [module.training for module in net.modules()], torch.get_rng_state()
    net.thin(0, 0)(tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_thinned_network_is_deterministic_whatever_the_mode() -> None:
    net, tokens = make().train(), some_tokens()
    thinned = net.thin(3, 1)
    logits = thinned(tokens)
    assert not any(isinstance(module, Dropout) for module in thinned.modules())
    assert torch.equal(thinned.train()(tokens), logits)
    assert torch.equal(thinned.eval()(tokens), logits)
    assert torch.equal(net.train().thin(3, 1)(tokens), logits)


@pytest.mark.parametrize("sites", CHOICES[:5], ids=str)
def test_networks_are_a_function_of_seed_and_sample(sites: list[str] | None) -> None:
    """False failure, excluded by the seeds: less than 1e-4 for equal masks of two times 16 elements."""
    net, tokens = make(), some_tokens()
    logits = [net.thin(*pair, sites)(tokens) for pair in ((0, 0), (0, 1), (1, 0))]
    torch.manual_seed(5)
    assert torch.equal(net.thin(0, 0, sites)(tokens), logits[0])
    assert not any(torch.allclose(logits[i], logits[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_thinned_network_has_the_loss_of_its_logits_and_a_cache() -> None:
    net, tokens = make(), some_tokens()
    thinned = net.thin(0, 0)
    losses, log_probs = thinned(tokens[:, :-1], tokens[:, 1:]), thinned(tokens[:, :-1]).log_softmax(-1)
    expected = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    cache = KVCache()
    one_by_one = torch.cat([thinned(token, cache=cache) for token in tokens.split(1, 1)], 1)
    torch.testing.assert_close(one_by_one, reference(net, tokens, sample_masks(net, 0, 0)), rtol=0, atol=1e-10)


def test_replaced_submodules_leave_the_original_as_it_is() -> None:
    original = nn.Sequential(OrderedDict(first=nn.Linear(2, 3), second=nn.ReLU()))
    before = dict(original.named_modules())
    copied = replace_modules(original, second=nn.Tanh())
    assert dict(original.named_modules()) == before
    assert copied.first is original.first
    assert [name for name, _ in copied.named_children()] == ["first", "second"]
    assert isinstance(copied.second, nn.Tanh)
