"""Documents to tokens: makes the tokenizer of a text, and yields its tokens in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice

import numpy as np

from thinned.data.tokenizer import Tokenizer, bpe_size

PIECE = 2**16  # characters that are encoded as one text; threads share the pieces
GROUP = 2**20  # characters that are encoded by one call
SEPARATOR = "\n\n"  # between documents, if the tokenizer has no token for it
LINE_BREAK = re.compile(r"(?<=\S)\r?\n(?=\S)")


def make_tokenizer(
    spec: str, splits: Mapping[str, Iterable[str]], training_part: float, max_tokens: int | None
) -> Tokenizer:
    """Returns a tokenizer for text. It depends only on the text that is kept.

    Args:
        spec: "char" or "bpe:<size>".
        splits: Documents of each split.
        training_part: Fraction of the characters of "train" on which BPE is trained.
        max_tokens: The most tokens kept of a split; None for all.
    """
    size = bpe_size(spec)
    if size:
        characters = int(training_part * count_characters(splits["train"], max_tokens))
        return Tokenizer.bpe(first_characters(splits["train"], characters), size)
    several = any(len(list(islice(filter(None, documents), 2))) > 1 for documents in splits.values())
    texts = [first_characters(documents, max_tokens) for documents in splits.values()]
    return Tokenizer.characters(chain([SEPARATOR] if several else [], *texts))


def count_characters(documents: Iterable[str], max_tokens: int | None) -> int:
    """Returns the number of characters, at most those sure to fit in `max_tokens` tokens of a byte or more each."""
    if max_tokens is None:
        return sum(map(len, documents))
    count = 0
    for document in documents:
        content = document.encode()[:max_tokens]
        count += len(content.decode(errors="ignore"))
        max_tokens -= len(content) + 1  # one for the end of the document
        if max_tokens <= 0:
            break
    return count


def first_characters(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """Yields documents up to a number of characters, the last one cut off; None is no limit."""
    for document in documents:
        if limit is not None and limit <= len(document):
            yield document[:limit]
            return
        yield document
        limit = None if limit is None else limit - len(document)


def pieces(document: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the pieces of a long document, cut only at line breaks where the cut does not change the tokens.

    GPT-2 has no token that spans a line break between two lines, but other tokenizers have, or begin every text with a
    space. So each cut is tried on the text around it.
    """
    start = 0
    while len(document) - start > PIECE:
        stop = start + PIECE
        if not tokenizer.by_character:
            ends = (match.end() for match in islice(LINE_BREAK.finditer(document, stop), 4))
            stop = next((end for end in ends if _separable(document, end, tokenizer)), 0)
            if not stop:
                break
        yield document[start:stop]
        start = stop
    yield document[start:]


def _separable(document: str, cut: int, tokenizer: Tokenizer) -> bool:
    left, right = document[max(cut - 256, 0) : cut], document[cut : cut + 256]
    whole, *parts = tokenizer.encode_documents([left + right, left, right])
    return np.array_equal(whole, np.concatenate(parts))


def _texts(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yields the pieces of all documents, and whether each ends its document."""
    for number, document in enumerate(filter(None, documents)):
        if number and tokenizer.end_of_text is None:
            yield SEPARATOR, False
        *parts, last = pieces(document, tokenizer)
        for part in parts:
            yield part, False
        yield last, True


def _groups(texts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Yields lists of texts, of about `GROUP` characters in all."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text[0])
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def token_arrays(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the tokens of all documents in order, each followed by what separates them; leaves out empty ones."""
    end = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int64)
    for group in _groups(_texts(documents, tokenizer)):
        encoded = tokenizer.encode_documents([text for text, _ in group])
        yield np.concatenate(
            [part for ids, (_, last) in zip(encoded, group, strict=True) for part in (ids, end[:last])]
        )
