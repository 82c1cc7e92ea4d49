"""Folders of image files: which split and which class a file belongs to.

<split>/<class>/...   <class>/...   or images with a table (CSV, TSV, JSON, JSON lines) that names them in a column
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path, PurePath

import datasets
import PIL.Image

from thinned.data.labels import LABEL_NAMES
from thinned.data.split_names import SPLIT_COLUMNS, split_of, stored_split

TABLES = (".csv", ".tsv", ".json", ".jsonl")
NAMING = ("id", "image", "img", "file", "name", "path")
Columns = dict[str, list[object]]  # "image" holds paths, the others are labels


def is_image(path: Path) -> bool:
    """Returns whether a file has the suffix of an image that PIL can read."""
    return PIL.Image.registered_extensions().get(path.suffix.lower(), "") in PIL.Image.OPEN


def read_image_folder(
    root: Path, files: list[Path], label: str | None = None
) -> tuple[dict[str, datasets.Dataset], list[Path]]:
    """Reads the images below a folder.

    The folders at its top are splits if all of them are called like splits, or if there is one for training with
    folders in it; so are those within each class. Otherwise they are classes. A table has the split that its name, or
    its folder's, stands for.

    Args:
        root: The folder.
        files: All files below it.
        label: Column of the labels in tables, if it is not called like one.

    Returns:
        The images of each stored split with their labels, and the files that are left out.

    Raises:
        ValueError: If a table has labels, but does not say which images they belong to.
    """
    images = [path for path in files if is_image(path)]
    root = _folder_of_splits(root, images)
    parts = {path: path.relative_to(root).parts for path in images}
    if parts and all(len(part) > 2 and split_of(part[1]) for part in parts.values()):  # <class>/<split>
        parts = {path: (part[1], part[0], *part[2:]) for path, part in parts.items()}
    words = {part[0]: stored_split(PurePath(part[0]), in_words=True) for part in parts.values()}
    within = all(len(part) > 2 for part in parts.values())
    if all(words.values()) and within and not all(map(split_of, words)):  # train_images/<class>
        parts = {path: (words[part[0]] or "", *part[1:]) for path, part in parts.items()}
    tops = {part[0] for part in parts.values() if len(part) > 1}
    nested = any(len(part) > 2 and split_of(part[0]) == "train" for part in parts.values())
    by_folder = nested or (bool(tops) and all(map(split_of, tops)))
    top = {path: part[0] if by_folder and len(part) > 1 else "train" for path, part in parts.items()}

    splits: dict[str, Columns] = {}
    tables: set[object] = set()
    for path in files:
        if path.suffix.lower() in TABLES and (columns := _read_table(path, images, label)):
            tables.add(str(path))
            for stored, of_split in _by_split(path.relative_to(root), columns, top if by_folder else {}).items():
                _add(splits.setdefault(stored, {}), of_split, path)
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
    """Returns the folder with splits or classes: while there is one folder with others in it, such as data/, that."""
    while images:
        parts = [path.relative_to(root).parts for path in images]
        if len({part[0] for part in parts}) > 1 or not all(len(part) > 2 for part in parts) or split_of(parts[0][0]):
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


def _by_split(table: Path, columns: Columns, top: dict[Path, str]) -> dict[str, Columns]:
    """Returns the rows of a table by split: that of its name or its folder, else those of the folders of its images."""
    if name := stored_split(table, in_words=True):
        return {name: columns}
    splits: dict[str, Columns] = defaultdict(lambda: defaultdict(list))
    for row, path in enumerate(columns["image"]):
        for key, values in columns.items():
            splits[top.get(Path(str(path)), "train")][key].append(values[row])
    return splits


def _add(columns: Columns, more: Columns, table: Path) -> None:
    """Adds the rows of another table of the same split; ValueError if an image is in both, or the columns differ."""
    if columns and (columns.keys() != more.keys() or not set(columns["image"]).isdisjoint(more["image"])):
        raise ValueError(
            f"Expected one table of labels for each image in data.path, but got {table.name} beside another: remove one"
        )
    for key, values in more.items():
        columns.setdefault(key, []).extend(values)


def _rows_of(path: Path) -> dict[str, list[object]] | None:
    """Returns the columns of a table, text as it is; None if the file holds something else."""
    suffix, content = path.suffix.lower(), path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if suffix in (".json", ".jsonl"):
        try:
            found = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
        except ValueError:
            return None
        if isinstance(found, dict) and all(isinstance(value, list) for value in found.values()):
            return dict(found) if len(set(map(len, found.values()))) == 1 else None
        if isinstance(found, dict):  # labels by file
            return {"file": list(found), "label": list(found.values())}
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            return None
        return {key: [row.get(key) for row in found] for key in dict.fromkeys(key for row in found for key in row)}
    lines = text.splitlines()
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    header, *rows = csv.reader(lines, delimiter=delimiter)
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"Expected {len(header)} cells in each row of {path}, but got {len(row)} in row {number}")
    return {key: [row[i] for row in rows] for i, key in enumerate(header)}


def _read_table(path: Path, images: list[Path], label: str | None) -> Columns | None:
    """Returns the columns of a table, with paths in place of the names of images; None if it says nothing of them."""
    table = _rows_of(path)
    if not table:
        return None
    by_name: dict[str, set[Path]] = defaultdict(set)
    by_stem: dict[str, set[Path]] = defaultdict(set)
    for image in images:
        by_stem[image.stem].add(image)
        for key in (image.as_posix(), *("/".join(image.parts[depth:]) for depth in range(1, len(image.parts)))):
            by_name[key].add(image)
    column, found = "", list[set[Path]]()
    for each in table:
        # Numbers may be anything, so that they name images only if their column is called like it.
        known = by_name | by_stem if any(word in each.lower() for word in NAMING) else by_name
        images_of = [known.get(str(name).replace("\\", "/").removeprefix("./"), set()) for name in table[each]]
        if sum(map(bool, images_of)) > sum(map(bool, found)):
            column, found = each, images_of
    has_labels = any(key == label or key.lower() in (*LABEL_NAMES, *SPLIT_COLUMNS) for key in table)
    if not has_labels and (2 * sum(map(bool, found)) <= len(found) or len({image.parent for image in images}) > 1):
        return None
    unclear = [(name, len(paths)) for name, paths in zip(table.get(column, ()), found, strict=True) if len(paths) != 1]
    if unclear or not found:
        name, number = unclear[0] if unclear else (list(table), "no column with their names")
        raise ValueError(
            f"Expected data.path to hold each image that {path.name} names, but got {number} of {name!r} "
            f"(and {max(0, len(unclear) - 1)} more such names)"
        )
    columns = {key: values for key, values in table.items() if key != column}
    return columns | {"image": [str(path) for paths in found for path in paths]}


def _dataset(columns: Columns) -> datasets.Dataset:
    """Returns a dataset of images that are not read yet, and of their labels."""
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
