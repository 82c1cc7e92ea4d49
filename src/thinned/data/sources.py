"""Finds stored data and their splits, by the same rules for images and for text."""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, get_args

import datasets
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from thinned.data.order import Split

Stored = datasets.Dataset | datasets.IterableDataset
SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train",
    "validation": "val", "valid": "val", "val": "val", "dev": "val", "eval": "val", "evaluation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
SPLIT_COLUMNS = ("split", "subset", "partition")  # columns that may hold the split of a row
PROGRAMS = (  # and settings: train.py is no split
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".js", ".ts", ".css", ".sh",
    ".sql", ".lua", ".toml", ".yaml", ".yml", ".ini", ".cfg",
)  # fmt: skip
NAMES = "|".join(SPLIT_NAMES)
# The name of a split between dots, or with the number of a shard: wiki.train.tokens, train-00000-of-00002.csv
IN_FILE_NAME = re.compile(rf"(?:^|\.)({NAMES})(?:[-_.]?\d+(?:-of-\d+)?)?(?:\.|$)", re.IGNORECASE)
WORD = re.compile(rf"(?<![a-z])({NAMES})(?![a-z])", re.IGNORECASE)  # it may as well be part of a title
OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
csv.field_size_limit(sys.maxsize)


def suffix(path: PurePath) -> str:
    """Returns the suffix of a file's name, in lower case and without that of a compression: ".txt" for a.TXT.gz."""
    return (path.with_suffix("") if path.suffix.lower() in OPEN else path).suffix.lower()


def walk(folder: Path) -> list[Path]:
    """Returns the visible files below a folder, by name. A linked folder is followed once."""
    files, seen = list[Path](), set[str]()
    for directory, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        files += [Path(directory, name) for name in names if not name.startswith(".")]
    return sorted(files, key=Path.as_posix)


def rows_of(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields rows of CSV (all cells are text), JSON, JSON lines, or columns of parquet; ValueError for other files."""
    try:
        for row in _rows(path, columns):
            if not isinstance(row, dict):
                raise TypeError("no rows")
            yield row
    except Exception as error:  # each kind of file has errors of its own
        raise ValueError(f"Expected data.path to hold rows that can be read, but got {error} ({path})") from None


def _rows(path: Path, columns: list[str] | None) -> Iterator[Any]:
    kind = suffix(path)
    if kind == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(columns=columns):
            yield from batch.to_pylist()
        return
    with OPEN.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind == ".json":
            yield from json.load(file)
        elif kind in (".jsonl", ".ndjson"):
            yield from (json.loads(line) for line in file if line.strip())
        else:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            rows = csv.reader(file, delimiter=separator)
            header = next(rows, [])
            for row in filter(None, rows):
                if len(row) != len(header):
                    cells = f"{len(row)} cells instead of {len(header)}"
                    raise ValueError(f"{cells} in line {rows.line_num}: quote its text")
                yield dict(zip(header, row, strict=True))


def split_of(name: str) -> Split | None:
    """Returns the split that a name stands for, in any case; None if it is not the name of a split.

    >>> split_of("Dev"), split_of("unsupervised")
    ('val', None)
    """
    return SPLIT_NAMES.get(name.lower())


def stored_split(path: PurePath) -> str | None:
    """Returns the name of a split in a relative path: that of the outermost folder with one, or else of the file.

    >>> [stored_split(PurePath(path)) for path in ("data/Valid/a.txt", "ptb.train.txt", "dev-00000-of-00002.jsonl")]
    ['valid', 'train', 'dev']
    """
    for part in path.parts[:-1]:
        if split_of(part):
            return part.lower()
    found = IN_FILE_NAME.search(path.name)
    return found[1].lower() if found and suffix(path) not in PROGRAMS else None


def files_by_split(files: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Returns files by split if one is for training or all have a split; otherwise, all of them for training."""
    names = {file: stored_split(file.relative_to(root)) for file in files}
    found = sorted({name for name in names.values() if name})
    if all(names.values()) or any(split_of(name) == "train" for name in found):
        return {name: [file for file in names if names[file] == name] for name in found}
    refuse_words(file.name for file in names if suffix(file) not in PROGRAMS)
    return {"train": [*names]}


def refuse_words(names: Iterable[str]) -> None:
    """Raises a ValueError for names that contain a split as a word, such as train_data: they may be titles."""
    words = {split_of(word): name for name in names for word in WORD.findall(name)}
    if "train" in words and len(words) > 1:
        expected = "files or folders of splits in data.path to be called train, valid and test"
        got = f"names such as {words['train']}: rename them, or leave some out (data.leave_out)"
        raise ValueError(f"Expected {expected}, but got {got}")


def assign_splits(names: Iterable[str], leave_out: Iterable[str] = ()) -> tuple[dict[Split, str], list[str]]:
    """Returns the stored name of each split, training first, and the names that are no split.

    Raises:
        ValueError: If two names stand for one split, or a name to leave out is missing.

    >>> assign_splits(["Train", "dev", "extra"])
    ({'train': 'Train', 'val': 'dev'}, ['extra'])
    """
    names = list(names)
    if missing := [name for name in leave_out if name not in names]:
        raise ValueError(f"Expected data.leave_out to name stored splits {names}, but got {missing[0]!r}")
    splits: dict[Split, str] = {}
    for split in get_args(Split):
        found = [name for name in names if split_of(name) == split and name not in leave_out]
        if len(found) > 1:
            got = f"{found[0]!r} and {found[1]!r}: leave one out (data.leave_out)"
            raise ValueError(f"Expected one stored split for {split} in data.path, but got {got}")
        if found:
            splits[split] = found[0]
    return splits, [name for name in names if name not in splits.values()]


def column_of(key: str, found: Collection[str], given: str | None, columns: Iterable[str]) -> str:
    """Returns the given column, or else the only one found; ValueError if it is missing or there are several."""
    if given in found or (given is None and len(found) == 1):
        return given or next(iter(found))
    got = f"{given!r} (all columns: {[*columns]})"
    raise ValueError(f"Expected data.{key} to be one of the columns {[*found]}, but got {got}")


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` has written a folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def is_dataset(folder: Path) -> bool:
    """Returns whether `datasets` knows the splits of a folder: it saved them, or the README declares them."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    return is_saved(folder) or re.match(r"---\n(?:(?!---).*\n)*?configs:", text) is not None


def read_stored(path: str, expected: str, name: str | None = None, *, streaming: bool = False) -> dict[str, Any]:
    """Returns the stored splits of a dataset in a folder, on the hub, or in its cache if the hub cannot be reached.

    `path`, `name` and `streaming` are settings of the data. `expected` says what the path may be, for the message of
    the FileNotFoundError if no dataset can be read.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        try:
            HfApi().dataset_info(path, timeout=5)
        except (HfHubHTTPError, HFValidationError):
            pass  # load_dataset reports what is wrong
        except Exception:  # the type differs between versions of the client
            datasets.config.HF_HUB_OFFLINE = True  # else load_dataset tries for 23 seconds before it turns to the cache
    try:
        if is_saved(folder):
            stored = datasets.load_from_disk(folder)
        else:
            stored = datasets.load_dataset(str(folder) if folder.is_dir() else path, name, streaming=streaming)
    except Exception as error:  # of many types; the message names the setting
        cause = error.__cause__ or error
        got = f"{path!r} ({type(cause).__name__}: {cause})"
        raise FileNotFoundError(f"Expected data.path to be {expected}, but got {got}") from None
    return {"train": stored} if isinstance(stored, datasets.Dataset) else dict(stored)


def by_column(splits: Mapping[str, datasets.Dataset]) -> Mapping[str, datasets.Dataset]:
    """Returns the splits that a column names, if nothing else names any and one is for training."""
    stored, *others = splits.values()
    column = next((name for name in stored.column_names if name.lower() in SPLIT_COLUMNS), None)
    if others or column is None:
        return splits
    feature = stored.features[column]
    values = [feature.int2str(v) if isinstance(feature, datasets.ClassLabel) else str(v) for v in stored[column][:]]
    if not any(split_of(value) == "train" for value in values):
        return splits
    rows = {value: [row for row, each in enumerate(values) if each == value] for value in dict.fromkeys(values)}
    return {value: stored.select(of_value) for value, of_value in rows.items()}
