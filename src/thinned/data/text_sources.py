"""Reads documents from Python's own documentation, text files, files of rows or a Hugging Face dataset.

"pydocs" is the text of `help()` topics, `pydoc_data.topics` in CPython: half a megabyte of English that every
installation has. "stdlib" is half a megabyte of CPython's own sources, with the characters of "pydocs" alone, so that a
network that knows those can predict it.
"""

from __future__ import annotations

import glob
import json
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets

from thinned.data.hugging_face import (
    Stored,
    by_column,
    declares_its_files,
    fingerprint,
    is_saved,
    read_stored,
    sizes_of,
)
from thinned.data.order import Split
from thinned.data.split_names import assign_splits, walk
from thinned.data.text_files import ROWS, Layout, TextFiles, csv_header, layout, suffix

EXPECTED = (
    "'pydocs', 'stdlib', a file of text or rows, a folder of them, or the id of a dataset on the Hugging Face Hub"
)
SOURCE_CHARACTERS = 500_000  # of "stdlib"


@dataclass(frozen=True)
class TextSource:
    """Documents by split."""

    splits: Mapping[Split, Iterable[str]]  # those that are stored; each can be read again
    content: str  # differs between sources of different text
    left_out: Sequence[str] = ()  # stored splits or files that are not used


@dataclass(frozen=True)
class TextColumn:
    """Each row of a column is a document."""

    stored: Stored
    column: str
    split: str

    def __iter__(self) -> Iterator[str]:
        for row, text in enumerate(self._rows()):
            if not isinstance(text, str):
                raise ValueError(
                    f"Expected text in column {self.column!r} of split {self.split!r} of data.path, "
                    f"but got {text!r} in row {row}"
                )
            yield text

    def _rows(self) -> Iterator[Any]:
        try:
            for batch in self.stored.select_columns(self.column).iter(batch_size=256):
                yield from batch[self.column]
        except Exception as error:  # a stream breaks off in many ways
            raise OSError(
                f"Expected split {self.split!r} of data.path to be read to its end, but got "
                f"{type(error).__name__}: {error}"
            ) from None


def read_text(
    path: str,
    name: str | None = None,
    text_column: str | None = None,
    leave_out: Sequence[str] = (),
    *,
    streaming: bool = False,
) -> TextSource:
    """Returns the documents at `data.path`; the arguments are those of `TextDataModule`.

    Raises:
        FileNotFoundError: If nothing can be read.
        ValueError: If there is no text, or an argument does not apply to it.
    """
    folder, is_built_in = Path(path).expanduser(), path in ("pydocs", "stdlib")
    by_name = not is_built_in and folder.exists() and not is_saved(folder) and not declares_its_files(folder)
    files = layout(folder, leave_out) if by_name else None
    if not is_built_in and (files is None or files.rows):
        return _rows(path, None if name else files, name, text_column, leave_out, streaming)
    unused = {
        "name": name,
        "text_column": text_column,
        "streaming": streaming,
        "leave_out": leave_out if is_built_in else (),
    }
    for key, value in unused.items():
        if value:
            raise ValueError(
                f"Expected data.path to be files of rows or the id of a dataset on the Hugging Face Hub, as data.{key} "
                f"is {value!r}, but got {path!r}"
            )
    if files:
        content = json.dumps({split: _states(paths) for split, paths in files.splits.items()})
        texts = {split: TextFiles(paths) for split, paths in files.splits.items()}
        return TextSource(texts, content, files.left_out)
    topics = pydoc_data.topics.topics
    documents = [topics[key] for key in sorted(topics)]
    if path == "stdlib":
        documents = _own_sources(set().union(*documents))
    return TextSource({"train": documents}, json.dumps(documents))


def _states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Returns what tells files from others, and from what they were: a copy or an archive cannot set the ctime back."""
    stats = {str(file.absolute()): file.stat() for file in files}
    return [(path, stat.st_size, stat.st_ctime_ns) for path, stat in stats.items()]


def _own_sources(characters: set[str]) -> list[str]:
    """Returns modules of the standard library that have these characters alone, the first ones by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    allowed = [text for text in texts if characters.issuperset(text)]
    sizes = accumulate(map(len, allowed))
    return [text for text, size in zip(allowed, sizes, strict=True) if size <= SOURCE_CHARACTERS]


def _rows(
    path: str, files: Layout | None, name: str | None, column: str | None, leave_out: Sequence[str], streaming: bool
) -> TextSource:
    """Returns the documents of files of rows, or of a dataset."""
    folder = Path(path).expanduser()
    names: dict[Split, str]
    if files:
        names, left_out = {split: split for split in files.splits}, files.left_out
        stored = {split: _read_files(paths, streaming) for split, paths in files.splits.items()}
    else:
        found = read_stored(path, EXPECTED, name, streaming=streaming, needs_train=False)
        names, left_out = assign_splits(found, leave_out)
        stored = {split: found[stored_name] for split, stored_name in names.items()}
        if not stored:
            raise ValueError(f"Expected data.path to have splits such as 'train', 'val' and 'test', but got {left_out}")
    if list(stored) == ["train"] and not streaming:
        by_value, left_out = by_column({names["train"]: stored["train"]}, left_out)
        names, _ = assign_splits(by_value)
        stored = {split: by_value[value] for split, value in names.items()}
    column = _text_column(next(iter(stored.values())), column)
    for split, rows in stored.items():
        if column not in (strings := _string_columns(rows)):
            raise ValueError(f"Expected a column {column!r} in split {names[split]!r} of data.path, but got {strings}")
    identity: Any = path  # only the hub knows its current content
    if not streaming:
        identity = {split: fingerprint(rows) for split, rows in stored.items()}
    elif folder.exists():
        identity = _states([folder] if folder.is_file() else walk(folder))
    content = json.dumps([streaming, column, name, names, identity])
    columns = {split: TextColumn(rows, column, names[split]) for split, rows in stored.items()}
    return TextSource(columns, content, left_out)


def _read_files(paths: list[Path], streaming: bool) -> Stored:
    """Returns the rows of files of one kind."""
    kinds = sorted({suffix(path) for path in paths})
    options: dict[str, Any] = {"description": sizes_of(paths)}
    try:
        if ROWS[kinds[0]] == "csv":  # where "NA" and "007" are text
            sep, names = csv_header(paths)
            features = datasets.Features({name: datasets.Value("string") for name in names})
            options |= {"keep_default_na": False, "index_col": False, "sep": sep, "features": features}
        if len({ROWS[kind] for kind in kinds}) > 1 or kinds == [".csv", ".tsv"]:
            raise ValueError(f"files of several kinds, {kinds}: name those not to be used in data.leave_out")
        data_files = {"train": [glob.escape(str(path.absolute())) for path in paths]}
        return datasets.load_dataset(ROWS[kinds[0]], data_files=data_files, streaming=streaming, **options)["train"]
    except Exception as error:  # of many types; the user needs to know which setting it is about
        cause = " ".join(str(error.__cause__ or error).split())
        shown = ", ".join(map(str, paths[:3])) + ", ..." * (len(paths) > 3)
        raise ValueError(f"Expected data.path to hold rows of one kind, but got {cause} ({shown})") from None


def _string_columns(stored: Stored) -> list[str]:
    if stored.features is None:  # a stream of JSON, for example: its first row shows them
        return [name for name, value in next(iter(stored), {}).items() if isinstance(value, str)]
    values = {name: feature for name, feature in stored.features.items() if isinstance(feature, datasets.Value)}
    return [name for name, value in values.items() if value.dtype in ("string", "large_string")]


def _text_column(stored: Stored, given: str | None) -> str:
    """Returns the given column, or "text", or the only column of strings."""
    found = _string_columns(stored)
    if given is None and len(found) > 1 and "text" in found:
        return "text"
    if given in found or (given is None and len(found) == 1):
        return given or found[0]
    raise ValueError(f"Expected data.text_column to be one of the columns of strings {found}, but got {given!r}")
