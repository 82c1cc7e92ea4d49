"""Reads text as windows of tokens for language models, with the token that follows each.

An epoch is one pass over the training tokens, in windows that do not overlap and begin at another offset each epoch.
(nanoGPT, github.com/karpathy/nanoGPT, draws them with replacement.) As in nanoGPT, the last tenth is for validation.

Shapes: T tokens in a window.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from thinned.data import text_split
from thinned.data.distortion import Distortion
from thinned.data.module import SplitDataModule
from thinned.data.order import Split
from thinned.data.text_sources import EXPECTED, TextSource, read_text
from thinned.data.tokenisation import (
    Tokenised,
    cached_tokens,
    exchanged,
    folder_of,
    make_tokenizer,
    open_tokens,
    write_tokens,
)
from thinned.data.tokenizer import Tokenizer, bpe_size
from thinned.data.tokens import TokenBatches, Tokens


class TextDataModule(SplitDataModule):
    """Loads windows of tokens in batches, divided among the processes.

    Stored splits are used unchanged: those of a dataset, or files or folders with the usual names of splits. Missing
    ones are taken from "train": by document if each can expect ten documents (a tenth of 100, for example), otherwise
    from the end of the text. If the test has no tokens of its own, it uses the validation split.

    A checkpoint keeps the split, whatever the settings say later: in the same text, which may have grown, no token of
    the training is tested. Another text is predicted as a whole.

    The text is tokenised once, into files in `cache_dir`. Later runs use them as long as path, size and time of change
    of the text are the same.

    Args:
        path: "pydocs" for Python's own documentation, "stdlib" for sources of its library, a file, the id of a dataset
            on the Hugging Face Hub, or a folder: of text, of rows (CSV, JSON, parquet), or written by `datasets`. A
            file of text is a document, and so is a row. Both may be compressed (.gz, .bz2, .xz).
        name: Which of the dataset's configurations; None if it has one, or a default.
        text_column: Column of the text; None for "text", or the only one of strings.
        tokenizer: "char" for characters, "bpe:<size>" for byte-level BPE of that size trained on the training text, or
            a pretrained one: a tokenizer.json, a folder with one, or the id of a model on the hub.
        context_length: Number of tokens in a window.
        batch_size: Number of windows in a training batch, over all processes.
        eval_batch_size: Number of windows in a batch in validation, test and prediction, over all processes.
        val_fraction: Fraction of the stored "train" for validation, if no split is stored for it.
        test_fraction: Fraction of the stored "train" for the test, if no split is stored for it.
        split_seed: Seed of the split by document.
        leave_out: Names of stored splits, folders and files to ignore; `*` stands for any part of a name.
        predict_split: The split to predict.
        distortion: Distortion of the text of a test or a prediction: "characters:<rate>" exchanges them at a rate.
        streaming: Whether a dataset on the hub is read row by row, so that only the first `max_tokens` are downloaded.
            Later changes on the hub are not noticed.
        max_tokens: The most tokens of each stored split; None for all.
        cache_dir: Folder for the tokens.
        num_workers: Number of worker processes that make batches; 0 makes them in the main process.
        seed: Seed of order and offsets.

    Raises:
        ValueError: If an argument is out of range, or the two fractions leave nothing for training.
    """

    INDIFFERENT = SplitDataModule.INDIFFERENT | {"cache_dir", "seed"}
    NET_ARGUMENTS = ("vocab_size", "context_length")
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
        split_seed: NonNegativeInt = 0,
        leave_out: list[str] | None = None,
        predict_split: Split = "test",
        distortion: str | None = None,
        streaming: bool = False,
        max_tokens: PositiveInt | None = None,
        cache_dir: str = "data",
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        # A checkpoint holds int and float, but jsonargparse's numbers are of its own types.
        self.hparams.update(json.loads(json.dumps(self.hparams, default=str)))
        if not path:
            raise ValueError(f"Expected data.path to be {EXPECTED}, but got {path!r}")
        if val_fraction + test_fraction >= 1:
            least = f"below 1 - {val_fraction}, data.val_fraction"
            raise ValueError(f"Expected data.test_fraction {least}, but got {test_fraction}")
        bpe_size(tokenizer)  # raises a ValueError if it is invalid
        self._distortion = Distortion.parse(distortion, ["characters"])
        self.tokens = {}
        self._distorted: dict[Split, np.ndarray] = {}
        self._given: str | None = None  # JSON of a checkpoint's tokenizer
        self._kept: dict[str, Any] | None = None  # how a checkpoint's text is split
        self._rule: text_split.SplitRule | None = None  # None too if it is not the text of the checkpoint
        self._tokenised: Tokenised | None = None

    def prepare_data(self) -> None:
        """Tokenises the text, unless an earlier run has."""
        self._prepare()

    def _prepare(self) -> Tokenised:
        """Returns the tokens of the text, which are written if missing."""
        if self._tokenised:
            return self._tokenised
        given = self.hparams
        options = given["name"], given["text_column"], given["leave_out"] or []
        source = read_text(self.path, *options, streaming=given["streaming"])
        self._rule = text_split.rule_of(given, source.splits, self._kept)
        if self._kept and self._rule and self._rule.by_document:
            # A split that the checkpoint takes from "train" does not mix with one that is stored now.
            splits = {split: source.splits[split] for split in source.splits if split in self._kept["stored"]}
            extra = [f"the stored split {split}" for split in source.splits if split not in splits]
            source = replace(source, splits=splits, left_out=[*source.left_out, *extra])
        if source.left_out:
            rank_zero_info(f"Left out of data.path: {', '.join(source.left_out[:5])} ({len(source.left_out)} in all)")
        self._stored = list(source.splits)
        self._tokenised = self._tokenise(source, self._rule or text_split.UNDIVIDED)
        return self._tokenised

    def _tokenise(self, source: TextSource, rule: text_split.SplitRule) -> Tokenised:
        spec, max_tokens, cache = (self.hparams[key] for key in ("tokenizer", "max_tokens", "cache_dir"))
        stored = {split: text_split.SplitDocuments(split, texts, rule) for split, texts in source.splits.items()}
        tokenizer = Tokenizer.from_json(self._given) if self._given else None
        if tokenizer is None and spec != "char" and not bpe_size(spec):
            tokenizer = Tokenizer.pretrained(spec)
        label = f"{Path(self.path).resolve().stem}-{Path(spec).stem}"
        key = [source.content, spec, [rule.val, rule.test, rule.seed] if rule.by_document else None, max_tokens]
        folder = folder_of(cache, label, [*key, rule.ends[0] if bpe_size(spec) else None])
        made = open_tokens(folder)
        # A checkpoint is often used on its training text: if its tokenizer was made from it, the tokens are there too.
        if tokenizer and not (made and made.tokenizer.to_json() == self._given):
            folder = folder_of(cache, label, [*key, tokenizer.to_json()])

        def write(folder: Path) -> None:
            of_text = tokenizer or make_tokenizer(spec, stored, rule.ends[0], max_tokens)
            sketch = stored["train"].sketch if rule.by_document else lambda: ""
            splits = dict.fromkeys([*stored, *rule.taken])
            counts = write_tokens(folder, of_text, stored, splits, max_tokens, sketch)
            ranges = text_split.whole_ranges(counts) if self._kept else text_split.new_ranges(rule, counts)
            text_split.check_sizes(ranges, counts, None if self._kept else self.context_length)

        return cached_tokens(folder, write)

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokens, once for all stages; ValueError if training would resume on another text."""
        if self.tokens:
            return
        self.tokenizer, files, _ = self._prepare()
        counts, rule, kept = {split: len(tokens) for split, tokens in files.items()}, self._rule, self._kept
        found = None
        if rule:
            found = text_split.kept_ranges(kept, self.path, files) if kept else text_split.new_ranges(rule, counts)
        self._is_another, fits = found is None, self.trainer is not None and self.trainer.state.fn == "fit"
        self._ranges = found or text_split.whole_ranges(counts)
        text_split.check_sizes(self._ranges, counts, None if kept else self.context_length)
        if self._is_another:
            if fits:
                raise ValueError(f"Expected the training text of the checkpoint, but got another one in {self.path!r}")
            rank_zero_info("data.path is not the text of the checkpoint, so all of it is predicted")
        elif kept:
            self._keep_settings(kept, fits)
            if unused := counts["train"] - max(stop for file, _, stop in self._ranges.values() if file == "train"):
                rank_zero_info(
                    f"data.path has changed since training: the {unused:,} tokens at its end are in no split"
                )
        self.tokens = {split: files[file].part(start, stop) for split, (file, start, stop) in self._ranges.items()}

    def _keep_settings(self, kept: dict[str, Any], fits: bool) -> None:
        """Takes the settings of the split from a checkpoint of the same text; to resume, also those of the order."""
        keys = [f"{split}_fraction" for split in ("val", "test") if split not in kept["stored"]]
        for key in [*keys, *["split_seed"] * kept["by_document"], *["seed"] * fits]:
            if kept[key] != self.hparams[key]:
                rank_zero_info(f"Kept data.{key} {kept[key]} of the checkpoint, instead of {self.hparams[key]}")
                self.hparams[key] = kept[key]

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._prepare().tokenizer.vocab_size

    @property
    def context_length(self) -> int:
        """Number T of tokens in a window."""
        return self.hparams["context_length"]

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation split; ValueError if a text new to the checkpoint would also be the test."""
        tested = self.trainer.state.fn if self.trainer else None
        split = self.predict_split if tested == "predict" else "test"
        if self._is_another and tested in ("predict", "test") and self._ranges["val"] == self._ranges[split]:
            got = "another text in data.path: evaluate it as one of the sets, or predict it at given sites"
            raise ValueError(f"Expected a validation split to learn from, but got {got}")
        return super().val_dataloader()

    def provenance(self, split: Split, limit_batches: float) -> dict[str, Any]:
        """Adds a hash of the tokens of the split."""
        return super().provenance(split, limit_batches) | {"digest": self.tokens[split].digest}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a trained network relies on: its tokenizer, and which text was for training."""
        given = self._tokenised.tokenizer.to_json() if self._tokenised else self._given
        if not given:
            return {}
        state = {"tokenizer": given, "spec": self.hparams["tokenizer"]}
        split = self._kept or (self._facts() if self.tokens else None)
        return state | ({"split": split} if split else {})

    def _facts(self) -> dict[str, Any]:
        """Returns how the text is split, for a checkpoint."""
        assert self._rule
        parts: dict[str, Any] = {
            split: {"file": file, "start": start, "stop": stop} for split, (file, start, stop) in self._ranges.items()
        }
        parts["train"]["digest"] = self._prepare().sketch or self.tokens["train"].digest
        settings = {key: self.hparams[key] for key in ("path", "val_fraction", "test_fraction", "split_seed", "seed")}
        return settings | {"stored": self._stored, "by_document": self._rule.by_document, "parts": parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes tokenizer and split from a checkpoint; ValueError for another kind of tokenizer."""
        spec = state_dict["spec"]
        if spec != self.hparams["tokenizer"]:
            got = self.hparams["tokenizer"]
            raise ValueError(f"Expected data.tokenizer to be {spec!r}, as the checkpoint has, but got {got!r}")
        if self.tokens and state_dict == self.state_dict():
            return
        self._given, self._kept, self._tokenised = state_dict["tokenizer"], state_dict.get("split"), None
        self.tokenizer = Tokenizer.from_json(self._given)
        if self.tokens:  # Lightning loads a checkpoint after setup
            self.tokens, self._distorted = {}, {}
            self.setup()

    def input_of(self, text: Any) -> Tensor:
        """Returns the tokens of a text, (t,) int64; ValueError unless it is a str of 1 to T known tokens."""
        if not isinstance(text, str):
            raise ValueError(f"Expected a text, a str, but got {type(text).__name__}")
        tokens = torch.tensor(self.tokenizer.encode(text), dtype=torch.int64)
        if not 1 <= len(tokens) <= self.context_length:
            raise ValueError(f"Expected a text of 1 to {self.context_length} tokens, but got {len(tokens)}")
        return tokens

    def batches(self, split: Split, *, training: bool) -> TokenBatches:
        """Returns a split as windows; those for training begin at another offset each epoch."""
        return TokenBatches(self.tokens[split], self.context_length, self.hparams["seed"], training)

    def tested(self, split: Split) -> TokenBatches:
        """Returns a split as windows, distorted by `data.distortion`."""
        whole = self.batches(split, training=False)
        if self._distortion is None:
            return whole
        if split not in self._distorted:
            self._distorted[split] = exchanged(self.tokens[split][:], self.tokenizer, self._distortion.severity)
        return replace(whole, tokens=self._distorted[split])
