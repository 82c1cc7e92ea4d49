"""Documents are tokenised once, into files from which windows are read.

A directory of shards appears all at once, by a rename, so one that exists is complete. Its manifest has the size and
checksum of every file, which reveal later damage.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from thinned.data.token_stream import first_characters, token_arrays
from thinned.data.tokenizer import Tokenizer

FORMAT = 1
SHARD_TOKENS = 100_000_000


class OpenFiles:
    """Files that are held open, so that they stay readable when deleted. Unpickling opens them again."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.descriptors: list[int] = []
        for path in paths:
            self.descriptors.append(os.open(path, os.O_RDONLY))

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[list[Path]]]:
        return OpenFiles, (self.paths,)

    def __del__(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


@dataclass
class TokenShards:
    """Consecutive tokens of a split, across its files. The workers of a data loader can read them too."""

    files: OpenFiles
    counts: list[int]  # tokens in each file
    dtype: str
    start: int  # first of these tokens in the split
    stop: int  # and the one after the last

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def paths(self) -> list[Path]:
        """Paths of the files."""
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
        for path, count, file in zip(self.paths, self.counts, self.files.descriptors, strict=True):
            begin, end = max(first, 0), min(first + count, len(tokens))
            if begin < end:
                # In a memory map, a page that a truncated file lacks would kill the process with a bus error.
                content = os.pread(file, (end - begin) * width, (begin - first) * width)
                if len(content) < (end - begin) * width:
                    raise _damaged(path.parent, f"a shorter file {path}")
                tokens[begin:end] = np.frombuffer(content, self.dtype)
            first += count
        return tokens

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Expected tokens in [0, {len(self)}], but got [{start}, {stop})")


class ShardWriter:
    """Writes the tokens of a split to files of at most `SHARD_TOKENS`; `shards` is their part of the manifest."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0

    def append(self, tokens: np.ndarray) -> None:
        """Writes more tokens, to as many files as it takes."""
        while len(tokens):
            if not self.shards or self.shards[-1]["tokens"] == SHARD_TOKENS:
                self.shards.append({"file": f"{self.split}-{len(self.shards):05d}.bin", "tokens": 0, "crc32": 0})
            shard = self.shards[-1]
            part = tokens[: SHARD_TOKENS - shard["tokens"]]
            content = part.astype(self.dtype).tobytes()
            with (self.folder / shard["file"]).open("ab") as file:
                file.write(content)
            shard["crc32"] = zlib.crc32(content, shard["crc32"])
            shard["tokens"] += len(part)
            self.tokens += len(part)
            tokens = tokens[len(part) :]


def build_shards(
    directory: Path,
    key: dict[str, Any],
    tokenizer: Callable[[], Tokenizer],
    splits: Mapping[str, Iterable[str]],
    max_tokens: int | None,
    check: Callable[[dict[str, int]], object],
) -> None:
    """Tokenises documents into a directory, unless it exists. One of several processes does it; the others wait.

    Args:
        directory: Directory to make; an error leaves nothing of it.
        key: What determines the content, for the manifest.
        tokenizer: Makes the tokenizer.
        splits: Documents of each split.
        max_tokens: The most tokens of a split; None for all.
        check: Called with the number of tokens of each split; it raises an error if they will not do.

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
        written = _write_splits(folder, dtype, made, splits, max_tokens)
        check({split: content["tokens"] for split, content in written.items()})
        (folder / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
        manifest = {"format": FORMAT, "vocab_size": made.vocab_size, "dtype": dtype, "key": key, "splits": written}
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


def _write_splits(
    folder: Path, dtype: str, tokenizer: Tokenizer, splits: Mapping[str, Iterable[str]], max_tokens: int | None
) -> dict[str, Any]:
    """Writes the tokens of all splits and returns the part of the manifest that describes them."""
    written: dict[str, Any] = {}
    columns = (SpinnerColumn(), TextColumn("Tokenising data.path: {task.completed:,.0f} tokens"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        for split, documents in splits.items():
            if tokenizer.by_character:  # it may lack characters of the text that is not kept
                documents = first_characters(documents, max_tokens)
            writer = ShardWriter(folder, split, dtype)
            try:
                for tokens in token_arrays(documents, tokenizer):
                    writer.append(tokens if max_tokens is None else tokens[: max_tokens - writer.tokens])
                    progress.advance(task, len(tokens))
                    if writer.tokens == max_tokens:
                        break
            except ValueError as error:
                raise ValueError(f"{error} (data.path, split {split!r})") from None
            written[split] = {"tokens": writer.tokens, "shards": writer.shards}
    return written


def open_shards(directory: Path, key: dict[str, Any]) -> tuple[Tokenizer, dict[str, TokenShards]]:
    """Returns the tokenizer and the tokens of each split; ValueError if a file is not as it was written."""
    tokens = {}
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["format"], manifest["key"]) != (FORMAT, key):
            raise ValueError("is of other text")
        tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text(encoding="utf-8"))
        dtype = manifest["dtype"]
        for split, content in manifest["splits"].items():
            files = OpenFiles([directory / shard["file"] for shard in content["shards"]])
            counts = [shard["tokens"] for shard in content["shards"]]
            for shard in content["shards"]:
                _verify(directory / shard["file"], shard["tokens"] * np.dtype(dtype).itemsize, shard["crc32"])
            tokens[split] = TokenShards(files, counts, dtype, start=0, stop=sum(counts))
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}") from None
    return tokenizer, tokens


def _verify(path: Path, size: int, checksum: int) -> None:
    found = 0
    with path.open("rb") as file:
        if (got := os.fstat(file.fileno()).st_size) != size:
            raise ValueError(f"{path.name} has {got} bytes instead of {size}")
        for content in iter(partial(file.read, 2**24), b""):
            found = zlib.crc32(content, found)
    if found != checksum:
        raise ValueError(f"{path.name} has the checksum {found:08x} instead of {checksum:08x}")


def _damaged(directory: Path, found: str) -> ValueError:
    return ValueError(
        f"Expected the tokens that were written to data.cache_dir, but got {found}; "
        f"delete {directory} to have them made anew"
    )
