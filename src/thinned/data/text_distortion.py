"""Distorts text: exchanges characters at a rate, as a poor scan or a careless typist does."""

import numpy as np

from thinned.data.token_stream import token_arrays
from thinned.data.tokenizer import Tokenizer
from thinned.data.tokens import HeldTokens, Tokens

TEXT_KINDS = ("characters",)
SEED = 0  # one for all, so that runs with other seeds are tested on the same text


def exchanged(tokens: Tokens, tokenizer: Tokenizer, rate: float) -> HeldTokens:
    """Exchanges each character, with a probability, for one at a random place of the text, and tokenises it again.

    Draws are a function of the character's place. A drawn character may be the same. Ends of documents stay.
    """
    ids = tokens.read(0, len(tokens))
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    documents = [tokenizer.decode(part[part != tokenizer.end_of_text].tolist()) for part in np.split(ids, ends)]
    points = np.frombuffer("".join(documents).encode("utf-32-le", errors="surrogatepass"), "<u4")
    chosen, place = np.random.default_rng(SEED).random((len(points), 2)).T
    points = np.where(chosen < rate, points[(place * len(points)).astype(np.int64)], points)
    text = points.astype("<u4").tobytes().decode("utf-32-le", errors="surrogatepass")
    stops = np.cumsum([len(document) for document in documents])
    parts = (text[stop - len(document) : stop] for stop, document in zip(stops, documents, strict=True))
    encoded = [part for _, part in token_arrays((("test", part) for part in parts), tokenizer)]
    return HeldTokens(np.concatenate(encoded))
