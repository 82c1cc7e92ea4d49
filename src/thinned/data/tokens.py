"""Documents are tokenised once, into a file for each split, from which windows are read.

A directory of tokens appears all at once, by a rename, so one that exists is complete. Its manifest has the number of
tokens of each file, and a file of another size is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from thinned.data.order import Split
from thinned.data.token_stream import Document, first_characters, token_arrays
from thinned.data.tokenizer import Tokenizer

FORMAT = 2  # of the files; another one has other directories


class Tokens:
    """Consecutive tokens of a file, which is held open, so that it stays readable when deleted.

    The workers of a data loader can read them too: unpickling opens the file again.

    Args:
        path: File of the tokens.
        dtype: Their type in the file.
        start: The first of them in the file.
        stop: The one after the last.
        descriptor: The open file; None opens it.
    """

    def __init__(self, path: Path, dtype: str, start: int, stop: int, descriptor: int | None = None) -> None:
        self.path, self.dtype, self.start, self.stop = path, dtype, start, stop
        self._descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[type[Tokens], tuple[Path, str, int, int]]:
        return Tokens, (self.path, self.dtype, self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Tokens:
        """Returns the tokens from start to stop, without reading them."""
        self._check(start, stop)
        return Tokens(self.path, self.dtype, self.start + start, self.start + stop, os.dup(self._descriptor))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens from start to stop, int64 (stop - start,); ValueError if the file has become shorter."""
        self._check(start, stop)
        width = np.dtype(self.dtype).itemsize
        # In a memory map, a page that a truncated file lacks would kill the process with a bus error.
        content = os.pread(self._descriptor, (stop - start) * width, (self.start + start) * width)
        if len(content) < (stop - start) * width:
            raise _damaged(self.path.parent, f"a shorter file {self.path}")
        return np.frombuffer(content, self.dtype).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Tells other tokens apart, by what they are and how many."""
        digest, step = blake2b(digest_size=16), 2**22
        for start in range(0, len(self), step):
            digest.update(self.read(start, min(start + step, len(self))).astype("<u4").tobytes())
        return digest.hexdigest()

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Expected tokens in [0, {len(self)}], but got [{start}, {stop})")


def write_tokens(
    directory: Path,
    tokenizer: Callable[[], Tokenizer],
    stored: Mapping[Split, Iterable[Document]],
    splits: Iterable[Split],
    max_tokens: int | None,
    digests: Callable[[dict[Split, int]], dict[Split, str]],
) -> None:
    """Tokenises documents into a directory, unless it exists. One of several processes does it; the others wait.

    Args:
        directory: Directory to make; an error leaves nothing of it.
        tokenizer: Makes the tokenizer.
        stored: Documents of each stored split, with the splits to which they go.
        splits: All of these.
        max_tokens: The most tokens of a stored split; None for all.
        digests: Called with the number of tokens of each split. Returns digests to keep, or raises an error if the
            tokens will not do.

    Raises:
        OSError: If the files cannot be written.
        ValueError: If the text cannot be encoded.
    """
    if directory.exists():
        return
    with _new_directory(directory) as folder:
        if folder is None:
            return
        made = tokenizer()
        dtype = "<u2" if made.vocab_size <= 2**16 else "<u4"
        columns = SpinnerColumn(), TextColumn("Tokenising data.path: {task.completed:,.0f} tokens"), TimeElapsedColumn()
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        with progress, ExitStack() as stack:
            task = progress.add_task("")
            files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in splits}
            for name, documents in stored.items():
                if made.by_character:  # it may lack characters of the text that is not kept
                    documents = first_characters(documents, max_tokens)
                remaining = max_tokens
                try:
                    for split, tokens in token_arrays(documents, made):
                        files[split].write(tokens[:remaining].astype(dtype).tobytes())
                        progress.advance(task, len(tokens[:remaining]))
                        if remaining is not None:
                            remaining -= len(tokens[:remaining])
                            if not remaining:
                                break
                except ValueError as error:
                    raise ValueError(f"{error} (data.path, split {name!r})") from None
            counts = {split: file.tell() // np.dtype(dtype).itemsize for split, file in files.items()}
        manifest = {"dtype": dtype, "tokens": counts, "digests": digests(counts)}
        (folder / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


@contextmanager
def _new_directory(directory: Path) -> Iterator[Path | None]:
    """Yields a folder that becomes `directory` if all goes well, or None if another process has just made it."""
    made = [folder for folder in (directory.parent, *directory.parent.parents) if not folder.exists()]
    lock = directory.with_name(f".{directory.name}.lock")
    folder = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                if directory.exists():
                    yield None
                else:
                    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
                    folder.mkdir()
                    yield folder
                    folder.rename(directory)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)  # a process that waits for it notices, and makes a new one
    except BaseException as error:
        for parent in made:
            with suppress(OSError):  # it may hold files of others
                parent.rmdir()
        if isinstance(error, OSError) and error.errno is not None:  # the errors of data.path have no errno
            raise OSError(
                f"Expected to write tokens to data.cache_dir, but got {type(error).__name__} ({error}) for {directory}"
            ) from None
        raise


class Tokenised(NamedTuple):
    """Text as tokens."""

    tokenizer: Tokenizer
    tokens: dict[Split, Tokens]
    digests: dict[Split, str]  # of the splits that consist of whole documents


def open_tokens(directory: Path) -> Tokenised:
    """Returns what `write_tokens` has written; ValueError if a file is not as it was."""
    tokens = {}
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text(encoding="utf-8"))
        dtype, digests = manifest["dtype"], manifest["digests"]
        for split, count in manifest["tokens"].items():
            path, expected = directory / f"{split}.bin", count * np.dtype(dtype).itemsize
            if (size := path.stat().st_size) != expected:
                raise ValueError(f"{path.name} has {size} bytes instead of {expected}")
            tokens[split] = Tokens(path, dtype, 0, count)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}") from None
    return Tokenised(tokenizer, tokens, digests)


def _damaged(directory: Path, found: str) -> ValueError:
    return ValueError(
        f"Expected the tokens that were written to data.cache_dir, but got {found}; "
        f"delete {directory} to have them made anew"
    )
