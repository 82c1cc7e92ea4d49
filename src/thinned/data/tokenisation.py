"""Turns documents into tokens: makes the tokenizer of a text, and writes its tokens once, for later runs too.

Each document comes with the name of its split. Long ones are tokenised in pieces, so that memory does not grow.

A folder of tokens appears by a rename, and its manifest has the number of tokens of each file. A folder in which
something is missing, or has another size, is replaced by a new one.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from thinned.data import distortion
from thinned.data.order import Split
from thinned.data.tokenizer import Tokenizer, bpe_size, code_points
from thinned.data.tokens import Tokens

FORMAT = 4  # of the files; each format has its own folders
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


def exchanged(ids: np.ndarray, tokenizer: Tokenizer, rate: float) -> np.ndarray:
    """Returns the tokens of a distorted text from those of the text, (N,) int64 each, as of a careless typist.

    Each character is exchanged, with probability `rate`, for one at a random place of the text, which may be the same.
    Draws are a function of the character's place. Ends of documents stay.
    """
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    documents = [tokenizer.decode(part[part != tokenizer.end_of_text].tolist()) for part in np.split(ids, ends)]
    points = code_points("".join(documents))
    chosen, place = np.random.default_rng(distortion.SEED).random((len(points), 2)).T
    points = np.where(chosen < rate, points[(place * len(points)).astype(np.int64)], points)
    text = points.astype("<u4").tobytes().decode("utf-32-le", errors="surrogatepass")
    stops = np.cumsum([len(document) for document in documents])
    parts = (text[stop - len(document) : stop] for stop, document in zip(stops, documents, strict=True))
    return np.concatenate([part for _, part in token_arrays((("test", part) for part in parts), tokenizer)])


class Tokenised(NamedTuple):
    """Holds the tokens of a text."""

    tokenizer: Tokenizer
    tokens: dict[Split, Tokens]
    sketch: str  # hashes by which documents for training are recognised; empty if the text is split by position


def folder_of(cache_dir: str, label: str, key: list[Any]) -> Path:
    """Returns the folder of tokens: the label is for people; the key is all that they depend on."""
    digest = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", label).strip(".-")[:80]
    return Path(cache_dir).expanduser() / f"{name}-{digest[:12]}"


def cached_tokens(folder: Path, write: Callable[[Path], None]) -> Tokenised:
    """Returns the tokens in a folder. If there are none, one process writes them, and the others wait."""
    if found := open_tokens(folder):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock := folder.with_name(f".{folder.name}.lock")):
            try:
                if not open_tokens(folder):  # else another process has written it
                    with TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
                        partial = Path(temporary, "tokens")
                        partial.mkdir()
                        write(partial)
                        shutil.rmtree(folder, ignore_errors=True)
                        partial.rename(folder)
            finally:
                lock.unlink(missing_ok=True)  # a waiting process notices, and makes a new one
    except OSError as error:
        if error.errno is None:  # the errors of data.path have none
            raise
        cause = f"{type(error).__name__} ({error}) for {folder}"
        raise OSError(f"Expected to write tokens to data.cache_dir, but got {cause}") from None
    found = open_tokens(folder)
    assert found
    return found


def write_tokens(
    folder: Path,
    tokenizer: Tokenizer,
    stored: Mapping[Split, Iterable[Document]],
    splits: Iterable[Split],
    max_tokens: int | None,
    sketch: Callable[[], str] = lambda: "",
) -> dict[Split, int]:
    """Writes a file of tokens for each split, and returns their numbers; ValueError if a text cannot be encoded.

    At most `max_tokens` tokens of a stored split are written; None is all. `sketch` is called after all documents.
    """
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    columns = "Tokenising data.path: {task.completed:,.0f} tokens", TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, ExitStack() as stack:
        task = progress.add_task("")
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in splits}
        for name, documents in stored.items():
            if tokenizer.by_character:  # it may lack characters of discarded text
                documents = first(documents, max_tokens)
            try:
                for split, tokens in first(token_arrays(documents, tokenizer), max_tokens):
                    files[split].write(tokens.astype(dtype).tobytes())
                    progress.advance(task, len(tokens))
            except ValueError as error:
                raise ValueError(f"{error} (data.path, split {name!r})") from None
        counts = {split: file.tell() // np.dtype(dtype).itemsize for split, file in files.items()}
    manifest = {"dtype": dtype, "tokens": counts, "sketch": sketch()}
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return counts


def open_tokens(folder: Path) -> Tokenised | None:
    """Returns the tokens in a folder; None if a file is missing or has changed."""
    tokens = {}
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for split, count in manifest["tokens"].items():
            tokens[split] = Tokens(folder / f"{split}.bin", manifest["dtype"], 0, count)
            if tokens[split].path.stat().st_size != count * np.dtype(manifest["dtype"]).itemsize:
                return None
        return Tokenised(tokenizer, tokens, manifest["sketch"])
    except (KeyError, OSError, TypeError, ValueError):
        return None
