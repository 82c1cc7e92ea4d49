"""Divides text into training, validation and test, in a way that the checkpoint of a run keeps.

Stored splits are used unchanged. Missing ones are taken from the stored "train":

- By document, if each can expect `ENOUGH` documents. A hash of the document and the seed decides, so documents stay in
  their split when the set grows or is reordered, and copies of a document are on one side.
- Otherwise by position, as nanoGPT does with its single document: they are the end of the text.
"""

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from thinned.data.content_split import SKETCH, content_hash
from thinned.data.order import Split
from thinned.data.tokenisation import Document, sure_to_fit
from thinned.data.tokens import Tokens

ENOUGH = 10  # different documents: a split that expects so many is empty with a probability below 1e-4
Range = tuple[Split, int, int]  # tokens of a file, from start to stop


@dataclass(frozen=True)
class SplitRule:
    """Says how a stored "train" is divided."""

    val: float  # fraction for validation; 0 if a split is stored for it
    test: float
    seed: int  # of the hash of documents
    by_document: bool  # whether whole documents are taken, instead of the end of the text

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
        """Returns the split of a document by its hash, scaled to [0, 1): test, then validation, then training."""
        place = document_hash / 2**64
        return "test" if place < self.test else "val" if place >= 1 - self.val else "train"


UNDIVIDED = SplitRule(0.0, 0.0, 0, by_document=False)


@dataclass
class SplitDocuments:
    """Yields documents of a stored split, each with the split that it goes to."""

    stored: Split
    documents: Iterable[str]
    rule: SplitRule
    smallest: list[int] = field(default_factory=list)  # hashes of documents for training, in ascending order

    def __iter__(self) -> Iterator[Document]:
        for text in self.documents:
            split = self.stored
            if split == "train" and self.rule.by_document:
                number = self.rule.hash(text)
                split = self.rule.split_of(number)
                if split == "train" and number not in self.smallest:
                    insort(self.smallest, number)
                    del self.smallest[SKETCH:]
            yield split, text

    def sketch(self) -> str:
        """Returns hashes by which the documents for training are recognised, whatever their order."""
        return "".join(f"{number:016x}" for number in self.smallest)


def rule_of(
    settings: Mapping[str, Any], stored: Mapping[Split, Iterable[str]], kept: Mapping[str, Any] | None
) -> SplitRule | None:
    """Returns how the documents of a stored "train" are split, by the settings or as a checkpoint has `kept` it.

    None means that this is not the text of the checkpoint: it has none of its documents. If the checkpoint's text was
    split by position, `kept_ranges` compares the tokens later.

    Raises:
        ValueError: If there is no "train" to train on.
    """
    given, names = (kept, kept["stored"]) if kept else (settings, stored)
    val, test = (0.0 if split in names else given[f"{split}_fraction"] for split in ("val", "test"))
    if kept:
        rule = SplitRule(val, test, kept["split_seed"], kept["by_document"])
        digest = kept["parts"]["train"]["digest"]
        known = {digest[i : i + 16] for i in range(0, len(digest), 16)}
        same = not rule.by_document or any(f"{rule.hash(text):016x}" in known for text in stored.get("train", ()))
        return rule if "train" in stored and same else None
    if "train" not in stored:
        raise ValueError(f"Expected data.path to have a split 'train', but got {[*stored]}")
    found, least = set[int](), min((fraction for fraction in (val, test) if fraction), default=0)
    for _, text in sure_to_fit((("train", text) for text in stored["train"] if text), settings["max_tokens"]):
        found.add(hash(text))
        if not least or len(found) * least >= ENOUGH:
            break
    return SplitRule(val, test, settings["split_seed"], by_document=len(found) * least >= ENOUGH)


def new_ranges(rule: SplitRule, counts: Mapping[Split, int]) -> dict[Split, Range]:
    """Returns the tokens of each split, given the number of tokens of each file."""
    train, val = (int(end * counts["train"]) for end in rule.ends)
    ranges: dict[Split, Range] = {"train": ("train", 0, train), "val": ("train", train, val)}
    ranges["test"] = "train", val, counts["train"]
    ranges |= {split: (split, 0, counts[split]) for split in counts if split != "train"}
    if "test" not in counts and not rule.test:
        ranges["test"] = ranges["val"]
    return ranges


def whole_ranges(counts: Mapping[Split, int]) -> dict[Split, Range]:
    """Returns the ranges of a text that was not trained on: its stored splits, or else all of it for each split."""
    first = next(iter(counts))
    files: dict[Split, Split] = {split: split if split in counts else first for split in get_args(Split)}
    return {split: (file, 0, counts[file]) for split, file in files.items()}


def kept_ranges(kept: Mapping[str, Any], path: str, tokens: Mapping[Split, Tokens]) -> dict[Split, Range] | None:
    """Returns the tokens of the splits that a checkpoint has `kept`, in the text as it is now.

    Text added to the end is in no split. Stored splits, and documents, are used as they are now. None means another
    text: another path, or one that does not begin with the training text.

    Raises:
        ValueError: If training text would be tested, or the training text cannot be identified.
    """
    parts: dict[Split, dict[str, Any]] = kept["parts"]
    start, stop, digest = (parts["train"][key] for key in ("start", "stop", "digest"))
    if swapped := [split for split in tokens if split != "train" and tokens[split].digest == digest]:
        raise ValueError(f"Expected a {swapped[0]} split in data.path that was not trained on, but got that of train")
    by_position = "train" in (parts["val"]["file"], parts["test"]["file"])
    same = len(tokens["train"]) >= stop and tokens["train"].part(start, stop).digest == digest
    if not same and not kept["by_document"]:
        if Path(kept["path"]).expanduser().resolve() != Path(path).expanduser().resolve():
            return None
        if by_position:
            of = f"the {stop:,} tokens that the checkpoint was trained on"
            got = f"a text that has changed before that in {path!r} (a text to predict needs a path of its own)"
            raise ValueError(f"Expected data.path to begin with {of}, but got {got}")
    ranges: dict[Split, Range] = {}
    for split, part in parts.items():
        if (file := part["file"]) not in tokens:
            raise ValueError(f"Expected data.path to have a stored split {file!r}, as in training, but got {[*tokens]}")
        count = len(tokens[file])
        stop = part["stop"] if by_position and file == "train" else count
        ranges[split] = file, min(part["start"], count), min(stop, count)
    return ranges


def check_sizes(ranges: Mapping[Split, Range], counts: Mapping[Split, int], context_length: int | None) -> None:
    """Raises a ValueError if a split has too few tokens; None for `context_length` if there is no training."""
    for split, (name, start, stop) in ranges.items():
        least, reason, change = 2, "an input and its target", f"larger data.{split}_fraction"
        if split == "train" and context_length:
            least, reason, change = context_length + 1, "data.context_length and one", "smaller data.context_length"
        if stop - start < least:
            raise ValueError(
                f"Expected at least {least} tokens for {split} ({reason}), but got {stop - start} of the "
                f"{counts[name]} in data.path: choose a {change} or a longer text (data.max_tokens)"
            )
