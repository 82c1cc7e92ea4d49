"""Nets of any make of which dropout cannot act alone, or whose rates are 0, and what the search for dropout costs."""

from collections.abc import Callable
from typing import Any

import foreign_modules as made
import pytest
import torch
from foreign_nets import CausalSelfAttention, First, in_turn, pooled, state
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.models.net import logits_in
from thinned.uncertainty import mc_predict
from thinned.uncertainty.foreign_dropout import deterministic_output

S = 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# What cannot be had


class DrawsBeside(made.Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (torch.randn_like(x) if self.training else 0)


class DrawsInVain(made.Attention):
    """As a layer does that is left out at random, in a pass in which it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + (torch.rand(()) < -1 if self.training else 0))


class ReturnsMore(made.Attention):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x), x) if self.training else super().forward(x)


class Scales(made.Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class Counts(made.Attention):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        return super().forward(x) / (1 + self.steps)


class Norms(made.Functional):
    """A batch norm by a function, beside a dropout by a function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.batch_norm(x, torch.zeros(2), torch.ones(2), training=self.training))


class ToldByAnother(nn.Module):
    """Whose dropout asks for the mode of the module that calls it."""

    def forward(self, x: Tensor, training: bool) -> Tensor:
        return F.dropout(x, 0.5, training)


class Tells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = ToldByAnother()

    def forward(self, x: Tensor) -> Any:
        return self.part(x, self.training)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (DrawsBeside, "another output"),
        (DrawsInVain, "random numbers drawn by DrawsInVain"),
        (ReturnsMore, "TypeError: .*tuple"),
        (Scales, "another output"),
        (Counts, "another output"),
        (Norms, "another output"),
    ],
)
def test_attention_that_does_more_in_training_mode_is_refused_by_name(kind: Any, said: str) -> None:
    net = in_turn(kind())
    before, where = state(net), kind.__name__
    if kind is ReturnsMore:
        net = nn.Sequential(*net[:2], TakesBoth(), net[2]).eval()
        before = state(net)
    with pytest.raises(ValueError, match=rf"Expected {where} \(1\) to do nothing in training mode .*{said}"):
        mc_predict(net, torch.randn(4, 2), num_samples=S)
    assert state(net) == before


def test_dropout_that_asks_for_the_mode_of_another_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected ToldByAnother \(1.part\) .* got dropout out of reach"):
        mc_predict(in_turn(Tells()), torch.randn(4, 2), num_samples=S)


class TakesBoth(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0] if self.training else x * 1


class AlwaysOn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


def test_net_that_draws_in_evaluation_mode_is_refused() -> None:
    net, x = in_turn(AlwaysOn()), torch.randn(4, 2)
    for predict in (lambda: mc_predict(net, x), lambda: deterministic_output(net, lambda net: net(x))):
        with pytest.raises(
            ValueError, match=r"deterministic in evaluation mode, but got .* AlwaysOn \(1\), which has to ask"
        ):
            predict()


@pytest.mark.parametrize(
    ("head", "said"), [(nn.Linear(3, 1), "at least 2 classes"), (nn.Softmax(-1), "got probabilities")]
)
def test_what_is_no_logits_is_refused(head: nn.Module, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mc_predict(in_turn(made.Functional()).append(head), torch.randn(4, 2), num_samples=S)


def test_net_that_cannot_run_in_training_mode_is_refused() -> None:
    class NeedsTargets(made.Functional):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training, "targets"
            return super().forward(x)

    with pytest.raises(ValueError, match=r"Sequential to run in training mode, .* AssertionError: targets"):
        mc_predict(in_turn(NeedsTargets()), torch.randn(4, 2))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_script_that_reads_its_mode_is_refused() -> None:
    net = torch.jit.script(nn.Sequential(nn.Linear(2, 3), FunctionalInScript()))
    with pytest.raises(ValueError, match=r"TorchScript in RecursiveScriptModule.1, whose code reads `training`"):
        mc_predict(net.eval(), torch.randn(4, 2))


class FunctionalInScript(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class CountingDropout(nn.Module):
    """Is known by its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            return x * torch.bernoulli(torch.full_like(x, 0.5)) * 2
        return x


class CountingAttention(made.Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
        return super().forward(x)


@pytest.mark.parametrize("kind", [CountingDropout, CountingAttention])
def test_changed_buffers_are_refused_and_restored(kind: Any) -> None:
    net = in_turn(kind())
    with pytest.raises(ValueError, match=r"dropout alone .* changed buffers: \['1.calls'\]"):
        mc_predict(net, torch.randn(4, 2), num_samples=2)
    assert net[1].calls == 0
    assert not net[1].training


# Rates of 0


RATES_OF_ZERO: dict[str, Callable[[], nn.Module]] = {
    "nn.Dropout": lambda: nn.Dropout(0.0),
    "nn.Dropout, integer": lambda: nn.Dropout(0),
    "nn.MultiheadAttention": lambda: First(SelfAttention(0.0)),
    "nn.LSTM": lambda: First(nn.LSTM(8, 8, 2, batch_first=True)),
    "nanoGPT": lambda: CausalSelfAttention(flash=True, dropout=0.0),
    "beside noise": lambda: nn.Sequential(nn.Dropout(0.0), made.Noise(), nn.BatchNorm1d(5)),
}


class SelfAttention(nn.MultiheadAttention):
    def __init__(self, dropout: float) -> None:
        super().__init__(8, 2, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


@pytest.mark.parametrize("name", RATES_OF_ZERO)
def test_rates_of_zero_sample_the_deterministic_net(name: str) -> None:
    net, x = pooled(RATES_OF_ZERO[name]()).train(), torch.randn(8, 5, 8)
    predicted = mc_predict(net, x, num_samples=S)
    assert net.training
    torch.testing.assert_close(predicted.mean, net.eval()(x).softmax(-1))
    assert predicted.mutual_information.max() < 1e-6
    assert predicted.variance.max() == 0


def test_a_rate_that_never_acts_is_no_rate_of_zero() -> None:
    """An LSTM of one layer does nothing with its dropout."""
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        net = pooled(First(nn.LSTM(8, 8, 1, dropout=0.5, batch_first=True)))
    with pytest.raises(ValueError, match="a pass that draws nothing"):
        mc_predict(net, torch.randn(2, 5, 8))


# Cost


def test_number_of_passes() -> None:
    """Two to find the dropout, and one more to check a module that calls it."""
    for kind, passes in ((made.OwnModule, 2), (made.Functional, 3), (made.Attention, 3)):
        net, calls = in_turn(kind()), []
        net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        mc_predict(net, torch.randn(4, 2), num_samples=S)
        assert len(calls) == passes + S


def test_outputs_of_many_kinds() -> None:
    """A dict is asked for its logits, of which dropout makes several."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = in_turn(made.Functional())

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x, "logits": self.body(x)}

    net, x = Named(), torch.randn(4, 2)
    assert torch.equal(mc_predict(net, x, num_samples=S).mean, mc_predict(net.body, x, num_samples=S).mean)
    assert torch.equal(logits_in(net.eval(), x), net.body(x))
