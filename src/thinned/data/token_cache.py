"""Tokenises text once, into a file for each split, which later runs find again.

A folder of tokens appears by a rename, and its manifest has the number of tokens of each file. A folder in which
something is missing, or has another size, is replaced by a new one.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from thinned.data.order import Split
from thinned.data.token_stream import Document, first, token_arrays
from thinned.data.tokenizer import Tokenizer
from thinned.data.tokens import Tokens

FORMAT = 3  # of the files; each format has its own folders


class Tokenised(NamedTuple):
    """Holds the tokens of a text."""

    tokenizer: Tokenizer
    tokens: dict[Split, Tokens]
    digests: dict[Split, str]  # of the splits that consist of whole documents


def folder_of(cache_dir: str, label: str, key: list[Any]) -> Path:
    """Returns the folder of tokens: the label is for people; the key is all that they depend on."""
    digest = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", label).strip(".-")[:80]
    return Path(cache_dir).expanduser() / f"{name}-{digest[:12]}"


def cached_tokens(folder: Path, write: Callable[[Path], None]) -> Tokenised:
    """Returns the tokens in a folder. If there are none, one process calls `write_tokens`, and the others wait.

    Raises:
        OSError: If the files cannot be written.
    """
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
    check: Callable[[dict[Split, int]], dict[Split, str]],
) -> None:
    """Writes a file of tokens for each split.

    Args:
        folder: The folder.
        tokenizer: Encodes the text; a ValueError if it cannot names the split.
        stored: Documents of each stored split, with the splits to which they go.
        splits: All of these.
        max_tokens: The most tokens of a stored split; None for all.
        check: Called with the number of tokens of each split. Returns digests to keep, or raises an error if the
            tokens will not do.
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
    manifest = {"dtype": dtype, "tokens": counts, "digests": check(counts)}
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def open_tokens(folder: Path) -> Tokenised | None:
    """Returns the tokens in a folder; None if a file is missing or has changed."""
    tokens = {}
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        dtype, digests = manifest["dtype"], manifest["digests"]
        for split, count in manifest["tokens"].items():
            path = folder / f"{split}.bin"
            if path.stat().st_size != count * np.dtype(dtype).itemsize:
                return None
            tokens[split] = Tokens(path, dtype, 0, count)
    except (KeyError, OSError, TypeError, ValueError):
        return None
    return Tokenised(tokenizer, tokens, digests)
