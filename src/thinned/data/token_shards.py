"""Documents tokenised once, into files from which windows are read.

A directory of shards appears all at once, by a rename, so one that exists is complete; its manifest has the size and
checksum of every file, by which later damage is found.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from thinned.data.token_stream import first_characters, token_arrays
from thinned.data.tokenizer import Tokenizer

FORMAT = 1
SHARD_TOKENS = 100_000_000


class OpenFiles:
    """Files that stay open, and so readable, when they are deleted; in another process they are opened anew."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.descriptors: list[int] = []
        self.open()

    def open(self) -> list[int]:
        """Returns the descriptors, by file."""
        if len(self.descriptors) < len(self.paths):
            self.descriptors = [os.open(path, os.O_RDONLY) for path in self.paths]
        return self.descriptors

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "descriptors": []}

    def __del__(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


@dataclass
class TokenShards:
    """Some consecutive tokens of a split, across its files; a data loader's workers can read them too."""

    files: OpenFiles
    counts: list[int]  # tokens in each file
    dtype: str
    start: int  # where in all of the split these tokens begin
    stop: int  # and end

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def paths(self) -> list[Path]:
        """Of the files."""
        return self.files.paths

    def part(self, start: int, stop: int) -> TokenShards:
        """Returns the tokens from start to stop, without reading them."""
        self._check(start, stop)
        return dataclasses.replace(self, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens from start to stop, int64 (stop - start,); ValueError if a file has become shorter."""
        self._check(start, stop)
        tokens = np.empty(stop - start, np.int64)
        first = -self.start - start  # where in `tokens` the file begins
        width = np.dtype(self.dtype).itemsize
        for path, count, file in zip(self.paths, self.counts, self.files.open(), strict=True):
            begin, end = max(first, 0), min(first + count, len(tokens))
            if begin < end:
                # Not a memory map, of which a missing page ends the process with a bus error.
                content = os.pread(file, (end - begin) * width, (begin - first) * width)
                if len(content) < (end - begin) * width:
                    raise ValueError(
                        f"Expected the tokens that were written to data.cache_dir, but got a shorter file {path}; "
                        f"delete {path.parent} to have them made anew"
                    )
                tokens[begin:end] = np.frombuffer(content, self.dtype)
            first += count
        return tokens

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Expected tokens in [0, {len(self)}], but got [{start}, {stop})")


class ShardWriter:
    """Writes the tokens of a split to files and keeps account of them."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def append(self, tokens: np.ndarray) -> None:
        """Writes some more tokens, to as many files as it takes."""
        while len(tokens):
            if not self.shards or self.shards[-1]["tokens"] == SHARD_TOKENS:
                self._next()
            shard = self.shards[-1]
            part = tokens[: SHARD_TOKENS - shard["tokens"]]
            content = part.astype(self.dtype).tobytes()
            assert self._file
            self._file.write(content)
            shard["crc32"] = zlib.crc32(content, shard["crc32"])
            shard["tokens"] += len(part)
            self.tokens += len(part)
            tokens = tokens[len(part) :]

    def _next(self) -> None:
        if self._file:
            self._file.close()
        name = f"{self.split}-{len(self.shards):05d}.bin"
        self._file = (self.folder / name).open("wb")
        self.shards.append({"file": name, "tokens": 0, "crc32": 0})


def build_shards(
    directory: Path,
    key: dict[str, Any],
    tokenizer: Callable[[], Tokenizer],
    splits: Mapping[str, Iterable[str]],
    max_tokens: int | None,
    check: Callable[[dict[str, int]], object],
) -> None:
    """Tokenises documents into a directory, unless it is there. Of several processes, one does and the others wait.

    Args:
        directory: Where; if anything goes wrong, nothing is left of it.
        key: What determines the content, for the manifest.
        tokenizer: Makes the tokenizer.
        splits: The documents of each split.
        max_tokens: The most tokens of a split; None for all of them.
        check: Is called with the number of tokens of each split, and raises an error if they will not do.

    Raises:
        OSError: If the files cannot be written.
        ValueError: If the text cannot be encoded.
    """
    if directory.exists():
        return
    made = [folder for folder in (directory.parent, *directory.parent.parents) if not folder.exists()]
    lock = directory.with_name(f".{directory.name}.lock")
    partial_directory = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                if not directory.exists():
                    shutil.rmtree(partial_directory, ignore_errors=True)  # of a process that was killed
                    partial_directory.mkdir()
                    _write(partial_directory, key, tokenizer(), splits, max_tokens, check)
                    partial_directory.rename(directory)
            finally:
                shutil.rmtree(partial_directory, ignore_errors=True)
                lock.unlink(missing_ok=True)  # who waits for it notices, and takes a new one
    except BaseException as error:
        for folder in made:
            with suppress(OSError):  # there may be something of another's in it
                folder.rmdir()
        if isinstance(error, OSError) and error.errno is not None:  # the system's; those of data.path say so already
            raise OSError(
                f"Expected to write tokens to data.cache_dir, but got {type(error).__name__} ({error}) for {directory}"
            ) from None
        raise


def _write(
    folder: Path,
    key: dict[str, Any],
    tokenizer: Tokenizer,
    splits: Mapping[str, Iterable[str]],
    max_tokens: int | None,
    check: Callable[[dict[str, int]], object],
) -> None:
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    written: dict[str, Any] = {}
    with shown_progress() as advance:
        for split, documents in splits.items():
            if tokenizer.by_character:  # what is not kept may have characters that it does not know
                documents = first_characters(documents, max_tokens)
            with ShardWriter(folder, split, dtype) as writer:
                try:
                    for tokens in token_arrays(documents, tokenizer):
                        writer.append(tokens if max_tokens is None else tokens[: max_tokens - writer.tokens])
                        advance(len(tokens))
                        if writer.tokens == max_tokens:
                            break
                except ValueError as error:
                    raise ValueError(f"{error} (data.path, split {split!r})") from None
            written[split] = {"tokens": writer.tokens, "shards": writer.shards}
    check({split: content["tokens"] for split, content in written.items()})
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    manifest = {"format": FORMAT, "vocab_size": tokenizer.vocab_size, "dtype": dtype, "key": key, "splits": written}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


@contextmanager
def shown_progress() -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of new tokens; what takes more than a second shows them."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("Tokenising data.path: {task.completed:,.0f} tokens"), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_interactive)
    task = progress.add_task("")
    begun = time.monotonic()
    started = False

    def advance(tokens: int) -> None:
        nonlocal started
        progress.advance(task, tokens)
        if not started and time.monotonic() - begun > 1:
            progress.start()
            started = True

    try:
        yield advance
    finally:
        if started:
            progress.stop()


def open_shards(directory: Path, key: dict[str, Any]) -> tuple[Tokenizer, dict[str, TokenShards]]:
    """Returns the tokenizer and the tokens of each split.

    Raises:
        ValueError: If a file is not as it was written.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["format"], manifest["key"]) != (FORMAT, key):
            raise ValueError("is of other text")
        tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text(encoding="utf-8"))
        splits = {split: content["shards"] for split, content in manifest["splits"].items()}
        width = np.dtype(manifest["dtype"]).itemsize
        for shard in chain(*splits.values()):
            _verify(directory / shard["file"], shard["tokens"] * width, shard["crc32"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected the tokens that were written to data.cache_dir, but got {type(error).__name__}: {error}; "
            f"delete {directory} to have them made anew"
        ) from None
    return tokenizer, {
        split: TokenShards(
            OpenFiles([directory / shard["file"] for shard in shards]),
            [shard["tokens"] for shard in shards],
            manifest["dtype"],
            0,
            sum(shard["tokens"] for shard in shards),
        )
        for split, shards in splits.items()
    }


def _verify(path: Path, size: int, checksum: int) -> None:
    found = 0
    with path.open("rb") as file:
        if (got := os.fstat(file.fileno()).st_size) != size:
            raise ValueError(f"{path.name} has {got} bytes instead of {size}")
        for content in iter(partial(file.read, 2**24), b""):
            found = zlib.crc32(content, found)
    if found != checksum:
        raise ValueError(f"{path.name} has the checksum {found:08x} instead of {checksum:08x}")
