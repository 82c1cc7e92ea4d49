"""Which stored images each split has, in training and later: a fact that the checkpoint keeps.

A stored split is used as it is. Without a stored test, the stored validation is the test. What is still missing is
taken from the stored "train" by content. Later, the examples are split as the checkpoint says if it was trained on some
of them; otherwise each split is the whole set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from thinned.data.content_split import digest, shared, sketch, split_by_content
from thinned.data.order import Split
from thinned.data.sources import split_of

KNOWN = 0.1  # from this share of the training examples on, a set is that of the training
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Arrangement:
    """Which examples of what is stored each split has."""

    sources: dict[Split, tuple[str, ...]]  # the stored splits of each split, one after another
    rows: dict[Split, np.ndarray]  # of their examples, (n,)
    facts: dict[str, Any] | None  # for a checkpoint, as primitives; None if the set is another one than was trained on


def arrange(
    hashes: Mapping[str, np.ndarray],
    assigned: Mapping[Split, str],
    asked: Mapping[str, Any],
    trained: dict[str, Any] | None = None,
) -> Arrangement:
    """Assigns examples to splits.

    Args:
        hashes: Hash of each example of each stored split, (N,) uint64.
        assigned: Names of the stored splits by what they are.
        asked: `split_seed`, `val_fraction` and `test_fraction`.
        trained: The facts of a checkpoint; None in training.

    Raises:
        ValueError: If a split is empty, or a stored split has gone or has got examples of the training.
    """
    if trained is None:
        test = assigned.get("test", assigned.get("val", assigned["train"]))
        val = assigned.get("val", test)
        stored = {"train": assigned["train"], "val": val if val != test else assigned["train"], "test": test}
    elif not _is_trained_on(trained, everything := np.concatenate([*hashes.values()])):
        rank_zero_info(f"data.path is another set than that of the training, so all {len(everything)} are predicted")
        whole = np.arange(len(everything))
        return Arrangement(dict.fromkeys(SPLITS, tuple(hashes)), dict.fromkeys(SPLITS, whole), None)
    else:
        now = {split_of(name) or name: name for name in hashes}  # they may be called otherwise by now
        if missing := [name for name in trained["stored"].values() if (split_of(name) or name) not in now]:
            raise ValueError(f"Expected the stored splits of the training in data.path, but got no {missing[0]!r}")
        stored = {split: now[split_of(name) or name] for split, name in trained["stored"].items()}
    drawn = [split for split in SPLITS[1:] if stored[split] == stored["train"]]
    keys = ["split_seed", *(f"{split}_fraction" for split in drawn)] if drawn else []
    settings = {key: (trained or asked)[key] for key in keys}
    for key in keys:
        if settings[key] != asked[key]:
            rank_zero_info(f"The split is that of the training: data.{key} is {settings[key]}, not {asked[key]}")
    fractions = {split: settings.get(f"{split}_fraction", 0.0) for split in SPLITS[1:]}
    parts = split_by_content(hashes[stored["train"]], settings.get("split_seed", 0), **fractions)
    rows = {s: parts[s] if stored[s] == stored["train"] else np.arange(len(hashes[stored[s]])) for s in SPLITS}
    of_split = {split: hashes[stored[split]][rows[split]] for split in SPLITS}
    for split, examples in of_split.items():
        if trained is None and not len(examples):
            raise ValueError(
                f"Expected examples for {split}, but got none of the {len(hashes[stored[split]])} in split "
                f"{stored[split]!r} of data.path: choose other fractions or another data.split_seed"
            )
        if split not in ("train", *drawn) and (twice := int(np.isin(examples, of_split["train"]).sum())):
            rank_zero_info(f"{twice} of {len(examples)} examples for {split} are in the training split too")
    drawn_of = sketch(of_split["train"])
    overlap = {split: shared((trained or {"sketch": drawn_of})["sketch"], of_split[split]) for split in SPLITS[1:]}
    if trained and (moved := [split for split in overlap if overlap[split] > trained["overlap"][split]]):
        raise ValueError(
            f"Expected a stored split {stored[moved[0]]!r} in data.path that was not trained on, but got one with "
            "examples of the training"
        )
    counts = {split: len(examples) for split, examples in of_split.items()}
    facts = {**settings, "stored": stored, "counts": counts, "overlap": overlap, "sketch": drawn_of}
    return Arrangement({split: (stored[split],) for split in SPLITS}, rows, facts)


def _is_trained_on(trained: Mapping[str, Any], hashes: np.ndarray) -> bool:
    """Returns whether a set is that of the training, or a part of it."""
    hits, number = shared(trained["sketch"], hashes), len(trained["sketch"])
    return hits > 0 and (hits >= KNOWN * number or 2 * hits / number * trained["counts"]["train"] >= len(hashes))


def add_digests(
    arranged: Arrangement,
    hashes: Mapping[str, np.ndarray],
    targets: Mapping[Split, Tensor | None],
    trained: Mapping[str, Any] | None,
    *,
    fits: bool,
) -> None:
    """Adds to the facts what stands for the examples and classes of each split, and compares it with a checkpoint.

    Raises:
        ValueError: If this is for training, and the training examples or their classes are others.
    """
    changed = []
    if arranged.facts is not None:
        digests = arranged.facts["digests"] = {}
        for split, target in targets.items():
            classes = np.uint64(0) if target is None else target.numpy().astype(np.uint64)
            digests[split] = digest(hashes[arranged.sources[split][0]][arranged.rows[split]] + classes)
        changed = [split for split in SPLITS if trained and digests[split] != trained["digests"][split]]
    if fits and (arranged.facts is None or "train" in changed):
        raise ValueError("Expected the training examples and labels of the checkpoint, but got others in data.path")
    if changed:
        rank_zero_info(f"data.path has other examples or labels than in training for {', '.join(changed)}")
