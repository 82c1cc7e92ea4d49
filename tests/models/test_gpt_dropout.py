"""Dropout in the GPT's training: where each rate acts, on what, and with which mask in the backward pass."""

import math
from collections import defaultdict
from typing import Any
from unittest import mock

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from thinned.models import GPT, SITES, Dropout, DropoutRates
from thinned.models.dropout import watched
from thinned.models.gpt import Attention, AttentionMask, KVCache

V, P, H, C = 21, 8, 4, 16
ALL = DropoutRates(embedding=0.1, attention=0.2, residual=0.3, mlp=0.4)


def make(dropout: DropoutRates = ALL, **options: Any) -> GPT:
    """A float64 GPT of two layers in training mode, with no parameter left at 0 or 1."""
    torch.manual_seed(0)
    shape = {"vocab_size": V, "context_length": P, "num_layers": 2, "num_heads": H, "width": C, "bias": True}
    net = GPT(**shape | {"dropout": dropout} | options).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def some_tokens(batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, P), generator=torch.Generator().manual_seed(seed))


def dropouts(net: nn.Module) -> dict[str, Dropout]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Dropout)}


def transparent(p: float) -> tuple[Attention, Tensor]:
    """Attention with equal scores whose output (B, T, (H T)) is its probabilities, and its input (1, T, (H T))."""
    layer = Attention(H * P, H, P, False, DropoutRates(attention=p)).double()
    layer.projection = nn.Identity()
    nn.init.zeros_(layer.qkv.weight)
    with torch.no_grad():
        layer.qkv.weight[2 * H * P :, :P] = torch.eye(P).repeat(H, 1)  # each head's values are the position, one-hot
    return layer, torch.eye(P, H * P, dtype=torch.float64)[None]


# Attention


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_probabilities_are_dropped_after_the_softmax(p: float) -> None:
    """Each is 0 or 1 / (1 - p) of its own, so a row need not add up to 1.

    False failure: below 3e-6 (shares dropped, of the first token's 4,000 single entries and of all; the exact binomial
    test, 1e-6 each) and below 4e-8 (one correlation of heads).
    """
    torch.manual_seed(0)
    layer, x = transparent(p)
    rows = layer(x.expand(1000, -1, -1)).view(1000, P, H, P).transpose(1, 2)  # (B, H, T, S)
    plain = torch.ones(P, P, dtype=torch.float64).tril() / torch.arange(1, P + 1)[:, None]
    allowed = torch.stack([torch.zeros(P, P), plain / (1 - p)])
    assert (rows[..., None, :, :] - allowed).abs().amin(-3).max() < 1e-15
    first = rows[:, :, 0, 0]
    assert first.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-15)
    seen = rows[:, :, plain > 0]
    for part in (first, seen):
        assert stats.binomtest(int((part == 0).sum()), part.numel(), p).pvalue > 1e-6
    heads = (seen[:, :2] == 0).double().transpose(0, 1).flatten(1)
    assert abs(torch.corrcoef(heads)[0, 1]) * heads.shape[1] ** 0.5 < 5.5


def test_the_first_token_takes_nothing_or_its_own_value_from_a_head() -> None:
    """False failure: 1e-6 (exact binomial test of 8,000 heads)."""
    torch.manual_seed(0)
    layer = Attention(C, H, P, True, DropoutRates(attention=0.3)).double()
    layer.projection = nn.Identity()
    x = torch.randn(2000, P, C, dtype=torch.float64)
    own = layer.qkv(x[:, 0])[:, 2 * C :].view(2000, H, C // H)
    ratio = layer(x)[:, 0].view(2000, H, C // H) / own
    dropped = (ratio == 0).all(-1)
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / 0.7), rtol=1e-12, atol=0)
    assert stats.binomtest(int(dropped.sum()), 8000, 0.3).pvalue > 1e-6


@pytest.mark.parametrize("length", [1, 5, P])
def test_attention_under_a_mask_of_ones_is_that_of_torch(length: int) -> None:
    net, tokens = make().eval(), some_tokens()
    expected, expected_end = net(tokens), net(tokens)[:, -length:]
    for block in net.blocks:
        block.attention.attention_dropout = AttentionMask(torch.ones(H, P, P, dtype=torch.float64))
    torch.testing.assert_close(net(tokens), expected, rtol=0, atol=1e-12)
    cache = KVCache()
    for chunk in tokens.split([P - length, length], 1):
        end = net(chunk, cache=cache)
    torch.testing.assert_close(end, expected_end, rtol=0, atol=1e-12)


def test_fused_attention_gives_way_to_whoever_watches() -> None:
    """On CUDA, of which a tensor without numbers is enough: its fused attention shows no probabilities."""
    seen: list[str] = []
    attention = Attention(8, 2, P, False, DropoutRates(attention=0.5))
    with FakeTensorMode(), mock.patch.object(F, "scaled_dot_product_attention") as fused:
        query = torch.empty(1, 2, P, 4, device="cuda")
        attention.attend(query, query, query)
        with watched(attention, lambda name, *_: seen.append(name)):
            attention.attend(query, query, query)
        assert (fused.call_count, seen) == (1, ["attention_dropout"])
        attention.attend(query, query, query)
    assert (fused.call_count, seen) == (2, ["attention_dropout"])


def test_attention_dropout_is_governed_by_its_own_module() -> None:
    net, tokens = make(), some_tokens()
    expected = net.eval()(tokens)
    assert torch.equal(net(tokens), expected)
    net.blocks[1].attention.attention_dropout.train()
    first, second = net(tokens), net(tokens)
    assert not torch.allclose(first, expected)
    assert not torch.allclose(first, second)
    net.train()
    for module in dropouts(net).values():
        module.eval()
    assert torch.equal(net(tokens), expected)


# Sites


def test_training_without_rates_is_evaluation() -> None:
    net, tokens = make(DropoutRates()), some_tokens()
    assert torch.equal(net(tokens), net.eval()(tokens))


def test_embedding_dropout_takes_tokens_and_positions() -> None:
    net = make(DropoutRates(embedding=1))
    logits = net(some_tokens())
    assert torch.equal(logits, net(some_tokens(seed=2)))
    torch.testing.assert_close(logits, logits[:1, :1].expand_as(logits), rtol=0, atol=1e-12)


def test_residual_dropout_takes_what_both_sublayers_add() -> None:
    net, tokens = make(DropoutRates(residual=1)), some_tokens()
    expected = net.head(net.norm(net.token_embedding(tokens) + net.position_embedding.weight))[..., :V]
    assert torch.equal(net(tokens), expected)


@pytest.mark.parametrize(("site", "last"), [("mlp", "mlp.down"), ("attention", "attention.projection")])
def test_a_sublayer_whose_inside_is_dropped_adds_its_bias(site: str, last: str) -> None:
    net, tokens = make(DropoutRates(**{site: 1})), some_tokens()
    dropped = net(tokens)
    without = net.eval()(tokens)
    for block in net.blocks:
        nn.init.zeros_(block.get_submodule(last).weight)
    torch.testing.assert_close(dropped, net(tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(dropped, without)


def test_each_rate_is_at_its_site_and_none_after_the_last_norm() -> None:
    net = make()
    assert {name: (m.site, m.p) for name, m in dropouts(net).items()} == {
        "embedding_dropout": ("embedding", 0.1)
    } | {
        f"blocks.{i}.{name}": (name.split(".")[1].removesuffix("_dropout"), p)
        for i in range(2)
        for name, p in (
            ("attention.attention_dropout", 0.2), ("attention.residual_dropout", 0.3),
            ("mlp.mlp_dropout", 0.4), ("mlp.residual_dropout", 0.3),
        )
    }  # fmt: skip
    seen = []
    net.norm.register_forward_hook(lambda module, args, features: seen.append(features))
    logits = net(some_tokens())
    torch.testing.assert_close(logits, seen[0] @ net.token_embedding.weight[:V].T, rtol=0, atol=1e-12)


# Masks


def test_backward_uses_the_masks_of_forward_and_each_forward_its_own() -> None:
    """False failure: below 1e-20 (equal masks at a site, of 384 elements or more)."""
    net, tokens = make(), some_tokens()
    calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for name, module in dropouts(net).items():

        def before(module: nn.Module, args: tuple[Tensor], seen: Any = calls[name]) -> Tensor:
            args[0].retain_grad()
            seen.append((args[0], args[0]))
            return args[0].clone()  # which may be overwritten

        def after(module: nn.Module, args: tuple[Tensor], output: Tensor, seen: Any = calls[name]) -> None:
            output.retain_grad()
            seen[-1] = (seen[-1][0], output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    for _ in range(2):
        net(tokens).square().sum().backward()
    assert {len(pairs) for pairs in calls.values()} == {2}
    for name, module in dropouts(net).items():
        masks = []
        for x, y in calls[name]:
            known = x != 0  # not a future token
            mask = (y != 0).double() / (1 - module.p)
            assert 0 < (mask[known] == 0).sum() < known.sum()
            torch.testing.assert_close(y, x * mask, rtol=1e-14, atol=0)
            torch.testing.assert_close(x.grad[known], (y.grad * mask)[known], rtol=1e-14, atol=0)
            masks.append(mask)
        assert not torch.equal(*masks), name


def test_activation_checkpointing_saves_memory_and_nothing_else_changes() -> None:
    outcomes = []
    for enabled in (False, True):
        net, saved = make(activation_checkpointing=enabled, num_layers=4), {}

        def save(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            loss = net(some_tokens(8), some_tokens(8, seed=2)).sum()
        loss.backward()
        size = sum(nbytes for pointer, nbytes in saved.items() if pointer not in parameters)
        outcomes.append((loss, [p.grad for p in net.parameters()], size))
    (loss, grads, size), (other_loss, other_grads, other_size) = outcomes
    assert torch.equal(loss, other_loss)
    assert all(map(torch.equal, grads, other_grads))
    stream = 8 * P * C * 8  # bytes of a block's input, which it keeps
    assert other_size + 4 * stream < size / 4


@pytest.mark.parametrize("site", SITES)
def test_mean_of_training_logits_of_a_linear_site_is_near_evaluation(site: str) -> None:
    """Of one block without what comes after it. False failure: below 5e-6 (128 means, each within 5.5 SE)."""
    net, count = make(DropoutRates(**{site: 0.3}), num_layers=1), 2000
    block, x = net.blocks[0], some_tokens(1)
    x = net.token_embedding(x) + net.position_embedding.weight
    part = {
        "embedding": net.embedding_dropout,
        "attention": block.attention,
        "residual": lambda x: block.mlp(x) + block.attention(x),
        "mlp": block.mlp,
    }[site]
    with torch.no_grad():
        draws = part(x.repeat(count, 1, 1))
        expected = part.eval()(x) if isinstance(part, nn.Module) else (block.eval(), part(x))[1]
    error = (draws.mean(0) - expected[0]).abs() / (draws.std(0) / math.sqrt(count))
    assert error.max() < 5.5
