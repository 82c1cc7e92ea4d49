"""Which files are stored, and which split is which, by its name: the same rules for images and for text."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import TypeVar, get_args

from thinned.data.order import Split

SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train",
    "validation": "val", "valid": "val", "val": "val", "dev": "val", "eval": "val", "evaluation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

SPLIT_COLUMNS = ("split", "subset", "partition")  # may hold the name of each row's split

NAMES, SHARD = "|".join(SPLIT_NAMES), r"(?:[-_.]?\d+(?:-of-\d+)?)?"
# The name of a split alone, between dots or with the number of a shard: wiki.train.tokens, train-00000-of-00002.csv
IN_FILE_NAME = re.compile(rf"(?:^|\.)({NAMES}){SHARD}(?:\.|$)", re.IGNORECASE)
# The first or last word of a file name, which may as well be a part of a title.
IN_WORDS = re.compile(rf"^({NAMES})[-_ ]|[-_ ]({NAMES}){SHARD}(?:\.|$)", re.IGNORECASE)

Name = TypeVar("Name", bound=str)


def walk(folder: Path) -> Iterator[Path]:
    """Yields visible files below a folder in the order of their names; a linked folder is followed once, and last."""
    seen = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            folders.clear()
            continue
        seen.add(real)
        visible = (name for name in folders if not name.startswith((".", "__MACOSX")))
        folders[:] = sorted(visible, key=lambda name: (os.path.islink(os.path.join(directory, name)), name))
        yield from (Path(directory, name) for name in sorted(files) if not name.startswith("."))


def split_of(name: str) -> Split | None:
    """Returns the split that a name stands for, in any case; None if it is not the name of a split.

    >>> split_of("Dev"), split_of("unsupervised")
    ('val', None)
    """
    return SPLIT_NAMES.get(name.lower())


def stored_split(path: PurePath, *, in_words: bool = False) -> str | None:
    """Returns the name of a split in the path of a file: of the outermost folder that has one, or else of the file.

    Args:
        path: The path, relative to that of the data.
        in_words: Whether the first or last word of the file's name counts too.

    >>> [stored_split(PurePath(path)) for path in ("data/Valid/a.txt", "ptb.train.txt", "dev-00000-of-00002.jsonl")]
    ['valid', 'train', 'dev']
    >>> [stored_split(PurePath("my_test.txt"), in_words=in_words) for in_words in (False, True)]
    [None, 'test']
    """
    patterns = [IN_FILE_NAME, IN_WORDS] if in_words else [IN_FILE_NAME]
    in_name = (name for pattern in patterns for found in pattern.finditer(path.name) for name in found.groups() if name)
    found = next((part for part in path.parts[:-1] if split_of(part)), None) or next(in_name, None)
    return found and found.lower()


def assign_splits(names: Iterable[Name], leave_out: Iterable[str] = ()) -> tuple[dict[Split, Name], list[Name]]:
    """Assigns stored names to splits.

    Args:
        names: Names of what is stored.
        leave_out: Names that are not to be used.

    Returns:
        The stored name of each split, that of training first, and the names that are of no split.

    Raises:
        ValueError: If two names stand for one split, or a name to leave out is not there.

    >>> assign_splits(["Train", "dev", "extra"])
    ({'train': 'Train', 'val': 'dev'}, ['extra'])
    """
    names, others = list(names), list[Name]()
    splits: dict[Split, Name] = {}
    for name in leave_out:
        if name not in names:
            raise ValueError(f"Expected data.leave_out to name stored splits {names}, but got {name!r}")
    for name in names:
        split = split_of(name)
        if name in leave_out or split is None:
            others.append(name)
        elif split in splits:
            raise ValueError(
                f"Expected one stored split for {split} in data.path, but got {splits[split]!r} and {name!r}: name the "
                "one that is not to be used in data.leave_out"
            )
        else:
            splits[split] = name
    return {split: splits[split] for split in get_args(Split) if split in splits}, others
