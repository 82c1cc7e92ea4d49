"""Generation: which networks speak, what each token's uncertainty is, and how tokens are drawn."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Generator

from thinned.generation.sampling import Sampling, generate, prompt_tokens, sample_texts
from thinned.models import GPT, DropoutRates
from thinned.uncertainty.statistics import MCStatistics

RATES = DropoutRates(embedding=0.2, attention=0.2, residual=0.2, mlp=0.2)


class Letters:
    """A tokenizer of the letters a to z, without an end of text."""

    end_of_text: int | None = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [chr(ord("a") + index) for index in ids]


def net(context_length: int = 16, dropout: DropoutRates = RATES) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(26, context_length, num_layers=2, num_heads=2, width=16, dropout=dropout).eval()
    for parameter in gpt.parameters():  # far from uniform predictions
        torch.nn.init.normal_(parameter, std=0.5)
    return gpt


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("num_nets", [1, 3])
def test_uncertainty_of_each_token_is_that_of_the_mean_prediction(num_nets: int) -> None:
    gpt, prompt = net(), torch.tensor([[3, 1, 4], [1, 5, 9]])
    nets = [gpt.thin(0, s) for s in range(num_nets)]
    continuations = generate(nets, prompt, 8, generator=rng())
    text = torch.cat([prompt, torch.tensor([c.tokens for c in continuations])], dim=1)
    for t in range(8):
        statistics = MCStatistics()
        for thinned in [*nets, *nets]:  # twice the same samples: the same mean, and a spread for a single network
            statistics.update_all(torch.softmax(thinned(text[:, : 3 + t])[None, :, -1], -1))
        expected = statistics.compute()
        for name in ("predictive_entropy", "mutual_information"):
            got = torch.tensor([getattr(c, name.removeprefix("predictive_"))[t] for c in continuations])
            torch.testing.assert_close(got, getattr(expected, name), atol=2e-6, rtol=1e-5)
    assert (num_nets == 1) == all(value == 0 for c in continuations for value in c.mutual_information)


def test_each_network_attends_to_what_it_computed_itself() -> None:
    """With one cache for all, the second network would see the keys of the first."""
    gpt, prompt = net(), torch.tensor([[7, 8]])
    both = [gpt.thin(0, 0), gpt.thin(0, 1)]
    first = generate(both, prompt, 10, Sampling(0.0))[0]
    swapped = generate(both[::-1], prompt, 10, Sampling(0.0))[0]
    assert first.tokens == swapped.tokens
    assert first.mutual_information == pytest.approx(swapped.mutual_information, abs=1e-6)


def test_greedy_takes_the_most_probable_token() -> None:
    gpt, text = net(), torch.tensor([[2, 3]])
    (continuation,) = generate([gpt], text, 10, Sampling(temperature=0))
    for token in continuation.tokens:
        assert token == gpt(text)[0, -1].argmax()
        text = torch.cat([text, torch.tensor([[token]])], dim=1)


def test_full_context_goes_on_with_its_last_half_and_says_so_once() -> None:
    gpt, text = net(context_length=8), torch.tensor([[0, 1, 2]])
    with pytest.warns(UserWarning, match="context of 8 tokens") as record:
        (continuation,) = generate([gpt], text, 12, Sampling(temperature=0))
    assert len(record) == 1
    start = 0
    for token in continuation.tokens:
        if text.shape[1] - start > 8:
            start = text.shape[1] - 4
        assert token == gpt(text[:, start:])[0, -1].argmax()
        text = torch.cat([text, torch.tensor([[token]])], dim=1)


def test_prompt_longer_than_the_context_is_cropped() -> None:
    gpt, prompt = net(context_length=8), torch.arange(20)[None]
    with pytest.warns(UserWarning, match="cropped"):
        (continuation,) = generate([gpt], prompt, 1, Sampling(temperature=0))
    assert continuation.tokens == [int(gpt(prompt[:, -8:])[0, -1].argmax())]


def test_text_that_fits_the_context_is_not_cropped() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate([net(context_length=8)], torch.zeros(1, 1, dtype=torch.int64), 8)


PROBS = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.05), [0, 1, 0, 0]),
        (Sampling(top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=0.5, top_k=3, top_p=0.85), [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling, expected: list[float]) -> None:
    """20,000 draws: a share is off by 5 standard deviations with probability below 1e-6, one of 32 below 3e-5."""
    drawn = torch.bincount(sampling.draw(PROBS.expand(20_000, -1), rng()), minlength=4) / 20_000
    for got, p in zip(drawn.tolist(), expected, strict=True):
        assert abs(got - p) <= 5 * math.sqrt(p * (1 - p) / 20_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {message}"):
        Sampling(**options)


def test_each_continuation_comes_from_a_thinned_network_of_its_own() -> None:
    gpt = net()
    samples = sample_texts(gpt, Letters(), "ab", num_samples=3, max_new_tokens=10, sampling=Sampling(0.0), seed=5)
    for i, sample in enumerate(samples):
        (alone,) = generate([gpt.thin(5, i)], torch.tensor([[0, 1]]), 10, Sampling(0.0))
        assert sample.text == Letters().decode(alone.tokens)
    assert len({sample.text for sample in samples}) > 1


def test_ensemble_is_the_mean_of_its_networks() -> None:
    gpt = net()
    (sample,) = sample_texts(gpt, Letters(), "ab", ensemble=4, max_new_tokens=10, sampling=Sampling(0.0), seed=5)
    nets = [gpt.thin(5, s) for s in range(4)]
    (alone,) = generate(nets, torch.tensor([[0, 1]]), 10, Sampling(0.0))
    assert (sample.text, sample.mutual_information) == (Letters().decode(alone.tokens), alone.mutual_information)


def test_deterministic_is_the_network_without_dropout() -> None:
    gpt = net()
    (sample,) = sample_texts(gpt, Letters(), "ab", deterministic=True, max_new_tokens=10, sampling=Sampling(0.0))
    assert sample.text == Letters().decode(generate([gpt], torch.tensor([[0, 1]]), 10, Sampling(0.0))[0].tokens)


@pytest.mark.parametrize("options", [{}, {"ensemble": 3}, {"deterministic": True}])
def test_seed_decides(options: dict[str, Any]) -> None:
    gpt = net()
    same, again, other = (
        [s.text for s in sample_texts(gpt, Letters(), "ab", num_samples=2, max_new_tokens=14, seed=seed, **options)]
        for seed in (1, 1, 2)
    )
    assert same == again != other
    assert same[0] != same[1]


def test_stop_text_ends_a_continuation() -> None:
    gpt = net()
    full = sample_texts(gpt, Letters(), "ab", num_samples=2, deterministic=True, max_new_tokens=14)
    stop = full[0].text[4:6]
    stopped = sample_texts(gpt, Letters(), "ab", num_samples=2, deterministic=True, max_new_tokens=14, stop=stop)
    assert stopped[0].text == full[0].text[: full[0].text.index(stop) + 2]
    assert len(stopped[0].entropy) == len(stopped[0].pieces) == len(stopped[0].text)
    if stop not in full[1].text:  # the other one goes on
        assert stopped[1].text == full[1].text


@pytest.mark.parametrize(
    ("dropout", "options"),
    [(RATES, {"ensemble": 1}), (RATES, {"ensemble": 2, "deterministic": True}), (DropoutRates(), {"ensemble": 2})],
)
def test_ensemble_needs_networks_that_differ(dropout: DropoutRates, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected an ensemble of at least 2"):
        sample_texts(net(dropout=dropout), Letters(), "ab", **options)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"max_new_tokens": 0}])
def test_counts_are_positive(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Expected num_samples and max_new_tokens to be at least 1"):
        sample_texts(net(), Letters(), "ab", **options)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt of at least one token"):
        sample_texts(net(), Letters(), "")


class Documents(Letters):
    """Its documents end with z, which is no text then."""

    end_of_text = 25

    def encode(self, text: str) -> list[int]:
        assert "z" not in text
        return super().encode(text)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("", [25]),
        ("<|endoftext|>", [25]),
        ("<|endoftext|>ab", [25, 0, 1]),
        ("ab<|endoftext|>", [0, 1, 25]),
        ("a<|endoftext|><|endoftext|>b", [0, 25, 25, 1]),
        ("azb", [0, 25, 1]),
        ("ab", [0, 1]),
    ],
)
def test_end_of_text_and_an_empty_prompt_begin_a_document(prompt: str, tokens: list[int]) -> None:
    assert prompt_tokens(Documents(), prompt) == tokens


def test_name_of_an_end_that_there_is_not_is_text() -> None:
    assert prompt_tokens(Letters(), "<") == [ord("<") - ord("a")]
