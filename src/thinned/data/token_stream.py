"""From documents to tokens: the tokenizer that is made for a text, and its tokens one after another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice

import numpy as np

from thinned.data.tokenizer import Tokenizer, bpe_size

PIECE = 2**16  # characters that are encoded as one; threads share the pieces out
GROUP = 2**20  # characters that are encoded at a time, for which a character tokenizer takes 300 MB
SEPARATOR = "\n\n"  # between documents, where the tokenizer has no token for it
LINE_BREAK = re.compile(r"(?<=\S)\r?\n(?=\S)")


def make_tokenizer(
    spec: str, splits: Mapping[str, Iterable[str]], training_part: float, max_tokens: int | None
) -> Tokenizer:
    """Returns the tokenizer for some text, which depends on nothing but what is kept of it.

    Args:
        spec: "char" or "bpe:<size>".
        splits: The documents.
        training_part: BPE is trained on so much of "train", by characters.
        max_tokens: The most tokens that are kept of a split, so the most characters to look at; None for all.
    """
    size = bpe_size(spec)
    if size:
        characters = int(training_part * count_characters(splits["train"], max_tokens))
        return Tokenizer.bpe(first_characters(splits["train"], characters), size)
    several = any(len(list(islice(filter(None, documents), 2))) > 1 for documents in splits.values())
    texts = [first_characters(documents, max_tokens) for documents in splits.values()]
    return Tokenizer.characters(chain([SEPARATOR] if several else [], *texts))


def count_characters(documents: Iterable[str], max_tokens: int | None) -> int:
    """Returns the number of characters; at most those that surely fit in so many tokens, of a byte or more each."""
    count = 0
    for document in documents:
        if max_tokens is None:
            count += len(document)
            continue
        content = document.encode()[:max_tokens]
        count += len(content.decode(errors="ignore"))
        max_tokens -= len(content) + 1  # and what separates it from the next
        if max_tokens <= 0:
            break
    return count


def first_characters(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """Yields documents up to so many characters, the last one cut off; None is no limit."""
    for document in documents:
        if limit is not None and limit <= len(document):
            yield document[:limit]
            return
        yield document
        limit = None if limit is None else limit - len(document)


def pieces(document: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Cuts a long document at line breaks, where both sides have the tokens that they have as one.

    A tokenizer such as GPT-2's has no token that reaches beyond a line break between two lines; others have, or begin
    every text with a space. So it is tried out at each cut, on the text around it.
    """
    start = 0
    while len(document) - start > PIECE:
        stop = start + PIECE
        if not tokenizer.by_character:
            tries = zip(range(4), LINE_BREAK.finditer(document, stop), strict=False)
            ends = (match.end() for _, match in tries)
            stop = next((end for end in ends if _separable(document, end, tokenizer)), 0)
            if not stop:
                break
        yield document[start:stop]
        start = stop
    yield document[start:]


def _separable(document: str, cut: int, tokenizer: Tokenizer) -> bool:
    left, right = document[max(cut - 256, 0) : cut], document[cut : cut + 256]
    whole, *parts = tokenizer.encode_documents([left + right, left, right])
    return whole == parts[0] + parts[1]


def _texts(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yields the pieces of all documents, and whether each ends its document."""
    for number, document in enumerate(filter(None, documents)):
        if number and tokenizer.end_of_text is None:
            yield SEPARATOR, False
        *parts, last = pieces(document, tokenizer)
        for part in parts:
            yield part, False
        yield last, True


def token_arrays(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the tokens of documents one after another, with what separates them; empty documents are left out."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    group: list[tuple[str, bool]] = []
    size = 0
    for item in chain(_texts(documents, tokenizer), [None]):
        if item:
            group.append(item)
            size += len(item[0])
        if group and (item is None or size >= GROUP):
            encoded = tokenizer.encode_documents([text for text, _ in group])
            for ids, (_, last) in zip(encoded, group, strict=True):
                yield np.array(ids + end if last else ids, np.int64)
            group, size = [], 0
