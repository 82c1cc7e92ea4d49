"""Assigns stored images to splits, in training and later: the checkpoint keeps the facts.

A stored split is used unchanged. Without a stored test, the stored validation is the test. A split that is still
missing is taken from the stored "train" by content. With a checkpoint that was trained on some of the examples, they
are split as in training; otherwise each split is the whole set.
"""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from thinned.data.content_split import digest, shared, sketch, split_by_content
from thinned.data.order import Split
from thinned.data.sources import split_of

KNOWN = 0.1  # with this share of the training examples, a set is the training set
SPLITS: tuple[Split, ...] = get_args(Split)
OTHERS = "Expected the training examples and labels of the checkpoint, but got others in data.path"


def arrange(
    hashes: np.ndarray,
    classes: np.ndarray,
    parts: Mapping[str, range],
    assigned: Mapping[Split, str],
    asked: Mapping[str, Any],
    trained: dict[str, Any] | None = None,
    *,
    fits: bool = False,
) -> tuple[dict[Split, np.ndarray], dict[str, Any] | None]:
    """Returns the rows of each split, (n,), and facts for a checkpoint: None if the set is not the one trained on.

    Args:
        hashes: Hash of each stored example, (N,) uint64.
        classes: Class of each example, (N,) int64; -1 if its label is hidden.
        parts: The rows of each stored split.
        assigned: Name of the stored split for each split.
        asked: `split_seed`, `val_fraction` and `test_fraction`.
        trained: The facts of a checkpoint; None in training.
        fits: Whether this is for training.

    Raises:
        ValueError: A split is empty, a stored split is missing or holds examples of the training, or training would
            resume with other examples or labels.
    """
    if trained is None:
        test = assigned.get("test", assigned.get("val", assigned["train"]))
        val = assigned.get("val", test)
        stored = {"train": assigned["train"], "val": val if val != test else assigned["train"], "test": test}
    elif not _is_trained_on(trained, hashes):
        if fits:
            raise ValueError(OTHERS)
        rank_zero_info(f"data.path is not the set of the training, so all {len(hashes)} are predicted")
        return dict.fromkeys(SPLITS, np.arange(len(hashes))), None
    else:
        now = {split_of(name) or name: name for name in parts}  # their names may have changed
        if missing := [name for name in trained["stored"].values() if (split_of(name) or name) not in now]:
            raise ValueError(f"Expected the stored splits of the training in data.path, but got no {missing[0]!r}")
        stored = {split: now[split_of(name) or name] for split, name in trained["stored"].items()}
    drawn = [split for split in SPLITS[1:] if stored[split] == stored["train"]]
    keys = ["split_seed", *(f"{split}_fraction" for split in drawn)] if drawn else []
    settings = {key: (trained or asked)[key] for key in keys}
    for key in keys:
        if settings[key] != asked[key]:
            rank_zero_info(f"Kept the split of the training: data.{key} is {settings[key]}, not {asked[key]}")
    fractions = {split: settings.get(f"{split}_fraction", 0.0) for split in SPLITS[1:]}
    rows = {split: np.array(parts[stored[split]]) for split in SPLITS}
    of_train = rows["train"]
    by_content = split_by_content(hashes[of_train], settings.get("split_seed", 0), **fractions)
    rows |= {split: of_train[by_content[split]] for split in ("train", *drawn)}
    of_split = {split: hashes[rows[split]] for split in SPLITS}
    for split, examples in of_split.items():
        if trained is None and not len(examples):
            of = f"the {len(parts[stored[split]])} in split {stored[split]!r} of data.path"
            raise ValueError(f"Expected examples for {split}, but got none of {of}: choose other fractions")
        if split not in ("train", *drawn) and (twice := int(np.isin(examples, of_split["train"]).sum())):
            rank_zero_info(f"{twice} of {len(examples)} examples for {split} are in the training split too")
    drawn_of = sketch(of_split["train"])
    overlap = {split: shared((trained or {"sketch": drawn_of})["sketch"], of_split[split]) for split in SPLITS[1:]}
    if trained and (moved := [split for split in overlap if overlap[split] > trained["overlap"][split]]):
        of = f"a stored split {stored[moved[0]]!r} in data.path"
        raise ValueError(f"Expected {of} that was not trained on, but got one with examples of the training")
    digests = {split: digest((hashes + classes.clip(0).astype(np.uint64))[rows[split]]) for split in SPLITS}
    if trained and (changed := [split for split in SPLITS if digests[split] != trained["digests"][split]]):
        if fits and "train" in changed:
            raise ValueError(OTHERS)
        rank_zero_info(f"data.path has other examples or labels than in training for {', '.join(changed)}")
    counts = {split: len(examples) for split, examples in of_split.items()}
    facts = {**settings, "stored": stored, "counts": counts, "digests": digests, "overlap": overlap}
    return rows, facts | {"sketch": drawn_of}


def _is_trained_on(trained: Mapping[str, Any], hashes: np.ndarray) -> bool:
    """Returns whether a set is the training set, or a part of it."""
    hits, number = shared(trained["sketch"], hashes), len(trained["sketch"])
    return hits > 0 and (hits >= KNOWN * number or 2 * hits / number * trained["counts"]["train"] >= len(hashes))
