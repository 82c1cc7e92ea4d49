"""Reads documents from Python's own documentation, text files or a Hugging Face dataset.

"pydocs" is the text of `help()` topics, `pydoc_data.topics` in CPython: half a megabyte of English that every
installation has.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from thinned.data.hugging_face import Stored, fingerprint, is_saved, read_stored

PROSE = ".txt .text .md .rst .tex .org .html .htm .xml"
CODE = ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .js .ts .css .sh .sql .lua"
SETTINGS = ".toml .yaml .yml .ini .cfg"
TEXT_SUFFIXES = frozenset(f"{PROSE} {CODE} {SETTINGS}".split())
DATASET_SUFFIXES = (".parquet", ".arrow", ".jsonl")
STORED_NAMES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
EXPECTED = "'pydocs', a text file, a folder of text files, the folder of a dataset or its id on the Hugging Face Hub"


@dataclass(frozen=True)
class TextSource:
    """Documents by split."""

    splits: dict[str, Iterable[str]]  # "train", and "val" and "test" if they are stored; each can be read again
    content: str  # differs between sources of different text
    label: str  # for people; it can be part of a file name


@dataclass(frozen=True)
class TextFiles:
    """Each file is a document."""

    paths: list[Path]

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            content = _read(path)
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"Expected data.path to hold UTF-8, but got the byte 0x{content[error.start]:02x} at offset "
                    f"{error.start} of {path}"
                ) from None

    def digest(self, root: Path) -> str:
        """Returns a digest of names and contents."""
        digest = hashlib.sha256()
        for path in self.paths:
            content = _read(path)
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()  # reading as text would change the newlines
    except OSError as error:
        raise OSError(f"Expected data.path to hold files that can be read, but got {error}") from None


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
    path: str, name: str | None = None, text_column: str | None = None, *, streaming: bool = False
) -> TextSource:
    """Returns the documents at `data.path`; the arguments are those of `TextDataModule`.

    Raises:
        FileNotFoundError: If nothing can be read.
        ValueError: If there is no text, or an argument does not apply to it.
    """
    folder = Path(path).expanduser()
    if folder.suffix in DATASET_SUFFIXES and folder.is_file():
        raise ValueError(f"Expected data.path to be the folder of a dataset, not one of its files, but got {path!r}")
    if path == "pydocs":
        topics = pydoc_data.topics.topics
        documents = [topics[key] for key in sorted(topics)]
        source = TextSource({"train": documents}, hashlib.sha256(json.dumps(documents).encode()).hexdigest(), path)
    elif paths := _text_files(folder):
        if not any(file.stat().st_size for file in paths):
            raise ValueError(f"Expected text in data.path, but got nothing in {str(folder)!r}")
        files = TextFiles(paths)
        source = TextSource({"train": files}, files.digest(folder), folder.resolve().stem)
    else:
        return _dataset_source(path, name, text_column, streaming=streaming)
    for key, value in (("name", name), ("text_column", text_column), ("streaming", streaming)):
        if value:
            raise ValueError(
                f"Expected data.path to be the folder of a dataset or its id on the Hugging Face Hub, as data.{key} is "
                f"{value!r}, but got {path!r}"
            )
    return source


def _text_files(folder: Path) -> list[Path]:
    """Returns the text files below a folder by relative path, or the path if it is a file; none if it is a dataset."""
    if folder.is_file():
        return [folder]
    paths = [path for path in folder.rglob("*") if path.is_file()]
    if is_saved(folder) or any(path.suffix in DATASET_SUFFIXES for path in paths):
        return []
    texts = (path.relative_to(folder) for path in paths if path.suffix.lower() in TEXT_SUFFIXES)
    visible = [path for path in texts if not any(part.startswith(".") for part in path.parts)]
    return [folder / path for path in sorted(visible, key=Path.as_posix)]


def _dataset_source(path: str, name: str | None, text_column: str | None, *, streaming: bool) -> TextSource:
    stored = read_stored(path, EXPECTED, name, streaming=streaming)
    column = _text_column(stored["train"], text_column)
    columns = {}
    for split, stored_names in STORED_NAMES.items():
        stored_name = next((each for each in stored_names if each in stored), None)
        if stored_name:
            columns[split] = TextColumn(stored[stored_name], column, stored_name)
            found = _string_columns(stored[stored_name])
            if column not in found:
                raise ValueError(f"Expected a column {column!r} in split {stored_name!r} of data.path, but got {found}")
    folder = Path(path).expanduser()
    content: list[Any] = [streaming, column, name]
    if not streaming:
        content += [[split, fingerprint(documents.stored)] for split, documents in columns.items()]
    elif folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        content += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:  # only the hub knows its current content
        content += [path]
    label = folder.resolve().stem if folder.is_dir() else path.replace("/", "-")
    return TextSource(dict(columns), json.dumps(content), f"{label}-{name}" if name else label)


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
