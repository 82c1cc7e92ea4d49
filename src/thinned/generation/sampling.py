"""Generates text with one or several networks, and says how sure they were of each token.

With several networks, the next token is drawn from their mean distribution; each keeps its own KV cache.

Shapes: B continuations, T tokens, S networks, V vocabulary.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from thinned.data.tokenizer import END_OF_TEXT, Tokenizer
from thinned.models.dropout import derive_seed, sites_in
from thinned.models.gpt import GPT, KVCache
from thinned.uncertainty.scores import entropy
from thinned.uncertainty.statistics import disagreement


@dataclass(frozen=True)
class Sampling:
    """Draws the next token; ValueError for a setting outside its range.

    Args:
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Only the k most probable tokens are drawn.
        top_p: Only the fewest most probable tokens with this joint probability are drawn (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"Expected temperature to be 0 or more, but got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Expected top_k to be at least 1, but got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Expected top_p in (0, 1], but got {self.top_p}")

    def draw(self, probs: Tensor, generator: Generator | None) -> Tensor:
        """Draws one token (B,) from each distribution (B, V)."""
        if self.temperature == 0:
            return probs.argmax(-1)
        probs = torch.softmax(probs.log() / self.temperature, dim=-1)
        if self.top_k is not None and self.top_k < probs.shape[-1]:
            probs = probs.masked_fill(probs < probs.topk(self.top_k).values[:, -1:], 0)
            probs = probs / probs.sum(-1, keepdim=True)
        if self.top_p is not None:
            ordered, order = probs.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0))
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


@dataclass(frozen=True)
class Continuation:
    """Holds new tokens after a prompt, with the entropy of each one's distribution and the mutual information."""

    tokens: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)  # nats
    mutual_information: list[float] = field(default_factory=list)  # nats; 0 for a single network


@torch.inference_mode()
def generate(
    nets: Sequence[GPT],
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: Generator | None = None,
    finished: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[Continuation]:
    """Continues each prompt (B, T), token by token, with the mean of S networks whose dropout does not act.

    A prompt longer than the context is cropped to its end. A full context is cropped to its last half. Both warn once.
    Entropies are those of the distribution before `sampling` changes it. A continuation ends when `finished` returns
    True for its new tokens.
    """
    context_length = nets[0].context_length
    if prompt.shape[1] + max_new_tokens - 1 > context_length:
        warnings.warn(f"The text exceeds the context of {context_length} tokens: its start is cropped.", stacklevel=2)
    text = new = prompt[:, -context_length:]
    caches = [KVCache() for _ in nets]
    continuations = [Continuation() for _ in prompt]
    running = [*enumerate(continuations)]
    for _ in range(max_new_tokens):
        if caches[0].length + new.shape[1] > context_length:
            text = text[:, -(context_length // 2 or 1) :]
            caches, new = [KVCache() for _ in nets], text
        mean, expected = torch.zeros(()), torch.zeros(())
        for net, cache in zip(nets, caches, strict=True):
            probs = torch.softmax(net(new, cache=cache)[:, -1].float(), dim=-1)  # (B, V)
            mean, expected = mean + probs / len(nets), expected + entropy(probs) / len(nets)
        predictive = entropy(mean)
        information = disagreement(predictive, expected)
        token = sampling.draw(mean, generator)  # (B,)
        for i, continuation in running:
            continuation.tokens.append(int(token[i]))
            continuation.entropy.append(float(predictive[i]))
            continuation.mutual_information.append(float(information[i]))
        running = [(i, continuation) for i, continuation in running if not finished(continuation.tokens)]
        if not running:
            break
        new = token[:, None]
        text = torch.cat([text, new], dim=1)
    return continuations


@dataclass(frozen=True)
class Sample:
    """Holds a prompt and its continuation as pieces of text, with the uncertainty of each in nats."""

    prompt: str
    pieces: list[str]
    entropy: list[float]
    mutual_information: list[float]
    text: str  # of the continuation


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the tokens of a prompt. `<|endoftext|>`, or an empty prompt, begins a document.

    The tokenizer's own name for the end of text works too. Without such a token, the prompt is plain text.

    Raises:
        ValueError: The tokenizer does not know the text, or the prompt is empty and there is no end of text.
    """
    end = tokenizer.end_of_text
    if end is None:
        if not prompt:
            raise ValueError("Expected a prompt of at least one token, as nothing begins a document, but got none")
        return tokenizer.encode(prompt)
    first, *parts = re.split("|".join(map(re.escape, {END_OF_TEXT, *tokenizer.pieces([end])})), prompt or END_OF_TEXT)
    return tokenizer.encode(first) + [token for part in parts for token in (end, *tokenizer.encode(part))]


def sample_texts(
    net: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_samples: int = 1,
    ensemble: int | None = None,
    deterministic: bool = False,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    stop: str | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Continues a prompt several times.

    By default, continuation i comes from `net.thin(seed, i)`; with an `ensemble` of S, at least 2, each comes from the
    mean of S thinned networks; with `deterministic`, from the network without dropout. It ends with the text `stop`.

    Raises:
        ValueError: The tokenizer does not know the prompt, or nothing drops in the net of an ensemble.
    """
    if min(num_samples, max_new_tokens) < 1:
        got = f"{num_samples} and {max_new_tokens}"
        raise ValueError(f"Expected num_samples and max_new_tokens to be at least 1, but got {got}")
    sites = sites_in(net)
    if ensemble is not None and (ensemble < 2 or deterministic or not sites):
        got = f"ensemble={ensemble}, deterministic={deterministic}, dropout at {sites}"
        raise ValueError(f"Expected an ensemble of at least 2 thinned networks, of a net that drops, but got {got}")
    device = next(net.parameters()).device
    ids = torch.tensor([prompt_tokens(tokenizer, prompt)], dtype=torch.int64, device=device)
    tail = 4 * len(stop or "") + 8  # tokens that surely hold the stop text, whatever their bytes

    def finished(tokens: list[int]) -> bool:
        return stop is not None and stop in tokenizer.decode(tokens[-tail:])

    def run(nets: Sequence[GPT], count: int, index: int) -> list[Continuation]:
        generator = Generator(device).manual_seed(derive_seed(seed, "tokens", index))
        return generate(nets, ids.expand(count, -1), max_new_tokens, sampling, generator, finished)

    if ensemble is not None:
        continuations = run([net.thin(seed, s) for s in range(ensemble)], num_samples, 0)
    elif deterministic or not sites:
        continuations = run([net], num_samples, 0)
    else:
        continuations = [c for i in range(num_samples) for c in run([net.thin(seed, i)], 1, i)]
    return [
        Sample(prompt, tokenizer.pieces(c.tokens), c.entropy, c.mutual_information, tokenizer.decode(c.tokens))
        for c in continuations
    ]
