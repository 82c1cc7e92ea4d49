"""How text is divided into training, validation and test: a fact of a run, which its checkpoint keeps.

Splits that are stored are used as they are. Those that are missing are taken from the stored "train":

- By document, if each of them can expect `ENOUGH` documents. A hash of the document and the seed decides, so a set that
  grows or is reordered keeps each document where it is, and copies of a document are on one side.
- Otherwise by position, as nanoGPT does with its single document: they are the end of the text.
"""

from __future__ import annotations

import sys
from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import length_hint
from pathlib import Path
from typing import Any, get_args

from thinned.data.content_split import content_hash
from thinned.data.order import Split
from thinned.data.token_stream import Document, sure_to_fit
from thinned.data.tokens import Tokens

ENOUGH = 10  # different documents: a part that can expect so many is empty with a probability below 1e-4
KEPT_HASHES = 64  # of a split: they tell whether another set has documents of it, unless it has few
Range = tuple[Split, int, int]  # tokens of a file, from start to stop


@dataclass(frozen=True)
class SplitRule:
    """How a stored "train" is divided.

    Args:
        val: Fraction for validation; 0 if a split is stored for it.
        test: Fraction for the test, likewise.
        seed: Seed of the hash of documents.
        by_document: Whether whole documents are taken, instead of the end of the text.
        kept: Whether this is the rule of a checkpoint, whose text it may be.
    """

    val: float
    test: float
    seed: int
    by_document: bool
    kept: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], stored: Collection[Split], *, by_document: bool) -> SplitRule:
        """Returns the rule by these settings of the data, if these splits are stored."""
        val, test = (0.0 if split in stored else settings[f"{split}_fraction"] for split in ("val", "test"))
        return cls(val, test, settings["split_seed"], by_document)

    @property
    def ends(self) -> tuple[float, float]:
        """Fractions of the tokens in the file "train" at which training and validation end."""
        return (1.0, 1.0) if self.by_document else (1 - self.val - self.test, 1 - self.test)

    @property
    def taken(self) -> list[Split]:
        """The splits that consist of documents of the stored "train"."""
        fractions: dict[Split, float] = {"train": 1.0, "val": self.val, "test": self.test}
        return [split for split, fraction in fractions.items() if fraction] if self.by_document else []

    def hash(self, text: str) -> int:
        """Returns 64 bits, a function of seed and document."""
        return content_hash(text.encode(errors="surrogatepass"), self.seed)

    def split_of(self, document_hash: int) -> Split:
        """Returns the split of a document by where its hash falls between 0 and 1: test, validation, training."""
        place = document_hash / 2**64
        return "test" if place < self.test else "val" if place >= 1 - self.val else "train"


def enough_documents(documents: Iterable[str], rule: SplitRule, max_tokens: int | None) -> bool:
    """Returns whether each part can expect `ENOUGH` different documents of those that are sure to be kept."""
    fractions = [fraction for fraction in (rule.val, rule.test) if fraction]
    if not fractions or length_hint(documents, sys.maxsize) * min(fractions) < ENOUGH:
        return False
    found = set[int]()
    for _, text in sure_to_fit((("train", text) for text in documents if text), max_tokens):
        found.add(hash(text))
        if len(found) * min(fractions) >= ENOUGH:
            return True
    return False


@dataclass
class SplitDocuments:
    """Documents of a stored split, each with the split to which it goes."""

    stored: Split
    documents: Iterable[str]
    rule: SplitRule
    smallest: dict[Split, list[int]] = field(default_factory=dict)  # hashes, in ascending order

    def __iter__(self) -> Iterator[Document]:
        for text in self.documents:
            if self.stored != "train" or not self.rule.by_document:
                yield self.stored, text
                continue
            number = self.rule.hash(text)
            split = self.rule.split_of(number)
            smallest = self.smallest.setdefault(split, [])
            if number not in smallest:
                insort(smallest, number)
                del smallest[KEPT_HASHES:]
            yield split, text

    @property
    def digests(self) -> dict[Split, str]:
        """Tells sets of documents apart in each split: the smallest hashes, whatever their order."""
        return {split: "".join(f"{number:016x}" for number in self.smallest[split]) for split in self.smallest}


def rule_of(
    settings: Mapping[str, Any], stored: Mapping[Split, Iterable[str]], kept: Mapping[str, Any] | None, *, fits: bool
) -> SplitRule:
    """Returns how the stored "train" is split.

    Documents are split as the checkpoint's if they have some in common. Otherwise the tokens show whether the text is
    that of the checkpoint.

    Args:
        settings: Those of the data.
        stored: Documents of each stored split.
        kept: The `split` in a checkpoint's state of a `TextDataModule`.
        fits: Whether this is for training.

    Raises:
        ValueError: If there is no "train" to train on.
    """
    if "train" not in stored:
        if kept and not fits:
            return SplitRule.of(settings, ["val", "test"], by_document=False)
        raise ValueError(f"Expected data.path to have a split 'train', but got {[*stored]}")
    if kept:
        rule = replace(SplitRule.of(kept, kept["stored"], by_document=kept["by_document"]), kept=True)
        digest = kept["parts"]["train"]["digest"]
        known = {digest[i : i + 16] for i in range(0, len(digest), 16)}
        if not rule.by_document or any(f"{rule.hash(text):016x}" in known for text in stored["train"]):
            return rule
    rule = SplitRule.of(settings, stored, by_document=True)
    several = (fits or not kept) and enough_documents(stored["train"], rule, settings["max_tokens"])
    return replace(rule, by_document=several)


def new_ranges(rule: SplitRule, counts: Mapping[Split, int]) -> dict[Split, Range]:
    """Returns the tokens of each split, given the number of tokens of each file."""
    train, val = (int(end * counts["train"]) for end in rule.ends)
    ranges: dict[Split, Range] = {"train": ("train", 0, train)}
    ranges["val"] = ("val", 0, counts["val"]) if "val" in counts else ("train", train, val)
    ranges["test"] = ("test", 0, counts["test"]) if "test" in counts else ("train", val, counts["train"])
    if "test" not in counts and not rule.test:
        ranges["test"] = ranges["val"]
    return ranges


def whole_ranges(counts: Mapping[Split, int]) -> dict[Split, Range]:
    """Returns the stored splits of a text that was not trained on, or else all of it for each."""
    first = next(iter(counts))
    files: dict[Split, Split] = {split: split if split in counts else first for split in get_args(Split)}
    return {split: (file, 0, counts[file]) for split, file in files.items()}


def check_sizes(ranges: Mapping[Split, Range], counts: Mapping[Split, int], context_length: int | None) -> None:
    """Raises a ValueError if a split has too few tokens; None for `context_length` if there is no training."""
    for split, (name, start, stop) in ranges.items():
        least, reason, change = 2, "an input and its target", f"larger data.{split}_fraction"
        if split == "train" and context_length:
            least, reason = context_length + 1, "one more than data.context_length"
            change = "smaller data.context_length"
        if stop - start < least:
            raise ValueError(
                f"Expected at least {least} tokens for {split} ({reason}), but got {stop - start} of the "
                f"{counts[name]} in data.path: choose a {change} or a longer text (data.max_tokens)"
            )


def kept_ranges(kept: Mapping[str, Any], path: str, tokens: Mapping[Split, Tokens]) -> dict[Split, Range] | None:
    """Returns the tokens of the splits of a checkpoint, in the text as it is now.

    What has been added to the end of a text is in no split. Stored splits, and documents, are used as they are now.

    Args:
        kept: The `split` in a checkpoint's state of a `TextDataModule`.
        path: The value of `data.path` now.
        tokens: The tokens of each file now. If the checkpoint's documents were split, these are, by the same rule.

    Returns:
        The tokens of each split; None if this is not the text of the checkpoint.

    Raises:
        ValueError: If it cannot be known which part of the text was trained on.
    """
    parts: dict[Split, dict[str, Any]] = kept["parts"]
    for split, stored in tokens.items():
        if split != "train" and stored.digest == parts["train"]["digest"]:
            raise ValueError(f"Expected a {split} split in data.path that was not trained on, but got that of train")
    start, stop = parts["train"]["start"], parts["train"]["stop"]
    same = kept["by_document"] or (
        len(tokens["train"]) >= stop and tokens["train"].part(start, stop).digest == parts["train"]["digest"]
    )
    if not same and Path(kept["path"]).expanduser().resolve() != Path(path).expanduser().resolve():
        return None
    by_position = not kept["by_document"] and "train" in (parts["val"]["file"], parts["test"]["file"])
    if by_position and not same:
        raise ValueError(
            f"Expected data.path to begin with the {stop:,} tokens that the checkpoint was trained on, but got a text "
            f"that has changed before that in {path!r} (or data.max_tokens); a text to predict needs a path of its own"
        )
    ranges: dict[Split, Range] = {}
    for split, part in parts.items():
        file: Split = part["file"]
        if file not in tokens:
            raise ValueError(f"Expected data.path to have a stored split {file!r}, as in training, but got {[*tokens]}")
        count = len(tokens[file])
        stop = part["stop"] if by_position and file == "train" else count
        ranges[split] = file, min(part["start"], count), min(stop, count)
    return ranges


def kept_settings(kept: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
    """Returns the settings of the data that remain those of the checkpoint, in its own text."""
    keys = [f"{split}_fraction" for split in ("val", "test") if split not in kept["stored"]]
    # A run resumes within an epoch, whose order is that of the seed.
    keys += ["split_seed"] * kept["by_document"] + ["seed"] * training
    return {key: kept[key] for key in keys}


def changes(kept: Mapping[str, Any], parts: Mapping[Split, Any], counts: Mapping[Split, int]) -> list[str]:
    """Returns what is to be said of a text that is not as it was: `parts` and the size of each file are of now."""
    said, ends = [], dict.fromkeys(counts, 0)
    for split, part in parts.items():
        before, after = (each["stop"] - each["start"] for each in (kept["parts"][split], part))
        if before != after:
            said.append(f"{split} has {after:,} tokens instead of {before:,}")
        elif part["digest"] != kept["parts"][split]["digest"]:
            said.append(f"{split} has other text")
        ends[part["file"]] = max(ends[part["file"]], part["stop"])
    if counts["train"] > ends["train"]:
        said.append(f"the {counts['train'] - ends['train']:,} tokens at its end are in no split")
    said += [f"its stored split {file} is not used" for file, end in ends.items() if not end]
    return [f"data.path has changed since training: {'; '.join(said)}"] if said else []
