"""Reads documents from Python's own documentation, files of text or of rows, or a dataset of Hugging Face.

"pydocs" is the text of `help()` topics, `pydoc_data.topics` in CPython: half a megabyte of English that every
installation has. "stdlib" is half a megabyte of CPython's own sources, in the characters of "pydocs", so that a network
that knows those can predict it.
"""

import json
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate, islice
from pathlib import Path

from thinned.data import sources
from thinned.data.order import Split
from thinned.data.sources import suffix

ROWS = frozenset([".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"])
PROSE = [".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".htm", ".xml", ".tokens", ".raw"]
TEXT = frozenset([*PROSE, *sources.PROGRAMS])
ABOUT = re.compile(r"(readme|licen[cs]e|notice|citation|changelog|dataset_?card)\b", re.IGNORECASE)  # about the data
EXPECTED = (
    "'pydocs', 'stdlib', a file of text or rows, a folder of them, or the id of a dataset on the Hugging Face Hub"
)
SOURCE_CHARACTERS = 500_000  # of "stdlib"


@dataclass(frozen=True)
class TextSource:
    """Holds documents by split."""

    splits: Mapping[Split, Iterable[str]]  # the stored ones; each can be read again
    content: str  # differs between sources of different text
    left_out: Sequence[str] = ()  # stored splits or files that are not used


@dataclass(frozen=True)
class TextFiles:
    """Reads documents from files: each file of text is one, and so is each row of a file of rows."""

    paths: list[Path]
    column: str

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            if suffix(path) not in ROWS:
                yield _text_in(path)
                continue
            for number, row in enumerate(sources.rows_of(path, [self.column])):
                if not isinstance(text := row.get(self.column), str):
                    got = f"{text!r} in row {number} of {path}"
                    raise ValueError(f"Expected text in column {self.column!r} of data.path, but got {got}")
                yield text


def _text_in(path: Path) -> str:
    """Returns the text of a file with its own newlines, which text mode would change."""
    try:
        with sources.OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
            content: bytes = file.read()
        if b"\0" in content:
            raise ValueError("a zero byte, which is no text in UTF-8")
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"the byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ValueError(f"Expected data.path to hold UTF-8, but got {got} of {path}") from None
    except Exception as error:  # each compression has errors of its own
        raise OSError(f"Expected data.path to hold text that can be read, but got {error} ({path})") from None


@dataclass(frozen=True)
class TextColumn:
    """Reads documents from a column of a dataset: each row is one."""

    stored: sources.Stored
    column: str

    def __iter__(self) -> Iterator[str]:
        try:
            for batch in self.stored.select_columns(self.column).iter(batch_size=256):
                if not all(isinstance(text, str) for text in batch[self.column]):
                    raise ValueError("a row without text")
                yield from batch[self.column]
        except Exception as error:  # a stream breaks off in many ways
            got = f"{type(error).__name__}: {error}"
            raise OSError(f"Expected text to the end of column {self.column!r} of data.path, but got {got}") from None


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
        ValueError: If it is not clear which text is meant, or an argument does not apply to it.
    """
    folder = Path(path).expanduser()
    if path in ("pydocs", "stdlib"):
        if given := name or text_column or leave_out:
            raise ValueError(f"Expected no data.name, text_column or leave_out for {path!r}, but got {given!r}")
        documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        documents = _own_sources(set().union(*documents)) if path == "stdlib" else documents
        return TextSource({"train": documents}, json.dumps(documents))
    by_name = folder.exists() and not name and not sources.is_dataset(folder)
    files, left_out = _files(folder, leave_out) if by_name else ({}, [])
    if not files:
        return _dataset(path, name, text_column, leave_out, streaming)
    rows = {split: [*islice(sources.rows_of(each[0]), 100)] for split, each in files.items() if suffix(each[0]) in ROWS}
    if text_column and not rows:
        raise ValueError(f"Expected rows in data.path, as data.text_column is {text_column!r}, but got {path!r}")
    strings: dict[Split, list[str]] = {split: [] for split in rows}
    for split in rows:
        for key, cell in (item for row in rows[split] for item in row.items()):
            if len(files) == 1 and key.lower() in sources.SPLIT_COLUMNS and sources.split_of(str(cell)):
                raise ValueError(f"Expected a file for each split in data.path, but got splits in the column {key!r}")
            if isinstance(cell, str):
                strings[split].append(key)
    column = _text_column(strings, text_column)
    states = [(split, str(file.absolute()), file.stat()) for split, paths in files.items() for file in paths]
    # A copy or an archive cannot set a file's time of change (ctime).
    content = json.dumps([column, *((*named, state.st_size, state.st_ctime_ns) for *named, state in states)])
    texts = {split: TextFiles(paths, column) for split, paths in files.items()}
    return TextSource(texts, content, [file.relative_to(folder).as_posix() for file in left_out])


def _own_sources(characters: set[str]) -> list[str]:
    """Returns the first modules of the standard library, by name, that use these characters alone."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    allowed = [text for text in texts if characters.issuperset(text)]
    sizes = accumulate(map(len, allowed))
    return [text for text, size in zip(allowed, sizes, strict=True) if size <= SOURCE_CHARACTERS]


def _files(folder: Path, leave_out: Sequence[str]) -> tuple[dict[Split, list[Path]], list[Path]]:
    """Returns the files of each split, and the unused ones."""
    if folder.is_file():
        return {"train": [folder]}, []
    files = [file for file in sources.walk(folder) if file.is_file()]
    used = [file for file in files if suffix(file) in ROWS | TEXT]
    if any(suffix(file) in ROWS for file in used):
        used = [file for file in used if not ABOUT.match(file.name)]
    for pattern in leave_out:
        kept = [file for file in used if not _is_called(file.relative_to(folder), pattern)]
        if len(kept) == len(used):
            raise ValueError(f"Expected data.leave_out to name files or splits of data.path, but got {pattern!r}")
        used = kept
    of_split = sources.files_by_split(used, folder)
    for paths in of_split.values():
        if len(kinds := {suffix(path) if suffix(path) in ROWS else "text" for path in paths}) > 1:
            got = f"{sorted(kinds)}: leave some out (data.leave_out), such as '*.csv'"
            raise ValueError(f"Expected files of one kind for each split in data.path, but got {got}")
    assigned, _ = sources.assign_splits(of_split)
    splits = {split: of_split[name] for split, name in assigned.items() if of_split[name]}
    return splits, [file for file in files if not any(file in paths for paths in splits.values())]


def _is_called(path: Path, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (path.as_posix(), *path.parts, sources.stored_split(path) or ""))


def _dataset(path: str, name: str | None, column: str | None, leave_out: Sequence[str], streaming: bool) -> TextSource:
    streaming &= not Path(path).expanduser().exists()
    read = sources.read_stored(path, EXPECTED, name, streaming=streaming)
    found = read if streaming else sources.by_column(read)
    names, left_out = sources.assign_splits(found, leave_out)
    if not names:
        raise ValueError(f"Expected data.path to have splits such as 'train', 'val' and 'test', but got {left_out}")
    stored = {split: found[stored_name] for split, stored_name in names.items()}
    column = _text_column({split: _strings(rows) for split, rows in stored.items()}, column)
    # Only the hub knows the current content of a stream.
    identity = path if streaming else {split: rows._fingerprint for split, rows in stored.items()}
    documents = {split: TextColumn(rows, column) for split, rows in stored.items()}
    return TextSource(documents, json.dumps([streaming, column, name, names, identity]), left_out)


def _strings(stored: sources.Stored) -> list[str]:
    if stored.features is None:  # a stream of JSON, for example: its first row shows them
        return [name for name, cell in next(iter(stored), {}).items() if isinstance(cell, str)]
    kinds = ((name, getattr(feature, "dtype", None)) for name, feature in stored.features.items())
    return [name for name, kind in kinds if kind in ("string", "large_string")]


def _text_column(strings: Mapping[Split, Iterable[str]], given: str | None) -> str:
    """Returns the given column, or "text", or the only one, if all splits have it among their columns of strings."""
    for found in (dict.fromkeys(of_split) for of_split in strings.values()):
        given = sources.column_of("text_column", found, given or ("text" if "text" in found else None), found)
    return given or ""
