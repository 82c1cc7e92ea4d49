"""Turns labels of any type into names of classes, and names into indices from 0 to K - 1.

Shapes: N examples, K classes.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from thinned.data.sources import column_of

LABEL_NAMES = ("label", "labels", "target", "class", "category")
UNKNOWN = -1  # the class of an example whose label is hidden


class Labels(NamedTuple):
    """Holds the labels of one stored split."""

    names: list[str]  # of all classes that are declared or occur
    codes: np.ndarray  # (N,) int64, places in `names`; -1 if the label is missing


def label_column(features: datasets.Features, given: str | None) -> str | None:
    """Returns the given column, or the only one of classes, or the only one with the name of a label."""
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel | datasets.Value)]
    if given is None:
        classes = [name for name in found if isinstance(features[name], datasets.ClassLabel)]
        found = classes or [name for name in found if name.lower() in LABEL_NAMES]
    return column_of("label_column", found, given, features) if given or found else None


def read_labels(stored: datasets.Dataset, column: str, split: str) -> Labels:
    """Reads the labels of a stored split. Without declared classes, the labels are sorted by value.

    Integers, booleans, whole numbers stored as floats, and text are labels. A label is missing if it is null, NaN, an
    empty text, or -1. (If -1 and 1 are the only integers, they are two classes.)

    Raises:
        ValueError: If there are no labels, or they are no classes.
    """
    where = f"in column {column!r} of split {split!r} of data.path"
    if column not in stored.column_names or not len(stored):
        raise ValueError(f"Expected labels {where}, but got {len(stored)} rows of {stored.column_names}")
    stored_values, feature = stored.with_format("arrow", columns=[column])[:][column], stored.features[column]
    kind = stored_values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        stored_values = stored_values.cast(pa.string())  # bytes and dates too
    values = stored_values.to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        codes = np.array([UNKNOWN if value is None else value for value in values])
        if len(wrong := codes[(codes < UNKNOWN) | (codes >= feature.num_classes)]):
            raise ValueError(f"Expected labels in [0, {feature.num_classes}) {where}, but got {wrong[0]}")
        return Labels([*map(_normal, feature.names)], codes)
    distinct = {value for value in values if value is not None and value == value}  # NaN is missing
    if broken := [value for value in distinct if isinstance(value, float) and value % 1]:
        raise ValueError(f"Expected classes {where}, but got the number {broken[0]}")
    if distinct != {-1, 1}:
        distinct -= {"", -1}
    try:
        ordered = sorted(distinct, key=lambda value: (float(value), str(value)))  # numbers as text are numbers
    except ValueError:
        ordered = sorted(distinct)
    name_of = {value: _normal(int(value) if isinstance(value, float) else value) for value in ordered}
    names = list(dict.fromkeys(name_of.values()))  # two forms of one name are one class
    place = {value: names.index(name) for value, name in name_of.items()}
    return Labels(names, np.array([place.get(value, UNKNOWN) for value in values]))


def _normal(name: object) -> str:
    """Returns a name in one Unicode form, since file systems differ."""
    return unicodedata.normalize("NFC", str(name))


def match_names(labels: Labels, names: Sequence[str], split: str, of: str) -> np.ndarray:
    """Returns the class of each example of a stored split, (N,) int64: its place among the K class names of a run.

    Raises:
        ValueError: If a label is missing, or its name is not among the classes `of` the run.
    """
    if missing := int((labels.codes < 0).sum()):
        of = f"split {split!r} of data.path, or for none, but got none for {missing} of {len(labels.codes)}"
        raise ValueError(f"Expected a label for each example of {of}")
    place = {name: index for index, name in enumerate(names)}
    used = [labels.names[code] for code in np.unique(labels.codes)]
    if unknown := [name for name in used if name not in place]:
        raise ValueError(
            f"Expected the classes of {of}, {shortened(names)}, in split {split!r} of data.path, "
            f"but got {shortened(unknown)} among {shortened(used)} (data.use_labels false reads no labels)"
        )
    return np.array([place.get(name, UNKNOWN) for name in labels.names])[labels.codes]


def shortened(names: Sequence[str]) -> str:
    """Returns a list of names as text, at most 20."""
    return f"[{', '.join(names[:20])}{f', ... {len(names)} in all' if len(names) > 20 else ''}]"
