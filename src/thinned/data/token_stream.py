"""Documents to tokens: makes the tokenizer of a text, and yields its tokens in order.

Each document comes with the name of its split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby, islice

import numpy as np

from thinned.data.order import Split
from thinned.data.tokenizer import Tokenizer, bpe_size

PIECE = 2**16  # characters that are encoded as one text; threads share the pieces
GROUP = 2**20  # characters that are encoded by one call
SEPARATOR = "\n\n"  # between documents, if the tokenizer has no token for it
LINE_BREAK = re.compile(r"(?<=\S)\r?\n(?=\S)")
Document = tuple[Split, str]


def make_tokenizer(
    spec: str, stored: Mapping[Split, Iterable[Document]], training_part: float, max_tokens: int | None
) -> Tokenizer:
    """Returns a tokenizer for text. It depends only on the text that is kept.

    Args:
        spec: "char" or "bpe:<size>".
        stored: Documents of each stored split.
        training_part: Fraction of the characters for training on which BPE is trained.
        max_tokens: The most tokens kept of a stored split; None for all.
    """
    size = bpe_size(spec)
    if size:

        def training() -> Iterator[Document]:
            return (each for each in sure_to_fit(stored["train"], max_tokens) if each[0] == "train")

        limit = None if training_part == 1 else int(training_part * sum(len(text) for _, text in training()))
        return Tokenizer.bpe((text for _, text in first_characters(training(), limit)), size)
    several = any(len(list(islice(filter(_has_text, documents), 2))) > 1 for documents in stored.values())
    texts = chain.from_iterable(first_characters(documents, max_tokens) for documents in stored.values())
    return Tokenizer.characters(chain([SEPARATOR] if several else [], (text for _, text in texts)))


def _has_text(document: Document) -> bool:
    return bool(document[1])


def sure_to_fit(documents: Iterable[Document], max_tokens: int | None) -> Iterator[Document]:
    """Yields documents up to what surely fits in `max_tokens` tokens of a byte or more each, the last one cut off."""
    for split, text in documents:
        if max_tokens is None:
            yield split, text
            continue
        content = text.encode()[:max_tokens]
        yield split, content.decode(errors="ignore")
        max_tokens -= len(content) + 1  # one for the end of the document
        if max_tokens <= 0:
            return


def first_characters(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    """Yields documents up to a number of characters, the last one cut off; None is no limit."""
    for split, text in documents:
        if limit is not None and limit <= len(text):
            yield split, text[:limit]
            return
        yield split, text
        limit = None if limit is None else limit - len(text)


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


def _texts(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Split, str, bool]]:
    """Yields split and text of the pieces of all documents, and whether each ends its document."""
    begun = set[Split]()
    for split, document in filter(_has_text, documents):
        if split in begun and tokenizer.end_of_text is None:
            yield split, SEPARATOR, False
        begun.add(split)
        *parts, last = pieces(document, tokenizer)
        for part in parts:
            yield split, part, False
        yield split, last, True


def _groups(texts: Iterator[tuple[Split, str, bool]]) -> Iterator[list[tuple[Split, str, bool]]]:
    """Yields lists of texts, of about `GROUP` characters in all."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text[1])
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def token_arrays(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Split, np.ndarray]]:
    """Yields splits and tokens of all documents in order, each followed by what separates them; no empty ones."""
    end = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int64)
    for group in _groups(_texts(documents, tokenizer)):
        encoded = tokenizer.encode_documents([text for _, text, _ in group])
        tokens = [(split, ids, end[:last]) for ids, (split, _, last) in zip(encoded, group, strict=True)]
        for split, run in groupby(tokens, key=lambda each: each[0]):
            yield split, np.concatenate([part for _, *parts in run for part in parts])
