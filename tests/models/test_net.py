"""What a net offers, and logits that are computed some rows at a time."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.models import (
    GPT,  # gpt only
    MLP,  # mlp only
)
from thinned.models import net as net_module
from thinned.models.net import Logits, check_logits, logits_in, logits_of, net_offers


def test_a_foreign_net_offers_the_defaults() -> None:
    offers = net_offers(nn.Linear(2, 3))
    assert (offers.init_args, offers.input_shape, offers.num_classes, offers.thin) == (None, None, None, None)
    assert (offers.features, offers.logits, offers.flops_per_token) == (None, None, None)
    assert tuple(offers.blocks) == ()


# mlp only: begin
def test_mlp_offers_its_own() -> None:
    net = MLP((1, 2, 2), 3, hidden=(4,))
    offers = net_offers(net)
    assert (offers.input_shape, offers.num_classes, offers.vocab_size) == ((1, 2, 2), 3, None)
    assert offers.constrain_max_norm_ == net.constrain_max_norm_


# mlp only: end
# gpt only: begin
def test_gpt_offers_its_own() -> None:
    gpt = GPT(5, 6, num_layers=2, num_heads=1, width=8)
    offers = net_offers(gpt)
    assert (offers.vocab_size, offers.context_length, offers.blocks) == (5, 6, gpt.blocks)
    assert (offers.features, offers.logits, offers.thin) == (gpt.features, gpt.logits, gpt.thin)


# gpt only: end
def test_a_name_that_is_not_listed_is_an_error() -> None:
    with pytest.raises(AttributeError, match="head"):
        _ = net_offers(nn.Linear(2, 3)).head  # type: ignore[attr-defined]


@pytest.mark.parametrize("at_once", [1, 12, 2**22])  # one row at a time, two with a smaller third part, and all
def test_log_probabilities_are_those_of_all_logits(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_module, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    head, x = nn.Linear(4, 6), torch.randn(3, 2, 4)
    chosen = torch.tensor([[True, False], [True, True], [True, True]])
    expected = torch.log_softmax(head(x)[chosen], dim=-1)
    for logits in (Logits(x, head), Logits(head(x))):
        parts = list(logits.select(chosen).log_probs())
        assert len(parts) == {1: 5, 12: 3, 2**22: 1}[at_once]
        for rows, log_probs in parts:
            torch.testing.assert_close(log_probs, expected[rows])
        torch.testing.assert_close(torch.cat([log_probs for _, log_probs in parts]), expected)


@pytest.mark.parametrize(
    ("given", "got"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_rows_come_in_single_precision_at_least(given: torch.dtype, got: torch.dtype) -> None:
    assert Logits(torch.zeros(2, 3, dtype=given))[:1].dtype == got


# gpt only: begin
def test_logits_of_a_language_model_wait_until_they_are_asked_for() -> None:
    class Counting(GPT):
        asked = 0

        def logits(self, features: torch.Tensor) -> torch.Tensor:
            self.asked += len(features)
            return super().logits(features)

    net, tokens = Counting(5, 6, num_layers=1, num_heads=1, width=8), torch.arange(8).view(2, 4) % 5
    logits = logits_of(net, tokens)
    assert (net.asked, len(logits), logits.x.shape) == (0, 2, (2, 4, 8))
    torch.testing.assert_close(logits[1:], net(tokens)[1:])


# gpt only: end
def test_logits_of_another_net_are_what_it_returns() -> None:
    net, x = nn.Linear(2, 3), torch.ones(4, 2)
    assert torch.equal(logits_of(net, x)[:], net(x))


class Named(NamedTuple):
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: {"loss": x.sum(), "logits": x},
        lambda x: SimpleNamespace(logits=x),
        lambda x: Named(x.exp(), x),
    ],
)
def test_logits_in_what_a_net_returns(wrap: Callable[[Tensor], Any]) -> None:
    x = torch.randn(4, 3)
    assert logits_in(Returns(wrap), x) is x


def test_first_of_a_tuple_is_taken_and_said() -> None:
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="The first of the 2 outputs of Returns is used as the logits"):
        assert logits_in(Returns(lambda x: (x, x.exp())), x) is x


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda x: {"loss": x, "output": x}, "dict"),
        (lambda x: {"logits": None}, "dict"),
        (lambda x: (), "tuple"),
        (lambda x: [None, x], "list"),
        (lambda x: 3, "int"),
        (lambda x: SimpleNamespace(output=x), "SimpleNamespace"),
    ],
)
@pytest.mark.filterwarnings("ignore:The first of")
def test_output_without_logits_is_refused_by_name(wrap: Callable[[Tensor], Any], got: str) -> None:
    with pytest.raises(ValueError, match=f"Expected a tensor of logits, .* from Returns, but got {got}"):
        logits_in(Returns(wrap), torch.randn(4, 3))


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 10), (4, 16, 1000)])
def test_probabilities_are_no_logits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Their rows sum to 1 within what the type can hold. Logits and logs of probabilities are let through."""
    torch.manual_seed(0)
    logits = torch.randn(shape)
    probabilities = logits.softmax(-1).to(dtype)
    with pytest.raises(ValueError, match=r"Expected logits from Identity, but got probabilities \(rows sum to 1\)"):
        check_logits(nn.Identity(), probabilities)
    first, second = F.one_hot(torch.tensor([0, 1]), shape[-1])
    with_negative_ones = logits.softmax(-1) + first - second
    for taken in (logits, logits.log_softmax(-1), logits.sigmoid(), torch.full(shape, 1 / 9), with_negative_ones):
        check_logits(nn.Identity(), taken.to(dtype))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 7, 1)])
def test_one_number_for_a_target_is_no_logits(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 classes from Identity, but got the shape .*returns \(B, 2\)"):
        check_logits(nn.Identity(), torch.randn(shape))
