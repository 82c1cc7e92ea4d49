"""The GPT without dropout: who sees whom, its cache, its loss, its initial weights, and that it learns."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from thinned.models import GPT, DropoutRates, KVCache, gpt

V, P, H, C = 21, 8, 4, 16


def make(p: float = 0.0, std: float = 0.2, **options: Any) -> GPT:
    """A float64 GPT of two layers in evaluation mode, with no parameter left at 0 or 1."""
    torch.manual_seed(0)
    rates = DropoutRates(embedding=p, attention=p, residual=p, mlp=p)
    shape = {"vocab_size": V, "context_length": P, "num_layers": 2, "num_heads": H, "width": C, "dropout": rates}
    net = GPT(**shape | options).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)
    return net


def some_tokens(batch: int = 3, length: int = P) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def chunked(net: GPT, tokens: Tensor, sizes: tuple[int, ...]) -> Tensor:
    cache = KVCache()
    return torch.cat([net(chunk, cache=cache) for chunk in tokens.split(sizes, 1)], 1)


@pytest.mark.parametrize("way", ["whole", "cached", "dropout"])
def test_no_token_changes_what_comes_before_it(way: str) -> None:
    """False failure: below 1e-6 (with dropout, of 36 pairs one whose 8 attention weights are all dropped)."""
    net = make(dropout=DropoutRates(attention=0.1)).train(way == "dropout")

    def logits(tokens: Tensor) -> Tensor:
        torch.manual_seed(2)
        return chunked(net, tokens, (1, 3, 2, 2)) if way == "cached" else net(tokens)

    tokens = some_tokens(1)
    before = logits(tokens)
    for t in range(P):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 5) % V
        after = logits(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize("kind", ["plain", "thinned", "activation_checkpointing"])
def test_any_chunks_through_the_cache_give_the_logits_of_the_whole(kind: str) -> None:
    net, tokens = make(0.3, activation_checkpointing=kind == "activation_checkpointing"), some_tokens(2, 6)
    net = net.thin(0, 0) if kind == "thinned" else net
    expected = net(tokens)
    for cuts in range(2**5):  # bit i: whether there is a cut after token i
        edges = [0, *(i + 1 for i in range(5) if cuts >> i & 1), 6]
        sizes = tuple(end - start for start, end in pairwise(edges))
        torch.testing.assert_close(chunked(net, tokens, sizes), expected, rtol=0, atol=1e-10)


def test_more_tokens_than_positions_are_refused() -> None:
    net, said = make(), r"at most 8 tokens \(net.context_length\), but got 9"
    with pytest.raises(ValueError, match=said):
        net(some_tokens(1, 9))
    cache = KVCache()
    net(some_tokens(1, 6), cache=cache)
    with pytest.raises(ValueError, match=said):
        net(some_tokens(1, 3), cache=cache)
    assert net(some_tokens(1, 2), cache=cache).shape == (1, 2, V)  # the refused ones are not in it


@pytest.mark.parametrize("wrong", [-1, V, 63, 64])
def test_tokens_outside_the_vocabulary_are_refused_though_their_row_be_padded(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens in \[0, 21\) \(net.vocab_size\), but got .*{wrong}"):
        make()(torch.tensor([[3, wrong]]))


# Weights


@pytest.mark.parametrize("bias", [False, True])
def test_initial_weights_are_those_of_gpt2(bias: bool) -> None:
    """False failure: below 2e-6 (22 standard deviations, each within 5.5 standard errors)."""
    torch.manual_seed(0)
    net = GPT(1000, 64, num_layers=3, num_heads=4, width=128, bias=bias)
    for name, parameter in net.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / 6**0.5 if name.endswith(("attention.projection.weight", "mlp.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=5.5 / (2 * parameter.numel()) ** 0.5), name
        else:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


def test_vocabulary_is_padded_inside_and_the_head_is_the_embedding() -> None:
    net = make()
    assert net.head.weight is net.token_embedding.weight
    assert net.head.weight.shape == (64, C)
    assert [len(GPT(v, 4, 1, 1, 2).head.weight) for v in (64, 65)] == [64, 128]
    tokens = some_tokens()
    torch.testing.assert_close(net(tokens), net.features(tokens) @ net.token_embedding.weight[:V].T)


def test_gpt2_has_as_many_parameters_as_published() -> None:
    """124,439,808, and 47 rows that fill the vocabulary up to 50,304."""
    with torch.device("meta"):
        net = GPT(50257, 1024, num_layers=12, num_heads=12, width=768, bias=True)
    assert sum(p.numel() for p in net.parameters()) == 124_439_808 + 47 * 768


def test_flops_by_hand() -> None:
    """Head 64 x 4, block 12 x 4^2, three norms of 4: 6 x 460. Attention: 12 x 2 blocks x width x 8 positions."""
    assert GPT(50, 8, num_layers=1, num_heads=2, width=4).flops_per_token() == 6 * 460 + 12 * 4 * 8
    assert GPT(50, 8, num_layers=2, num_heads=2, width=4).flops_per_token() == 6 * 660 + 12 * 2 * 4 * 8


# The loss


def targets_of(tokens: Tensor) -> Tensor:
    """The next tokens; none after the last, nor within the first sequence's first half."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    targets[0, : tokens.shape[1] // 2] = -100
    return targets


@pytest.mark.parametrize("at_once", [2**24, 64 * 5, 1], ids=["whole", "chunks", "one by one"])
def test_losses_are_the_cross_entropy_of_the_logits(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", at_once)
    net, tokens = make(), some_tokens()
    targets = targets_of(tokens)
    losses, logits = net(tokens, targets), net(tokens)
    expected = torch.zeros(3, P, dtype=torch.float64)
    for b, t in (targets >= 0).nonzero().tolist():
        expected[b, t] = F.cross_entropy(logits[b, t], targets[b, t])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    assert ((losses == 0) == (targets == -100)).all()


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        self.size = max(self.size, *(x.numel() for x in (result,) if isinstance(x, Tensor)), 0)
        return result


def test_loss_in_chunks_has_the_same_gradients_and_never_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokens = make(num_heads=2, width=8), some_tokens(16)
    outcomes = []
    for at_once in (2**24, 64 * 15):  # 128 tokens, in chunks of 15 and a last one of 8
        monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", at_once)
        net.zero_grad()
        with Largest() as largest:
            loss = net(tokens, targets_of(tokens)).sum()
            loss.backward()
        outcomes.append((loss, [p.grad.clone() for p in net.parameters()], largest.size))
    (whole, whole_grads, whole_size), (loss, grads, size) = outcomes
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for name, grad, expected in zip(dict(net.named_parameters()), grads, whole_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert whole_size == 16 * P * 64
    assert size == 16 * P * 4 * 8  # the hidden activations


def test_loss_at_the_start_is_that_of_a_guess() -> None:
    """False failure: below 1e-9 (1,024 logits of standard deviation 0.23 on average: 0.007; and 0.03 of bias)."""
    torch.manual_seed(0)
    net = GPT(33, 64, num_layers=2, num_heads=4, width=128)
    loss = net(torch.randint(33, (16, 64)), torch.randint(33, (16, 64))).mean()
    assert loss.item() == pytest.approx(math.log(33), abs=0.08)  # log 64 = log 33 + 0.66


# Learning


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    net, tokens = GPT(V, 16, num_layers=2, num_heads=2, width=32), torch.randint(V, (4, 17))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = net(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.05


def test_bf16_gives_finite_gradients_and_about_the_loss_of_fp32() -> None:
    net, tokens = make(0.1, std=0.1).float().train(), some_tokens(8)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(net(tokens, targets_of(tokens)).sum() / 60)
    losses[1].backward()
    assert losses[1].dtype == torch.float32
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


# Settings


def test_config_rebuilds_the_net() -> None:
    net = make(0.1, bias=True, gelu="tanh", activation_checkpointing=True)
    twin = GPT(**net.init_args | {"dropout": DropoutRates(**net.init_args["dropout"])}).double().eval()
    assert (str(twin), twin.init_args) == (str(net), net.init_args)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(some_tokens()), net(some_tokens()))


def test_gelu_and_bias_are_as_set() -> None:
    x = torch.linspace(-3, 3, 7)
    for gelu, approximate in (("exact", "none"), ("tanh", "tanh")):
        assert torch.equal(make(gelu=gelu).blocks[0].mlp.gelu(x), F.gelu(x, approximate=approximate))
    assert [name for name, _ in make(bias=False).named_parameters() if name.endswith("bias")] == []
    assert len([name for name, _ in make(bias=True).named_parameters() if name.endswith("bias")]) == 2 * 6 + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 3}, r"net\.num_heads to divide net\.width 16, but got 3"),
        ({"vocab_size": None}, r"net\.vocab_size to be at least 1, but got None"),
        ({"context_length": None}, r"net\.context_length to be at least 1, but got None"),
        ({"vocab_size": 0}, r"net\.vocab_size to be at least 1, but got 0"),
        ({"context_length": 0}, r"net\.context_length to be at least 1, but got 0"),
        ({"num_layers": 0}, r"net\.num_layers to be at least 1, but got 0"),
        ({"num_heads": 0}, r"net\.num_heads to be at least 1, but got 0"),
        ({"width": -4}, r"net\.width to be at least 1, but got -4"),
        ({"gelu": "relu"}, r"net\.gelu to be exact or tanh, but got 'relu'"),
    ],
)
def test_setting_outside_its_range_is_refused_by_its_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {said}"):
        make(**options)
