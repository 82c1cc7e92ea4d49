"""Streaming statistics against hand-worked samples and against every mask of a small net."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from thinned.models.net import Logits
from thinned.uncertainty import MCPrediction, MCStatistics
from thinned.uncertainty.scores import entropy
from thinned.uncertainty.statistics import TokenStatistics, disagreement


def accumulate(samples: Tensor) -> MCStatistics:
    """Statistics of samples (S, B, K)."""
    statistics = MCStatistics()
    for probs in samples:
        statistics.update_all(probs[None])
    return statistics


def predict(samples: Tensor) -> MCPrediction:
    return accumulate(samples).compute()


def random_samples(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(S, 5, 3)."""
    generator = torch.Generator().manual_seed(0)
    return torch.softmax(2 * torch.randn(count, 5, 3, generator=generator, dtype=torch.float64), -1).to(dtype)


def assert_equal(actual: MCPrediction, expected: MCPrediction) -> None:
    assert actual.num_samples == expected.num_samples
    for name in ("mean", "variance", "predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_entropy_in_nats() -> None:
    probs = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]], dtype=torch.float64)
    assert entropy(probs).tolist() == pytest.approx([0, math.log(2), 1.5 * math.log(2)], abs=1e-15)


@pytest.mark.parametrize("sizes", [[7], [1, 6], [4, 3], [2, 3, 2]])
def test_samples_may_come_several_at_a_time(sizes: list[int]) -> None:
    samples, statistics = random_samples(7), MCStatistics()
    for part in samples.split(sizes):
        statistics.update_all(part)
    assert_equal(statistics.compute(), predict(samples))
    torch.testing.assert_close(statistics.compute().variance, samples.var(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 7, [7], [1, 6], [2, 3, 2]])
def test_nll_of_the_first_samples(sizes: list[int]) -> None:
    """Whatever parts the samples come in: of 1, 2 and 4 of seven."""
    samples, target = random_samples(7), torch.tensor([0, 1, 2, 1, 0])
    statistics = MCStatistics(target)
    for part in samples.split(sizes):
        statistics.update_all(part)
    assert list(statistics.nll_at) == [1, 2, 4]
    for s, nll in statistics.nll_at.items():
        own = samples[:s].mean(0)[torch.arange(5), target]
        torch.testing.assert_close(nll, -own.log(), rtol=1e-12, atol=1e-12)
    assert not accumulate(samples).nll_at  # without targets


def test_three_samples_by_hand() -> None:
    prediction = predict(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]], [[0.0, 1.0]]], dtype=torch.float64))
    assert prediction.mean.tolist() == [[0.5, 0.5]]
    assert prediction.variance.tolist() == [[0.25, 0.25]]  # (1/4 + 0 + 1/4) / 2
    assert prediction.predictive_entropy.item() == pytest.approx(math.log(2))
    assert prediction.expected_entropy.item() == pytest.approx(math.log(2) / 3)
    assert prediction.mutual_information.item() == pytest.approx(2 / 3 * math.log(2))
    assert prediction.variation_ratio.item() == pytest.approx(1 / 3)  # the tie votes for the first class
    assert prediction.num_samples == 3


def test_mean_of_the_samples_so_far() -> None:
    samples = random_samples(3)
    for count in (1, 2, 3):  # a single sample has a mean, though no spread
        torch.testing.assert_close(accumulate(samples[:count]).mean, samples[:count].mean(0), rtol=1e-12, atol=1e-12)


def test_all_masks_of_a_net_give_the_closed_forms() -> None:
    """2^6 equally likely masks of a net 2-4-3 with p = 0.5 on inputs and hidden units, written out in numpy."""
    generator = np.random.default_rng(0)
    w1, b1, w2, b2 = (generator.normal(size=shape) for shape in ((4, 2), 4, (3, 4), 3))
    x = generator.normal(size=(5, 2))
    probs = []
    for mask in product([0.0, 2.0], repeat=6):
        hidden = np.maximum(x * mask[:2] @ w1.T + b1, 0) * mask[2:]
        odds = np.exp(hidden @ w2.T + b2)
        probs.append(odds / odds.sum(-1, keepdims=True))
    p = np.stack(probs)  # (64, 5, 3)
    prediction = predict(torch.from_numpy(p))

    mean = p.mean(0)
    votes = np.eye(3)[p.argmax(-1)].mean(0)
    expected = {
        "mean": mean,
        "variance": p.var(0, ddof=1),
        "predictive_entropy": -(mean * np.log(mean)).sum(-1),
        "expected_entropy": -(p * np.log(p)).sum(-1).mean(0),
        "mutual_information": (p * np.log(p / mean)).sum(-1).mean(0),  # mean Kullback-Leibler divergence
        "variation_ratio": 1 - votes.max(-1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(prediction, name).numpy(), value, rtol=1e-12, atol=1e-12, err_msg=name)
    assert prediction.variation_ratio.max() > 0.1
    assert prediction.mutual_information.max() > 0.1


def test_order_of_samples_does_not_matter() -> None:
    samples = random_samples(4)
    for order in permutations(range(4)):
        assert_equal(predict(samples[list(order)]), predict(samples))


def test_mutual_information_lies_between_0_and_log_samples() -> None:
    assert disagreement(torch.tensor([1.0]), torch.tensor([1.0 + 1e-6])).item() == 0  # rounding may fall below
    distinct = torch.eye(4, dtype=torch.float64)[:, None]
    assert predict(distinct).mutual_information.item() == pytest.approx(math.log(4), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_accumulated_in_single(dtype: torch.dtype) -> None:
    samples = random_samples(300, dtype)
    prediction = predict(samples)
    assert prediction.mean.dtype == prediction.variance.dtype == prediction.mutual_information.dtype == torch.float32
    expected = predict(samples.double())
    torch.testing.assert_close(prediction.mean.double(), expected.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(prediction.variance.double(), expected.variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(prediction.expected_entropy.double(), expected.expected_entropy, rtol=1e-5, atol=0)


def test_small_variance_survives_in_single_precision() -> None:
    """Where E[p^2] - E[p]^2 would return rounding errors of 6e-8, or a negative number."""
    step = 2.0**-20
    samples = torch.tensor([[[0.5 + i * step, 0.5 - i * step]] for i in (-1, 0, 1)] * 100)
    torch.testing.assert_close(predict(samples).variance, torch.full((1, 2), step**2 * 200 / 299), rtol=1e-2, atol=0)


def test_memory_does_not_grow_with_samples() -> None:
    """But for the NLL of the first 1, 2, 4, ..., 128, which is a number an example."""

    def numbers(count: int, target: Tensor | None = None) -> int:
        statistics = MCStatistics(target)
        statistics.update_all(random_samples(count))
        held = [value for value in vars(statistics).values() if isinstance(value, Tensor) and value is not target]
        return sum(value.untyped_storage().nbytes() // 8 for value in (*held, *statistics.nll_at.values()))

    assert numbers(2) == numbers(200) == 3 * 5 * 3 + 2 * 5
    assert numbers(200, torch.zeros(5, dtype=torch.int64)) == numbers(200) + 8 * 5


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_have_no_spread(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples to be at least 2, but got {count}"):
        predict(random_samples(count))


@pytest.mark.parametrize("classes", [10, 1000])
def test_equal_samples_do_not_disagree(classes: int) -> None:
    """Not by rounding either, or scores of mutual information would rank noise."""
    probs = torch.randn(200, classes, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    of_examples = MCStatistics()
    of_tokens = TokenStatistics(torch.zeros(200, dtype=torch.int64), torch.zeros(200, dtype=torch.int64), 1)
    for _ in range(50):
        of_examples.update_all(probs[None])
        of_tokens.update(Logits(probs.log()))
    assert (of_examples.compute().mutual_information == 0).all()
    assert (of_tokens.columns()["mutual_information"] == 0).all()
