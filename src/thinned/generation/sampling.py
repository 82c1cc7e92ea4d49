"""Text from one or several networks, and how sure they were of each token.

With several, the next-token distribution is the mean of theirs, and each keeps its own keys and values: what a
thinned network said before stays what it attends to.

Shapes: B continuations, T tokens, S networks, V vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor

from thinned.models.dropout import derive_seed, sites_in
from thinned.models.gpt import GPT, KVCache
from thinned.uncertainty.statistics import entropy


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: the k most probable tokens alone are left.
        top_p: the most probable tokens alone are left, as few as have this probability together (Holtzman et al. 2020).

    Raises:
        ValueError: a setting outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", self.temperature >= 0, "to be 0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "to be at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not valid:
                raise ValueError(f"Expected {name} {expected}, but got {getattr(self, name)}")

    def draw(self, probs: Tensor, generator: Generator | None) -> Tensor:
        """One token for each distribution (B, V): (B,)."""
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
    """New tokens after a prompt, with the entropy of each one's distribution and the networks' mutual information."""

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
    cached: bool = True,
) -> list[Continuation]:
    """Continues each prompt, token by token.

    Where the context is full, the networks go on with its last half; a longer prompt is cropped to the context. Both
    are said once, by a warning.

    Args:
        nets: the S networks, without active dropout.
        prompt: (B, T) int64, at least one token.
        max_new_tokens: at most so many new tokens each.
        sampling: how a token is drawn; entropies are those of the distribution before that.
        generator: the source of randomness; the global one when None.
        finished: told the new tokens of a continuation, says whether it ends with them.
        cached: whether keys and values are kept; without, each token costs a pass over the whole context.

    Returns:
        The B continuations.
    """
    if prompt.shape[1] == 0:
        raise ValueError("Expected a prompt of at least one token, but got none")
    context_length = nets[0].context_length
    if prompt.shape[1] + max_new_tokens - 1 > context_length:
        warnings.warn(
            f"The text is longer than the context of {context_length} tokens: what is before is cropped.", stacklevel=2
        )
    text, new = prompt[:, -context_length:], prompt[:, -context_length:]
    caches = [KVCache() for _ in nets]
    continuations = [Continuation() for _ in prompt]
    running = [True] * len(prompt)
    for _ in range(max_new_tokens):
        if not cached or caches[0].length + new.shape[1] > context_length:
            if text.shape[1] > context_length:
                text = text[:, -(context_length // 2 or 1) :]
            caches, new = [KVCache() for _ in nets], text
        mean, expected = torch.zeros(()), torch.zeros(())
        for net, cache in zip(nets, caches, strict=True):
            probs = torch.softmax(net(new, cache=cache)[:, -1].float(), dim=-1)  # (B, V)
            mean, expected = mean + probs / len(nets), expected + entropy(probs) / len(nets)
        predictive = entropy(mean)
        information = (predictive - expected).clamp_min(0) if len(nets) > 1 else torch.zeros_like(predictive)
        token = sampling.draw(mean, generator)
        for i, continuation in enumerate(continuations):
            if running[i]:
                continuation.tokens.append(int(token[i]))
                continuation.entropy.append(float(predictive[i]))
                continuation.mutual_information.append(float(information[i]))
                running[i] = not finished(continuation.tokens)
        if not any(running):
            break
        new = token[:, None]
        text = torch.cat([text, new], dim=1)
    return continuations


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]: ...


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation, in pieces of text with the uncertainty of each."""

    prompt: str
    pieces: list[str]
    entropy: list[float]
    mutual_information: list[float]
    text: str  # of the continuation


def sample_texts(
    net: GPT,
    tokenizer: TextTokenizer,
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
    """Several continuations of a prompt.

    By default each comes from a thinned network of its own: continuation i from `net.thin(seed, i)`.

    Args:
        net: in evaluation mode.
        tokenizer: of the net.
        prompt: at least one token of text.
        num_samples: how many continuations.
        ensemble: S, at least 2: every continuation comes from the mean of S thinned networks instead.
        deterministic: every continuation comes from the network without dropout instead.
        max_new_tokens: of each continuation.
        sampling: how tokens are drawn.
        stop: text with which a continuation ends.
        seed: of networks and tokens.

    Raises:
        ValueError: a prompt that the tokenizer does not know, or an ensemble of a net in which nothing drops.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("max_new_tokens", max_new_tokens, 1)):
        if value < least:
            raise ValueError(f"Expected {name} to be at least {least}, but got {value}")
    if ensemble is not None and (ensemble < 2 or deterministic or not sites_in(net)):
        raise ValueError(
            f"Expected an ensemble of at least 2 thinned networks of a net with dropout rates above 0, and not "
            f"deterministic, but got ensemble={ensemble}, deterministic={deterministic}, dropout at {sites_in(net)}"
        )
    device = next(net.parameters()).device
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device=device)
    tail = 4 * len(stop or "") + 8  # tokens that surely hold the stop text, whatever their bytes

    def finished(tokens: list[int]) -> bool:
        return stop is not None and stop in tokenizer.decode(tokens[-tail:])

    def run(nets: Sequence[GPT], count: int, index: int) -> list[Continuation]:
        generator = Generator(device).manual_seed(derive_seed(seed, "tokens", index))
        return generate(nets, ids.expand(count, -1), max_new_tokens, sampling, generator, finished)

    if ensemble is not None:
        continuations = run([net.thin(seed, s) for s in range(ensemble)], num_samples, 0)
    elif deterministic or not sites_in(net):
        continuations = run([net], num_samples, 0)
    else:
        continuations = [c for i in range(num_samples) for c in run([net.thin(seed, i)], 1, i)]
    return [
        Sample(prompt, tokenizer.pieces(c.tokens), c.entropy, c.mutual_information, tokenizer.decode(c.tokens))
        for c in continuations
    ]
