"""Turns documents into tokens: makes the tokenizer of a text, and yields its tokens in order.

Each document comes with the name of its split. Long ones are tokenised in pieces, so that memory does not grow.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from thinned.data.order import Split
from thinned.data.tokenizer import Tokenizer, bpe_size

PIECE = 2**15  # characters that are encoded as one text
GROUP = 64  # pieces that are encoded by one call; threads share them
SEPARATOR = "\n\n"  # between documents, if the tokenizer has no token for it
GAP = re.compile(r"(?<=\S)(?=[ \t\r\n])")  # the start of white space
Document = tuple[Split, str]
Sized = TypeVar("Sized", str, np.ndarray)


def make_tokenizer(
    spec: str, stored: Mapping[Split, Iterable[Document]], training_part: float, max_tokens: int | None
) -> Tokenizer:
    """Returns a tokenizer for text, "char" or "bpe:<size>". It depends only on the text that is kept.

    BPE is trained on the fraction `training_part` of the characters for training. Only `max_tokens` tokens of a stored
    split are kept; None keeps all.
    """
    if size := bpe_size(spec):

        def training() -> Iterator[Document]:
            return in_pieces(each for each in sure_to_fit(stored["train"], max_tokens) if each[0] == "train")

        limit = None if training_part == 1 else int(training_part * sum(len(text) for _, text in training()))
        return Tokenizer.bpe((text for _, text in first(training(), limit)), size)
    with_text = ((text for _, text in documents if text) for documents in stored.values())
    several = any(len(list(islice(documents, 2))) > 1 for documents in with_text)
    texts = chain.from_iterable(first(in_pieces(documents), max_tokens) for documents in stored.values())
    return Tokenizer.characters(chain([SEPARATOR] if several else [], (text for _, text in texts)))


def sure_to_fit(documents: Iterable[Document], max_tokens: int | None) -> Iterator[Document]:
    """Yields documents while their bytes fit in `max_tokens` tokens of a byte or more each; cuts the last one."""
    for split, text in documents:
        if max_tokens is None:
            yield split, text
            continue
        content = text[:max_tokens].encode()[:max_tokens]
        yield split, content.decode(errors="ignore")
        max_tokens -= len(content) + 1  # one for the end of the document
        if max_tokens <= 0:
            return


def first(parts: Iterable[tuple[Split, Sized]], limit: int | None) -> Iterator[tuple[Split, Sized]]:
    """Yields texts up to a number of characters, or arrays up to a number of tokens; cuts the last one.

    >>> list(first([("train", "ab"), ("val", "cd"), ("train", "ef")], 3))
    [('train', 'ab'), ('val', 'c')]
    """
    for split, part in parts:
        yield split, part[:limit]
        if limit is not None and (limit := limit - len(part)) <= 0:
            return


def in_pieces(documents: Iterable[Document], tokenizer: Tokenizer | None = None) -> Iterator[Document]:
    """Yields long documents in pieces, cut only where the cut does not change their tokens.

    No token of GPT-2 spans the start of white space, but other tokenizers have such tokens, or begin every text with a
    space. So each cut is tried on the text around it. Without a tokenizer, the pieces are to train one like GPT-2's.
    """
    for split, document in documents:
        start = 0
        while len(document) - start > PIECE:
            gaps = islice(GAP.finditer(document, start + PIECE), 4)
            cuts = [start + PIECE] if tokenizer and tokenizer.by_character else [gap.start() for gap in gaps]
            stop = next((cut for cut in cuts if _separable(document, cut, tokenizer)), None)
            if stop is None:
                break
            yield split, document[start:stop]
            start = stop
        yield split, document[start:]


def _separable(document: str, cut: int, tokenizer: Tokenizer | None) -> bool:
    if tokenizer is None or tokenizer.by_character:
        return True
    left, right = document[max(cut - 256, 0) : cut], document[cut : cut + 256]
    whole, *parts = tokenizer.encode_documents([left + right, left, right])
    return np.array_equal(whole, np.concatenate(parts))


def token_arrays(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Split, np.ndarray]]:
    """Yields splits and tokens of all documents in order, each followed by a separator; skips empty ones."""
    end = np.array([tokenizer.end_of_text])
    texts = in_pieces(_separated(documents, tokenizer), tokenizer)
    while group := list(islice(texts, GROUP)):
        encoded = iter(tokenizer.encode_documents([text for _, text in group if text]))
        yield from ((split, next(encoded) if text else end) for split, text in group)


def _separated(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yields documents that have text, and separators: "" stands for the token of one, if there is one."""
    begun = set[Split]()
    for split, document in documents:
        if not document:
            continue
        if split in begun and tokenizer.end_of_text is None:
            yield split, SEPARATOR
        begun.add(split)
        yield split, document
        if tokenizer.end_of_text is not None:
            yield split, ""
