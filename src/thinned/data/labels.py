"""Classes by name: labels of any type become names, and names become the classes of a run.

Shapes: N examples, K classes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

LABEL_NAMES = ("label", "labels", "target", "class", "category")
ONE_HOT = "one-hot lists"
UNKNOWN = -1  # the class of an example whose label is hidden


@dataclass(frozen=True)
class Labels:
    """The labels of one stored split."""

    names: list[str]  # of all classes that are declared or occur
    codes: np.ndarray  # (N,) int64, places in `names`; -1 if the label is missing
    said: str = ""  # how labels that are no classes by declaration were read

    @property
    def hidden(self) -> bool:
        """Tells whether all labels are missing."""
        return not (self.codes >= 0).any()

    @property
    def used(self) -> list[str]:
        """The names that occur."""
        return [self.names[code] for code in np.unique(self.codes[self.codes >= 0])]


def label_column(features: datasets.Features, given: str | None) -> str | None:
    """Returns the given column, the only one of classes, or the only one that is called like a label; None if none is.

    Raises:
        ValueError: If the given column is not there or holds no labels, or if there is a choice.
    """
    scalars = (datasets.ClassLabel, datasets.Value)
    lists = (datasets.List, datasets.LargeList, datasets.Sequence)
    found = [
        name
        for name, feature in features.items()
        if isinstance(feature, scalars) or (isinstance(feature, lists) and isinstance(feature.feature, scalars))
    ]
    if given is None:
        classes = [name for name in found if isinstance(features[name], datasets.ClassLabel)]
        named = [name for name in found if name.lower() in LABEL_NAMES]
        found = classes or named
    if given in found or (given is None and len(found) <= 1):
        return given or next(iter(found), None)
    raise ValueError(
        f"Expected data.label_column to be one of the label columns {found}, but got {given!r} "
        f"(all columns: {list(features)})"
    )


def read_labels(stored: datasets.Dataset, column: str, split: str) -> Labels:
    """Reads the labels of a stored split. What is not declared as classes is sorted by value.

    Integers, booleans, whole numbers stored as floats, text and one-hot lists are labels. A label is missing if it is
    null, NaN, an empty text, or -1. (If -1 and 1 are the only integers, they are two classes.)

    Args:
        stored: The split.
        column: Column of the labels.
        split: Name of the split, for errors.

    Raises:
        ValueError: If there are no labels, or they are no classes.
    """
    if column not in stored.column_names or not len(stored):
        raise ValueError(
            f"Expected labels in column {column!r} of split {split!r} of data.path, "
            f"but got {len(stored)} rows of {stored.column_names}"
        )
    where = f"in column {column!r} of split {split!r} of data.path"
    values = stored.with_format("arrow", columns=[column])[:][column].combine_chunks()
    feature = stored.features[column]
    if isinstance(feature, datasets.ClassLabel):
        codes = _integers(values, UNKNOWN)
        wrong = codes[(codes < UNKNOWN) | (codes >= feature.num_classes)]
        if len(wrong):
            raise ValueError(
                f"Expected labels in [0, {feature.num_classes}) {where}, "
                f"but got {wrong[0]} ({len(wrong)} of {len(codes)} labels are out of range)"
            )
        return Labels(_normal(feature.names), codes)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        return _one_hot(values, where)
    if pa.types.is_boolean(values.type):
        return Labels(["False", "True"], _integers(values.cast(pa.int8()), UNKNOWN), "booleans")
    if pa.types.is_floating(values.type):
        whole = pc.if_else(pc.is_nan(values), None, values)
        broken = pc.filter(whole, pc.not_equal(whole, pc.round(whole)))
        if len(broken):
            raise ValueError(f"Expected classes {where}, but got the number {broken[0].as_py()}")
        values = whole.cast(pa.int64())
    if pa.types.is_integer(values.type):
        return _encoded(values, UNKNOWN, "integers")
    return _encoded(values.cast(pa.string()), "", "text")


def _integers(values: pa.Array, missing: int) -> np.ndarray:
    """Returns integers with a number instead of null, (N,) int64."""
    integers: np.ndarray = pc.fill_null(values.cast(pa.int64()), missing).to_numpy(zero_copy_only=False)
    return integers


def _encoded(values: pa.Array, missing: int | str, said: str) -> Labels:
    """Returns the labels whose classes are the values that occur, in ascending order."""
    distinct = pc.unique(values).drop_null().to_pylist()
    if sorted(distinct, key=str) != ["-1", "1"] and set(distinct) != {-1, 1}:
        distinct = [value for value in distinct if value != missing]
    ordered = sorted(distinct, key=_by_value(distinct))
    codes = _integers(pc.index_in(values, pa.array(ordered, values.type)), UNKNOWN)
    names = list(dict.fromkeys(_normal(map(str, ordered))))  # two forms of one name are one class
    place = np.array([*map(names.index, _normal(map(str, ordered))), UNKNOWN])
    return Labels(names, place[codes], said)


def _by_value(distinct: Sequence[int | str]):  # type: ignore[no-untyped-def]
    """Returns the key that sorts numbers, also those stored as text, by value, and other text as it is."""
    try:
        numbers = {value: float(value) for value in distinct}
    except ValueError:
        return str
    return lambda value: (numbers[value], str(value))


def _one_hot(values: pa.Array, where: str) -> Labels:
    flat = values.flatten().to_numpy(zero_copy_only=False)
    width = len(flat) // max(1, len(values))
    rows = flat.reshape(len(values), width) if len(flat) == width * len(values) else np.zeros((1, 1))
    if width < 2 or values.null_count or not ((rows == 1).sum(1) == 1).all() or not ((rows != 0).sum(1) == 1).all():
        raise ValueError(f"Expected one class for each example {where}, but got lists that are not one-hot")
    return Labels([str(index) for index in range(width)], rows.argmax(1).astype(np.int64), ONE_HOT)


def _normal(names: Iterable[str]) -> list[str]:
    """Returns names in one Unicode form, as file systems differ in theirs."""
    return [unicodedata.normalize("NFC", name) for name in names]


def match_names(labels: Labels, names: Sequence[str], split: str, of: str) -> Tensor:
    """Returns the classes of examples, matched by name: (N,) int64.

    Args:
        labels: The labels.
        names: Names of the K classes of the run.
        split: Name of the stored split, for the error.
        of: What has these classes, for the error.

    Raises:
        ValueError: If a name occurs that is not among the classes, or a label is missing.
    """
    if missing := int((labels.codes < 0).sum()):
        raise ValueError(
            f"Expected a label for each example of split {split!r} of data.path, or for none, but got none for "
            f"{missing} of {len(labels.codes)}"
        )
    if labels.said == ONE_HOT and labels.names != [*names]:
        raise ValueError(
            f"Expected labels with names for the classes of {of}, {shortened(names)}, in split {split!r} of data.path, "
            f"but got one-hot lists of length {len(labels.names)}"
        )
    place = {name: index for index, name in enumerate(names)}
    if unknown := [name for name in labels.used if name not in place]:
        raise ValueError(
            f"Expected the classes of {of}, {shortened(names)}, in split {split!r} of data.path, "
            f"but got {shortened(unknown)} among {shortened(labels.used)} (data.use_labels false reads no labels)"
        )
    table = np.array([place.get(name, UNKNOWN) for name in labels.names])
    return torch.from_numpy(table[labels.codes])


def shortened(names: Sequence[str]) -> str:
    """Returns a list of names as text, the first of many."""
    return f"[{', '.join(names[:20])}{f', ... {len(names)} in all' if len(names) > 20 else ''}]"
