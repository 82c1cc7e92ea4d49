"""Text as windows of tokens for language models, with the token that follows each.

An epoch is one pass over the training tokens, in windows that do not overlap and begin at another offset each epoch.
(nanoGPT, github.com/karpathy/nanoGPT, draws them with replacement.) As in nanoGPT, the last tenth is for validation.

Shapes: N tokens in a split, B windows in a batch, T tokens in a window.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from thinned.data.module import SplitDataModule
from thinned.data.order import Split
from thinned.data.text_sources import EXPECTED, TextSource, read_text
from thinned.data.token_stream import make_tokenizer
from thinned.data.tokenizer import Tokenizer, bpe_size
from thinned.data.tokens import FORMAT, Tokens, open_tokens, write_tokens

NO_TARGET = -100  # cross_entropy ignores it


class TokenBatch(NamedTuple):
    """Windows of tokens, the tokens that follow, and the numbers of the windows in the split."""

    input: Tensor  # (B, T) int64
    target: Tensor  # (B, T) int64, the token after each; -100 where there is none
    index: Tensor  # type: ignore[assignment]  # (B,) int64, window of the split


@dataclass
class TokenBatches(Dataset[TokenBatch]):
    """A split as batches: `split[epoch, indices]`.

    - Training: window j begins at j T plus an offset below T that is a function of (seed, epoch). Every epoch has the
      windows that fit with the largest offset.
    - Evaluation: window j begins at j T, and each token but the first is a target once; the last window is padded.
    """

    tokens: Tokens
    context_length: int
    seed: int
    training: bool

    def __len__(self) -> int:
        pairs = len(self.tokens) - 1  # a token and the next
        if self.training:
            return max(pairs // self.context_length - 1, 1)
        return -(-pairs // self.context_length)

    def offset(self, epoch: int) -> int:
        """Returns where the first window of an epoch begins."""
        if not self.training or len(self.tokens) <= 2 * self.context_length:
            return 0
        return int(np.random.default_rng((self.seed, epoch, 1)).integers(self.context_length))  # order: (seed, epoch)

    def __getitem__(self, item: tuple[int, list[int]]) -> TokenBatch:
        epoch, indices = item
        length, offset = self.context_length, self.offset(epoch)
        inputs = np.zeros((len(indices), length), np.int64)
        targets = np.full((len(indices), length), NO_TARGET, np.int64)
        for row, index in enumerate(indices):
            start = offset + index * length
            window = self.tokens.read(start, min(start + length + 1, len(self.tokens)))
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return TokenBatch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.tensor(indices))


class TextDataModule(SplitDataModule):
    """Windows of tokens in batches, divided among the processes.

    Stored splits "train", "validation" (or "valid") and "test" are used as they are. Missing ones are taken from the
    end of "train". If the test has no tokens of its own, it is on the validation split.

    The text is tokenised once, into files in `cache_dir` that later runs find again.

    Args:
        path: "pydocs" for Python's own documentation, a text file, a folder of text files, a folder for
            `datasets.load_dataset` or `load_from_disk`, or the id of a dataset on the Hugging Face Hub.
        name: Which of the dataset's configurations; None if it has one, or a default.
        text_column: Column of the text; None for "text", or the only one of strings.
        tokenizer: "char" for characters, "bpe:<size>" for byte-level BPE of that size trained on the training text, or
            a pretrained one: a tokenizer.json, a folder with one, or the id of a model on the hub.
        context_length: Number of tokens in a window.
        batch_size: Number of windows in a training batch, over all processes.
        eval_batch_size: Number of windows in a batch in validation, test and prediction, over all processes.
        val_fraction: Fraction of the stored "train" for validation, if no split is stored for it.
        test_fraction: ClosedUnitInterval of the stored "train" for the test, if no split is stored for it.
        predict_split: The split to predict.
        streaming: Whether a dataset is read row by row, so that only the first `max_tokens` are downloaded. Later
            changes of a dataset on the hub are not noticed.
        max_tokens: The most tokens of each stored split; None for all.
        cache_dir: Folder for the tokens.
        num_workers: Number of worker processes that make batches; 0 makes them in the main process.
        seed: Seed of order and offsets.

    Raises:
        ValueError: If an argument is out of range, or the two fractions leave nothing for training.
    """

    INDIFFERENT = SplitDataModule.INDIFFERENT | {"cache_dir", "seed"}
    # Available after setup:
    tokenizer: Tokenizer
    tokens: dict[Split, Tokens]

    def __init__(
        self,
        path: str = "pydocs",
        name: str | None = None,
        text_column: str | None = None,
        tokenizer: str = "char",
        context_length: PositiveInt = 256,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt = 64,
        val_fraction: OpenUnitInterval = 0.1,
        test_fraction: ClosedUnitInterval = 0.0,
        predict_split: Split = "test",
        streaming: bool = False,
        max_tokens: PositiveInt | None = None,
        cache_dir: str = "data",
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        # A checkpoint holds int and float, but jsonargparse's numbers are of its own types.
        self.hparams.update(json.loads(json.dumps(self.hparams)))
        if not path:
            raise ValueError(f"Expected data.path to be {EXPECTED}, but got {path!r}")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"Expected data.test_fraction below 1 - {val_fraction}, data.val_fraction, but got {test_fraction}"
            )
        bpe_size(tokenizer)  # raises an error if it is invalid
        self.tokens = {}
        self._given: str | None = None  # JSON of a checkpoint's tokenizer
        self._prepared: tuple[Tokenizer, dict[str, Tokens]] | None = None

    def prepare_data(self) -> None:
        """Tokenises the text, unless an earlier run has."""
        self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokens, once for all stages."""
        if not self.tokens:
            self.tokenizer, stored = self._prepare()
            ranges = self._ranges({split: len(tokens) for split, tokens in stored.items()})
            self.tokens = {split: stored[name].part(start, stop) for split, (name, start, stop) in ranges.items()}

    def _prepare(self) -> tuple[Tokenizer, dict[str, Tokens]]:
        """Returns the tokenizer and the tokens of the stored splits, which it writes if they are missing."""
        if self._prepared:
            return self._prepared
        spec, max_tokens = self.hparams["tokenizer"], self.hparams["max_tokens"]
        names = ("path", "name", "text_column", "streaming")
        source = read_text(**{name: self.hparams[name] for name in names})
        end = self._ends(source.splits)[0]
        tokenizer = None
        if self._given:
            tokenizer = Tokenizer.from_json(self._given)
        elif spec != "char" and not bpe_size(spec):
            tokenizer = Tokenizer.pretrained(spec)
        base: dict[str, Any] = {
            "format": FORMAT,
            "content": source.content,
            "tokenizer": spec,
            "max_tokens": max_tokens,
        }
        key = base | ({"training_part": end} if bpe_size(spec) else {})
        if tokenizer:
            # A checkpoint is often used on its training text: if its tokenizer was made for it, so were the tokens.
            made = self._directory(source, key) / "tokenizer.json"
            if not made.exists() or made.read_text(encoding="utf-8", errors="replace") != self._given:
                key = base | {"digest": hashlib.sha256(tokenizer.to_json().encode()).hexdigest()}
        directory = self._directory(source, key)
        make = partial(make_tokenizer, spec, source.splits, end, max_tokens)
        write_tokens(directory, lambda: tokenizer or make(), source.splits, max_tokens, self._ranges)
        self._prepared = open_tokens(directory)
        return self._prepared

    def _directory(self, source: TextSource, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        label = re.sub(r"[^\w.-]+", "-", f"{source.label}-{Path(self.hparams['tokenizer']).stem}").strip(".-")[:80]
        return Path(self.hparams["cache_dir"]).expanduser() / f"{label}-{digest[:12]}"

    def _ends(self, stored: Iterable[str]) -> tuple[float, float]:
        """Returns the fractions of the stored "train" at which its training part and its validation part end."""
        test = 0.0 if "test" in stored else self.hparams["test_fraction"]
        val = 0.0 if "val" in stored else self.hparams["val_fraction"]
        return 1 - val - test, 1 - test

    def _ranges(self, counts: dict[str, int]) -> dict[Split, tuple[str, int, int]]:
        """Returns the stored split, the first token and the end of each split; ValueError if it has too few tokens."""
        train, val = (int(end * counts["train"]) for end in self._ends(counts))
        ranges: dict[Split, tuple[str, int, int]] = {"train": ("train", 0, train)}
        ranges["val"] = ("val", 0, counts["val"]) if "val" in counts else ("train", train, val)
        ranges["test"] = ("test", 0, counts["test"]) if "test" in counts else ("train", val, counts["train"])
        if "test" not in counts and not self.hparams["test_fraction"]:
            ranges["test"] = ranges["val"]
        for split, (name, start, stop) in ranges.items():
            if split == "train":
                least, reason = self.context_length + 1, "one more than data.context_length"
                change = "smaller data.context_length"
            else:
                least, reason, change = 2, "an input and its target", f"larger data.{split}_fraction"
            if stop - start < least:
                raise ValueError(
                    f"Expected at least {least} tokens for {split} ({reason}), but got {stop - start} of the "
                    f"{counts[name]} in data.path: choose a {change} or a longer text (data.max_tokens)"
                )
        return ranges

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, after setup."""
        return self.tokenizer.vocab_size

    @property
    def context_length(self) -> int:
        """Number T of tokens in a window."""
        return self.hparams["context_length"]

    def net_arguments(self) -> dict[str, int]:
        """Returns the arguments of a network that only the data knows."""
        return {"vocab_size": self._prepare()[0].vocab_size, "context_length": self.context_length}

    def state_dict(self) -> dict[str, str]:
        """Returns what a trained network relies on: its tokenizer."""
        given = self._prepared[0].to_json() if self._prepared else self._given
        return {"tokenizer": given, "spec": self.hparams["tokenizer"]} if given else {}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Takes the tokenizer from a checkpoint, whatever the text; ValueError if another kind is configured."""
        spec, given = state_dict["spec"], state_dict["tokenizer"]
        if spec != self.hparams["tokenizer"]:
            raise ValueError(
                f"Expected data.tokenizer to be {spec!r}, as the checkpoint has, but got {self.hparams['tokenizer']!r}"
            )
        self._given = given
        if self._prepared and self._prepared[0].to_json() != given:
            self._prepared = None
            if self.tokens:  # Lightning loads a checkpoint after setup
                self.tokens = {}
                self.setup()

    def num_examples(self, split: Split) -> int:
        """Returns the number of windows in the evaluation of a split, after setup."""
        return len(self.batches(split, training=False))

    def batches(self, split: Split, *, training: bool) -> TokenBatches:
        """Returns a split as windows; those for training begin at another offset each epoch."""
        return TokenBatches(self.tokens[split], self.context_length, self.hparams["seed"], training)
