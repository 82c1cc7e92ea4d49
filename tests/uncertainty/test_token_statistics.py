"""Streaming statistics of tokens and sequences against hand-worked samples."""

import math

import pytest
import torch
from torch import Tensor

from thinned.models import net
from thinned.models.net import Logits
from thinned.uncertainty.statistics import TokenStatistics

V = 11
P = [[[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]], [[0.1, 0.9], [0.4, 0.6], [0.3, 0.7]]]  # (S, N, V)


def accumulate(probs: list[list[list[float]]]) -> TokenStatistics:
    """Statistics of distributions (S, N, V): two tokens of the first of two sequences and one of the second."""
    statistics = TokenStatistics(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
    for of_sample in probs:
        statistics.update(Logits(torch.tensor(of_sample).log() + 5))  # logits are not normalised
    return statistics


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def assert_columns(got: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        assert got[name].tolist() == pytest.approx(column, abs=1e-6), name


@pytest.mark.parametrize("logits_at_once", [1, 4, 10**6])
def test_two_samples_by_hand(logits_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means (0.3, 0.7), (0.6, 0.4) and (0.2, 0.8), of a row, two rows or all rows at once."""
    monkeypatch.setattr(net, "LOGITS_AT_ONCE", logits_at_once)
    statistics = accumulate(P)
    tokens = statistics.columns()
    nll_at = tokens.pop("nll_at")
    predictive = [entropy(0.3), entropy(0.6), entropy(0.2)]
    expected = [(entropy(p) + entropy(q)) / 2 for p, q in ((0.5, 0.1), (0.8, 0.4), (0.1, 0.3))]
    information = [total - part for total, part in zip(predictive, expected, strict=True)]
    assert_columns(
        tokens,
        {
            "prediction": [1, 0, 1],
            "confidence": [0.7, 0.6, 0.8],
            "nll": [-math.log(0.3), -math.log(0.4), -math.log(0.8)],
            "correct": [False, False, True],
            "rank": [2, 2, 1],
            "predictive_entropy": predictive,
            "expected_entropy": expected,
            "mutual_information": information,
        },
    )
    assert nll_at.ravel().tolist() == pytest.approx([-math.log(p) for p in (0.5, 0.3, 0.2, 0.4, 0.9, 0.8)])  # (N, 2)
    assert_columns(
        statistics.sequences(tokens),
        {
            "log_likelihood": [math.log(0.3 * 0.4), math.log(0.8)],
            "mean_log_likelihood": [math.log(0.5 * 0.2 * 0.1 * 0.6) / 2, math.log(0.9 * 0.7) / 2],
            "joint_log_likelihood": [math.log((0.5 * 0.2 + 0.1 * 0.6) / 2), math.log((0.9 + 0.7) / 2)],
            "mutual_information": [information[0] + information[1], information[2]],
            "mutual_information_per_token": [(information[0] + information[1]) / 2, information[2]],
        },
    )


def test_one_sample_has_no_spread() -> None:
    statistics = accumulate(P[:1])
    tokens = statistics.columns()
    assert_columns(
        tokens,
        {
            "prediction": [0, 0, 1],
            "confidence": [0.5, 0.8, 0.9],
            "nll": [-math.log(0.5), -math.log(0.2), -math.log(0.9)],
            "correct": [True, False, True],
            "rank": [1, 2, 1],  # a tie of the two does not make the target the second
            "predictive_entropy": [entropy(0.5), entropy(0.8), entropy(0.9)],
        },
    )
    assert_columns(statistics.sequences(tokens), {"log_likelihood": [math.log(0.5 * 0.2), math.log(0.9)]})


def test_classes_that_are_impossible_add_no_entropy() -> None:
    """0 log 0 = 0, where the log-probability is minus infinity."""
    statistics = TokenStatistics(torch.tensor([1]), torch.tensor([0]), 1)
    for _ in range(2):
        statistics.update(Logits(torch.tensor([[0.0, 0.0, -math.inf]])))
    tokens = statistics.columns()
    assert tokens["expected_entropy"].item() == pytest.approx(math.log(2))
    assert tokens["mutual_information"].item() == pytest.approx(0, abs=1e-6)


def test_likelihoods_too_small_for_a_probability() -> None:
    """A sequence of e^-400 and e^-300, whose probabilities single precision cannot hold."""
    statistics = TokenStatistics(torch.zeros(10, dtype=torch.int64), torch.zeros(10, dtype=torch.int64), 1)
    for log_prob in (-40.0, -30.0):
        statistics.update(Logits(torch.tensor([[log_prob, 0.0]]).expand(10, 2)))
    sequences = statistics.sequences(statistics.columns())
    assert sequences["mean_log_likelihood"].item() == pytest.approx(-350)
    assert sequences["joint_log_likelihood"].item() == pytest.approx(-300 - math.log(2))
    assert sequences["log_likelihood"].item() == pytest.approx(10 * (math.log1p(math.exp(-10)) - 30 - math.log(2)))


def test_statistics_hold_the_same_after_any_number_of_samples() -> None:
    statistics, sizes = TokenStatistics(torch.randint(V, (5,)), torch.tensor([0, 0, 1, 1, 1]), 2), {}
    for count in range(1, 21):
        statistics.update(Logits(torch.randn(5, V)))
        assert list(statistics.nll_at) == [s for s in (1, 2, 4, 8, 16) if s <= count]
        state = [value for value in vars(statistics).values() if not isinstance(value, int | tuple | dict)]
        assert all(isinstance(value, Tensor) for value in state)
        sizes[count] = sorted(value.untyped_storage().nbytes() for value in state)
    assert sizes[2] == sizes[20]
    assert statistics.num_samples == 20
