"""Text in files: which of a folder's files are used, in which split, and how their bytes become characters.

A layout by split, such as train/a.txt, wiki.valid.tokens or test-00000-of-00002.jsonl, applies if something is named
train. What has no split name is then left out. Otherwise, all files are one text, which is divided later.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from thinned.data.order import Split
from thinned.data.split_names import assign_splits, split_of, stored_split, walk

PROSE = frozenset([".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".htm", ".xml", ".tokens", ".raw"])
CODE = ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .js .ts .css .sh .sql .lua"
SETTINGS = ".toml .yaml .yml .ini .cfg"
TEXT = PROSE.union(CODE.split(), SETTINGS.split())
ROWS = {  # the builder of `datasets` for each kind of rows
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|dataset_?card)\b", re.IGNORECASE
)  # the data, not of it
BYTE_ORDER_MARKS = {  # the longer ones first, since that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be", b"": "utf-8",
}  # fmt: skip


def suffix(path: PurePath) -> str:
    """Returns what a file's name ends in, in lower case and without that of a compression: ".txt" for a.TXT.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in OPEN else path
    return inner.suffix.lower()


@dataclass(frozen=True)
class TextFiles:
    """Each file is a document."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[str]:
        return map(_read, self.paths)


def _read(path: Path) -> str:
    try:
        # Reading as text would change the newlines.
        with OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise OSError(f"Expected data.path to hold files that can be read, but got {error} ({path})") from None
    mark = next(mark for mark in BYTE_ORDER_MARKS if content.startswith(mark))
    if not mark and (place := content.find(b"\0")) >= 0:
        raise ValueError(
            f"Expected data.path to hold text, but got a zero byte at offset {place} of {path}: "
            "UTF-16 needs a byte order mark"
        )
    try:
        return content[len(mark) :].decode(BYTE_ORDER_MARKS[mark])
    except UnicodeDecodeError as error:
        offset = error.start + len(mark)
        raise ValueError(
            f"Expected data.path to hold {error.encoding.upper()}, but got the byte 0x{content[offset]:02x} at "
            f"offset {offset} of {path}"
        ) from None


def csv_header(paths: Sequence[Path]) -> tuple[str, list[str]]:
    """Returns what separates the cells of CSV files (a comma, a semicolon or a tab), and the names of their columns.

    Raises:
        ValueError: If one of the first rows has not as many cells as the header.
    """
    found, header = ",", list[str]()
    for path in paths:
        with OPEN.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            found = max(",;\t", key=file.readline().count)
            file.seek(0)
            rows = csv.reader(file, delimiter=found)
            header = next(rows, [])
            for number, row in enumerate(islice(rows, 10_000), 2):
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{len(row)} cells instead of {len(header)} in row {number} of {path}: quote its text"
                    )
    return found, header


@dataclass(frozen=True)
class Layout:
    """The files of each split, all of them text or all of them rows."""

    splits: dict[Split, list[Path]]
    rows: bool
    left_out: list[str]  # what is there and not used


def layout(folder: Path, leave_out: Sequence[str]) -> Layout | None:
    """Returns which files of a folder are for which split, or the file itself for training.

    Args:
        folder: A folder or a file.
        leave_out: Names of splits, folders and files that are not to be used; `*` stands for any part of a name.

    Returns:
        The layout; None if there is neither text nor rows.

    Raises:
        ValueError: If it is not clear what to use, or there is nothing that is called as in `leave_out`.
    """
    if folder.is_file():
        return Layout({"train": [folder]}, suffix(folder) in ROWS, [])
    files = sorted((path.relative_to(folder) for path in walk(folder) if path.is_file()), key=Path.as_posix)
    for given in leave_out:
        if not any(_is_named(path, given) for path in files):
            raise ValueError(
                f"Expected data.leave_out to name splits, folders or files of data.path, but got {given!r}"
            )
    used = _of_one_kind([path for path in files if not any(_is_named(path, given) for given in leave_out)])
    if not used:
        return None
    splits = {split: [folder / path for path in paths] for split, paths in _by_split(used).items()}
    chosen = {path for paths in splits.values() for path in paths}
    left_out = [path.as_posix() for path in files if folder / path not in chosen]
    return Layout(splits, suffix(used[0]) in ROWS, left_out)


def _split_name(path: Path, *, in_words: bool = False) -> str | None:
    """Returns the name of a file's split, which for programs and settings is that of a folder: train.py is none."""
    named = suffix(path) in PROSE or suffix(path) in ROWS
    return stored_split(path if named else path.parent / "_", in_words=in_words)


def _is_named(path: Path, given: str) -> bool:
    names = (path.as_posix(), *path.parts, _split_name(path, in_words=True) or "")
    return any(fnmatchcase(name, given) for name in names)


def _is_train(path: Path) -> bool:
    return split_of(_split_name(path) or "") == "train"


def _of_one_kind(files: list[Path]) -> list[Path]:
    """Returns the files that are text, or those that are rows; ValueError if it is not clear which are meant."""
    rows = [path for path in files if suffix(path) in ROWS]
    texts = [path for path in files if suffix(path) in TEXT]
    if not rows or not texts:
        return rows or texts
    if all(ABOUT.match(path.name) for path in texts):
        return rows
    with_train = [kind for kind in (rows, texts) if any(map(_is_train, kind))]
    if len(with_train) == 1:
        return with_train[0]
    raise ValueError(
        f"Expected text or rows in data.path, but got both, such as {texts[0]} and {rows[0]}: name what is not to be "
        f"used in data.leave_out, such as '*{rows[0].suffix}'"
    )


def _by_split(files: list[Path]) -> dict[Split, list[Path]]:
    """Returns the files of each split, or all files for training if there are no splits."""
    names = {path: _split_name(path) for path in files}
    if not any(map(_is_train, files)) and not all(names.values()):
        words = {path: _split_name(path, in_words=True) for path in files if not ABOUT.match(path.name)}
        splits = {split_of(name) for name in words.values() if name}
        if "train" not in splits or len(splits) == 1:
            return {"train": files}
        if not all(words.values()):
            train, other = (
                next(path for path, name in words.items() if split_of(name or "") == split) for split in ("train", None)
            )
            raise ValueError(
                f"Expected splits in data.path or none, but got files such as {train}, and {other} of no split: name "
                "those that are not to be used in data.leave_out, or put the splits into folders train, valid and test"
            )
        names = words
    assigned, _ = assign_splits(sorted({name for name in names.values() if name}))
    return {split: [path for path in files if names.get(path) == name] for split, name in assigned.items()}
