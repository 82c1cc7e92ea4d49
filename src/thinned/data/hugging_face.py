"""Reads Hugging Face datasets: saved by `save_to_disk`, in a local folder, or on the hub.

Whatever cannot be found or read becomes one error that names the setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from thinned.data.split_names import SPLIT_COLUMNS, split_of

Stored = datasets.Dataset | datasets.IterableDataset


def fingerprint(stored: datasets.Dataset) -> str:
    """Returns what tells the content of a dataset from any other."""
    identity: str = stored._fingerprint
    return identity


def declares_its_files(folder: Path) -> bool:
    """Returns whether the README of a dataset says which files are in which split, as `datasets` reads it."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    return re.match(r"---\n(?:(?!---).*\n)*?configs:", readme.read_text(encoding="utf-8", errors="replace")) is not None


def sizes_of(paths: Iterable[Path]) -> str:
    """Returns the sizes of files, for the name of their cache: `datasets` knows a file by path and time of change."""
    return ",".join(str(path.stat().st_size) for path in paths)


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` has written this folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def read_hub(path: str, name: str | None, *, streaming: bool) -> Any:
    """Returns the splits of a dataset of the hub, or its cached copy if the hub cannot be reached."""
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(path, timeout=5)
    except HfHubHTTPError:
        pass  # the hub answers; load_dataset says what is wrong
    except Exception:  # the type differs between versions of the client, which has had three HTTP libraries
        # Without this, load_dataset repeats its requests for 23 seconds before it turns to the cache.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(path, name, streaming=streaming)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def read_stored(
    path: str, expected: str, name: str | None = None, *, streaming: bool = False, needs_train: bool = True
) -> dict[str, Any]:
    """Returns the stored splits of the dataset at `data.path`.

    Args:
        path: A folder, or the id of a dataset on the hub.
        expected: What `data.path` may be, for the error.
        name: Which of the dataset's configurations; None if it has one, or a default.
        streaming: Whether rows are read when they are needed, instead of downloaded or converted all at once.
        needs_train: Whether one of them must be called "train".

    Raises:
        FileNotFoundError: If there is no such dataset, or it cannot be read.
        ValueError: If it has no split "train".
    """
    folder = Path(path).expanduser()
    try:
        if is_saved(folder):
            stored = datasets.load_from_disk(folder)
        elif folder.is_dir():
            stored = datasets.load_dataset(str(folder), name, streaming=streaming)
        else:
            stored = read_hub(path, name, streaming=streaming)
    except Exception as error:  # of many types; the user needs to know which setting it is about
        cause = error.__cause__ or error
        raise FileNotFoundError(
            f"Expected data.path to be {expected}, but got {path!r} ({type(cause).__name__}: {cause})"
        ) from None
    splits = {"train": stored} if isinstance(stored, datasets.Dataset) else dict(stored)
    if needs_train and not any(split_of(name) == "train" for name in splits):
        raise ValueError(f"Expected data.path to have a split 'train', but got {list(splits)} in {path!r}")
    return splits


def by_column(
    splits: dict[str, datasets.Dataset], left_out: list[str]
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Returns the splits that a column names, if nothing else does, and what is left out."""
    stored, *others = splits.values()
    column = next((name for name in stored.column_names if name.lower() in SPLIT_COLUMNS), None)
    if others or column is None:
        return splits, left_out
    feature = stored.features[column]
    values = [feature.int2str(v) if isinstance(feature, datasets.ClassLabel) else str(v) for v in stored[column][:]]
    if not any(split_of(value) == "train" for value in values):
        return splits, left_out
    rows = {value: [row for row, each in enumerate(values) if each == value] for value in dict.fromkeys(values)}
    left_out += [
        f"{len(of_value)} rows of {column} {value!r}" for value, of_value in rows.items() if not split_of(value)
    ]
    return {value: stored.select(of_value) for value, of_value in rows.items() if split_of(value)}, left_out
