"""Folders of image files: which split and which class a file belongs to.

<split>/<class>/...   <class>/...   or images with a table (CSV, TSV, JSON, JSON lines) that names them in a column
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from thinned.data.split_names import split_of

TABLES = (".csv", ".tsv", ".json", ".jsonl")
NAMING = ("id", "image", "img", "file", "name", "path")
Columns = dict[str, list[object]]  # "image" holds paths, the others are labels


def walk(folder: Path) -> Iterator[Path]:
    """Yields all visible files below a folder in the order of their paths. A linked folder is followed once."""
    seen = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(directory, name) for name in sorted(files) if not name.startswith("."))


def is_image(path: Path) -> bool:
    """Returns whether a file has the suffix of an image that PIL can read."""
    return PIL.Image.registered_extensions().get(path.suffix.lower(), "") in PIL.Image.OPEN


def read_image_folder(root: Path, files: list[Path]) -> tuple[dict[str, datasets.Dataset], list[Path]]:
    """Reads the images below a folder.

    The folders at its top are splits if all of them are called like splits, or if there is one for training with
    folders in it. Otherwise they are classes. A table has the split that its name, or its folder's, stands for.

    Args:
        root: The folder.
        files: All files below it.

    Returns:
        The images of each stored split with their labels, and the files that are left out.

    Raises:
        ValueError: If a table names an image that is not there.
    """
    images = [path for path in files if is_image(path)]
    root = _folder_of_splits(root, images)
    parts = {path: path.relative_to(root).parts for path in images}
    tops = {part[0] for part in parts.values() if len(part) > 1}
    nested = any(len(part) > 2 and split_of(part[0]) == "train" for part in parts.values())
    by_folder = nested or (bool(tops) and all(map(split_of, tops)))
    top = {path: part[0] if by_folder and len(part) > 1 else "train" for path, part in parts.items()}

    splits: dict[str, Columns] = {}
    tables: set[object] = set()
    for path in files:
        if path.suffix.lower() in TABLES and (columns := _read_table(path, images)):
            places = (path.stem, *path.relative_to(root).parts[:-1])
            stored = next((place for place in places if split_of(place)), "train")
            splits[stored] = columns
            tables.add(str(path))
    if not splits:
        splits = _by_class({path: part[by_folder:] for path, part in parts.items()}, top)
    else:
        for name in tops if by_folder else ():
            if split_of(name) not in map(split_of, splits):  # no table, so no labels
                splits[name] = {"image": [str(path) for path in images if top[path] == name]}
    used = tables.union(*(columns["image"] for columns in splits.values()))
    left_out = [path for path in files if str(path) not in used]
    return {name: _dataset(columns) for name, columns in splits.items()}, left_out


def _folder_of_splits(root: Path, images: list[Path]) -> Path:
    """Returns the folder with the splits, if it is the only one at the top of `root`, such as data/."""
    while images:
        parts = [path.relative_to(root).parts for path in images]
        if len({part[0] for part in parts}) > 1 or not all(len(part) > 2 and split_of(part[1]) for part in parts):
            break
        root /= parts[0][0]
    return root


def _by_class(folders: dict[Path, tuple[str, ...]], split: dict[Path, str]) -> dict[str, Columns]:
    """Returns images by split, with the folder in which they lie as their class; loose ones only if there are none."""
    in_folder = {path for path, (*folder, _) in folders.items() if folder}
    splits: dict[str, Columns] = defaultdict(lambda: defaultdict(list))
    with_classes = {split[path] for path in in_folder}
    for path, (*folder, _) in folders.items():
        if folder or split[path] not in with_classes:
            splits[split[path]]["image"].append(str(path))
            if folder:
                splits[split[path]]["label"].append(folder[0])
    return splits


def _read_table(path: Path, images: list[Path]) -> Columns | None:
    """Returns the columns of a table, with paths in place of the names of images; None if it names none."""
    try:
        if path.suffix.lower() == ".json":
            table = pa.Table.from_pylist(json.loads(path.read_text(encoding="utf-8-sig")))
        elif path.suffix.lower() == ".jsonl":
            table = pyarrow.json.read_json(path)
        else:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter))
    except (AttributeError, TypeError, ValueError):  # JSON, for example, that is no table
        return None
    by_name: dict[str, set[Path]] = defaultdict(set)
    by_stem: dict[str, set[Path]] = defaultdict(set)
    for image in images:
        if image.is_relative_to(path.parent):
            by_stem[image.stem].add(image)
            for name in (image.name, image.relative_to(path.parent).as_posix()):
                by_name[name].add(image)
    for column in table.column_names:
        # Numbers may be anything, so that they name images only if their column is called like it.
        known = by_name | by_stem if any(word in column.lower() for word in NAMING) else by_name
        names = [str(name).removeprefix("./") for name in table[column].to_pylist()]
        unclear = [name for name in names if len(known.get(name, ())) != 1]
        if 2 * len(unclear) < len(names):
            if unclear:
                number = len(known.get(unclear[0], ()))
                raise ValueError(
                    f"Expected data.path to hold each image that {path.name} names, but got {number} of {unclear[0]!r} "
                    f"(and {len(unclear) - 1} more such names)"
                )
            columns: Columns = table.drop_columns([column]).to_pydict()
            return columns | {"image": [str(path) for name in names for path in known[name]]}
    return None


def _dataset(columns: Columns) -> datasets.Dataset:
    """Returns a dataset of images that are not read yet, and of their labels."""
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
