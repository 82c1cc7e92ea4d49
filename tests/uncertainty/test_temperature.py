"""Temperature scaling by hand, on simulated examples, and against scipy's minimiser."""

import math
from collections.abc import Sequence

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from thinned.models import net
from thinned.uncertainty.scores import nll
from thinned.uncertainty.temperature import TEMPERATURES, fit_temperature, nll_at, tempered

P = torch.tensor([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0]])


def test_distributions_at_a_temperature_by_hand() -> None:
    """At T = 1/2 squares: 0.64 and 0.04; at T = 2 roots. Zeros and certainty stay."""
    root = math.sqrt(0.8) + math.sqrt(0.2)
    by_hand = {
        0.5: [0.64 / 0.68, 0.04 / 0.68, 0, 0, 1, 0],
        2: [math.sqrt(0.8) / root, math.sqrt(0.2) / root, 0, 0, 1, 0],
    }
    for temperature, expected in by_hand.items():
        assert tempered(P, temperature).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert tempered(P, 1) is P


def test_nll_by_hand() -> None:
    """At T = 1/2 the probabilities of the targets are 0.04 / 0.68 and 1, at T = 1 0.2 and 1."""
    values = nll_at(P, torch.tensor([1, 1]), [0.5, 1])
    assert values.flatten().tolist() == pytest.approx([-math.log(0.04 / 0.68), -math.log(0.2), 0, 0], abs=1e-6)


def simulated(N: int, K: int, temperature: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Distributions (N, K), and targets that are drawn from them at a temperature, (N,)."""
    generator = torch.Generator().manual_seed(K)
    log_true = torch.log_softmax(2 * torch.randn(N, K, generator=generator, dtype=torch.float64), -1)
    targets = torch.multinomial(log_true.exp(), 1, generator=generator)[:, 0]
    return torch.softmax(log_true * temperature, -1).to(dtype), targets


def fitted(probs: Tensor, targets: Tensor) -> float:
    return fit_temperature(lambda temperatures: nll_at(probs, targets, temperatures).mean(0))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.7])
@pytest.mark.parametrize(("N", "K"), [(20_000, 10), (20_000, 100)], ids=["examples", "tokens"])
def test_a_known_temperature_is_found(N: int, K: int, temperature: float) -> None:
    """Within five standard errors, and 0.5 % for the steps: fails in 6 of 10^7 simulations.

    The Fisher information of log T is the variance of log q, with q the distribution at T.
    """
    probs, targets = simulated(N, K, temperature)
    q = tempered(probs, temperature).double()
    log_q = q.log()
    information = ((q * log_q.square()).sum(-1) - (q * log_q).sum(-1).square()).sum()
    standard_error = 1 / information.sqrt().item()
    assert standard_error < 0.01
    assert abs(math.log(fitted(probs, targets) / temperature)) < 5 * standard_error + 0.005


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.7])
def test_it_is_the_minimum_that_scipy_finds(temperature: float) -> None:
    probs, targets = simulated(500, 10, temperature, torch.float64)

    def mean_nll(log_temperature: float) -> float:
        return nll(torch.softmax(probs.log() / math.exp(log_temperature), -1), targets).mean().item()

    minimum = minimize_scalar(mean_nll, bounds=(-2, 2), method="bounded", options={"xatol": 1e-6})
    assert fitted(probs, targets) == pytest.approx(math.exp(minimum.x), rel=0.0051)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_nll_of_the_tempered_distributions(dtype: torch.dtype) -> None:
    probs, targets = simulated(50, 10, 1.5, dtype)
    for temperature, column in zip(TEMPERATURES, nll_at(probs, targets, TEMPERATURES).T, strict=True):
        by_softmax = nll(tempered(probs.double(), temperature), targets).to(dtype)
        torch.testing.assert_close(column, by_softmax, rtol=1e-5, atol=1e-6)


def test_the_nll_is_convex_in_the_inverse_temperature() -> None:
    """Of each target, and with a target of probability 0 too: The slopes between neighbours rise."""
    probs, targets = simulated(200, 10, 2.0, torch.float64)
    probs[0, targets[0]] = 0
    betas = torch.tensor([1 / t for t in reversed(TEMPERATURES)], dtype=torch.float64)
    values = nll_at(probs, targets, (1 / betas).tolist())
    slopes = values.diff(dim=-1) / betas.diff()
    assert (slopes.diff(dim=-1) > -1e-9).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_fit_is_never_worse_than_without(seed: int) -> None:
    """On few examples, with wrong distributions."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(4 * torch.rand(1, generator=generator) * torch.randn(8, 3, generator=generator), -1)
    targets = torch.randint(3, (8,), generator=generator)
    before, after = nll_at(probs, targets, [1, fitted(probs, targets)]).mean(0)
    assert after <= before


@pytest.mark.parametrize(
    ("probs", "targets"),
    [
        (torch.full((6, 4), 0.25), torch.arange(6) % 4),  # no temperature changes them
        (torch.eye(4), torch.arange(4)),
        (torch.eye(4), (torch.arange(4) + 1) % 4),
        (torch.full((6, 4), math.nan), torch.arange(6) % 4),
    ],
    ids=["uniform", "certain and right", "certain and wrong", "NaN"],
)
def test_it_is_1_if_no_other_temperature_is_better(probs: Tensor, targets: Tensor) -> None:
    assert fitted(probs, targets) == 1


def test_it_stays_in_the_range_of_the_grid() -> None:
    """All examples are right: the lower the temperature, the better. All are wrong: the higher, the better."""
    probs = torch.tensor([[0.6, 0.4]])
    assert fitted(probs, torch.tensor([0])) == 1 / 8
    assert fitted(probs, torch.tensor([1])) == 8


def test_the_second_pass_lies_between_the_neighbours_of_the_best() -> None:
    passes: list[list[float]] = []

    def mean_nll(temperatures: Sequence[float]) -> Tensor:
        passes.append(list(temperatures))
        return torch.tensor([abs(math.log(t / 2.05)) for t in temperatures])

    assert fit_temperature(mean_nll) == pytest.approx(2.05, rel=0.005)
    first, second = passes
    assert 1 in first
    assert 2**0.75 < min(second) < max(second) < 2**1.25


def test_targets_that_are_impossible_count_as_in_the_score() -> None:
    probs, targets = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert nll_at(probs, targets, [0.5, 1, 2]).tolist() == [pytest.approx([nll(probs, targets).item()] * 3)]


def test_a_vocabulary_of_fp32_has_no_nan_and_sums_to_1() -> None:
    """The logits of 50,304 tokens span more than fp32 can exponentiate: some probabilities are 0 or subnormal."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(25 * torch.randn(4, 50_304, generator=generator), -1)
    assert (probs == 0).any()
    for temperature in (1 / 8, 0.9, 8):
        q = tempered(probs, temperature)
        torch.testing.assert_close(q.double().sum(-1), torch.ones(4).double(), rtol=0, atol=1e-5)
        assert (q[probs == 0] == 0).all()
        assert q.argmax(-1).equal(probs.argmax(-1))
    assert nll_at(probs, torch.arange(4), TEMPERATURES).isfinite().all()


def test_parts_and_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, targets = simulated(40, 10, 1.5)
    whole, at_two = nll_at(probs, targets, TEMPERATURES), tempered(probs, 2)
    halves = [nll_at(p, t, TEMPERATURES) for p, t in zip(probs.split(20), targets.split(20), strict=True)]
    torch.testing.assert_close(sum(half.sum(0) for half in halves), whole.sum(0))
    monkeypatch.setattr(net, "LOGITS_AT_ONCE", 70)
    torch.testing.assert_close(nll_at(probs, targets, TEMPERATURES), whole)
    torch.testing.assert_close(tempered(probs, 2), at_two)
    assert nll_at(probs[:0], targets[:0], TEMPERATURES).shape == (0, len(TEMPERATURES))
