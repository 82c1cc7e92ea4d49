"""Reads documents from Python's own documentation, text files, files of rows or a Hugging Face dataset.

"pydocs" is the text of `help()` topics, `pydoc_data.topics` in CPython: half a megabyte of English that every
installation has. "stdlib" is half a megabyte of CPython's own sources, with the characters of "pydocs" alone, so that a
network that knows those can predict it.
"""

from __future__ import annotations

import glob
import hashlib
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
from thinned.data.split_names import assign_splits
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
    label: str  # for people; it can be part of a file name
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
    folder = Path(path).expanduser()
    files = None
    if path in ("pydocs", "stdlib"):
        topics = pydoc_data.topics.topics
        documents = [topics[key] for key in sorted(topics)]
        if path == "stdlib":
            documents = _own_sources(set().union(*documents))
        source = TextSource({"train": documents}, hashlib.sha256(json.dumps(documents).encode()).hexdigest(), path)
    else:
        if folder.exists() and not is_saved(folder) and not declares_its_files(folder):
            files = layout(folder, leave_out)
        if not files or files.rows:
            return _rows(path, name, text_column, leave_out, None if name else files, streaming=streaming)
        splits: dict[Split, TextFiles] = {split: TextFiles(paths) for split, paths in files.splits.items()}
        if not any(path.stat().st_size for text in splits.values() for path in text.paths):
            raise ValueError(f"Expected text in data.path, but got nothing in {str(folder)!r}")
        content = json.dumps({split: text.digest(folder) for split, text in splits.items()})
        source = TextSource(splits, content, _label(folder), files.left_out)
    settings = {"name": name, "text_column": text_column, "streaming": streaming}
    for key, value in (settings if files else settings | {"leave_out": leave_out}).items():
        if value:
            raise ValueError(
                f"Expected data.path to be files of rows or the id of a dataset on the Hugging Face Hub, as data.{key} "
                f"is {value!r}, but got {path!r}"
            )
    return source


def _own_sources(characters: set[str]) -> list[str]:
    """Returns modules of the standard library that have these characters alone, the first ones by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    allowed = [text for text in texts if characters.issuperset(text)]
    sizes = accumulate(map(len, allowed))
    return [text for text, size in zip(allowed, sizes, strict=True) if size <= SOURCE_CHARACTERS]


def _label(folder: Path) -> str:
    """Returns the name of a folder or a file, without what says what is in it."""
    return folder.resolve().name.partition(".")[0] if folder.is_file() else folder.resolve().stem


def _rows(
    path: str,
    name: str | None,
    text_column: str | None,
    leave_out: Sequence[str],
    files: Layout | None,
    *,
    streaming: bool,
) -> TextSource:
    """Returns the documents of a dataset, or of files of rows."""
    if files:
        names: dict[Split, str] = {split: split for split in files.splits}
        stored = {split: _read_files(paths, streaming=streaming) for split, paths in files.splits.items()}
        left_out = files.left_out
    else:
        found = read_stored(path, EXPECTED, name, streaming=streaming, needs_train=False)
        names, left_out = assign_splits(found, leave_out)
        stored = {split: found[stored_name] for split, stored_name in names.items()}
        if not stored:
            raise ValueError(f"Expected data.path to have splits such as 'train', 'val' and 'test', but got {left_out}")
    if list(stored) == ["train"] and not streaming:
        by_value, left_out = by_column({names["train"]: stored["train"]}, left_out)
        names, _ = assign_splits(by_value)
        stored = {split: by_value[name] for split, name in names.items()}
    column = _text_column(next(iter(stored.values())), text_column)
    columns = {split: TextColumn(rows, column, names[split]) for split, rows in stored.items()}
    for split, rows in stored.items():
        if column not in (strings := _string_columns(rows)):
            raise ValueError(f"Expected a column {column!r} in split {names[split]!r} of data.path, but got {strings}")
    folder = Path(path).expanduser()
    content: list[Any] = [streaming, column, name]
    if not streaming:
        content += [[split, fingerprint(rows)] for split, rows in stored.items()]
    elif folder.exists():
        below = [folder] if folder.is_file() else sorted(file for file in folder.rglob("*") if file.is_file())
        content += [list(names.items()), [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in below]]
    else:  # only the hub knows its current content
        content += [path, list(names.items())]
    label = _label(folder) if folder.exists() else path.replace("/", "-")
    return TextSource(columns, json.dumps(content), f"{label}-{name}" if name else label, left_out)


def _read_files(paths: list[Path], *, streaming: bool) -> Stored:
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
