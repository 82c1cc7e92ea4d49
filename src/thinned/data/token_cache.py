"""Finds the tokens of a text that an earlier run has written, or writes them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from thinned.data.order import Split
from thinned.data.text_split import SplitDocuments, SplitRule
from thinned.data.token_stream import make_tokenizer
from thinned.data.tokenizer import Tokenizer, bpe_size
from thinned.data.tokens import FORMAT, Tokenised, open_tokens, write_tokens


def find_tokens(
    content: str,
    label: str,
    stored: Mapping[Split, SplitDocuments],
    rule: SplitRule,
    settings: Mapping[str, Any],
    given: str | None,
    check: Callable[[dict[Split, int]], None],
) -> Tokenised:
    """Returns the tokens of a text, from the folder `data.cache_dir`.

    Args:
        content: Differs between texts.
        label: Begins the name of the folder of these tokens.
        stored: Documents of each stored split.
        rule: How "train" is divided.
        settings: Those of the data.
        given: JSON of the tokenizer; None for that of the settings.
        check: Called with the number of tokens of each split; it raises an error if they will not do.

    Raises:
        OSError: If the files cannot be written.
        ValueError: If the text cannot be encoded, or the tokens are not as they were written.
    """
    spec, max_tokens = settings["tokenizer"], settings["max_tokens"]
    key = {"format": FORMAT, "content": content, "tokenizer": spec, "max_tokens": max_tokens}
    if rule.by_document:
        key["split"] = [rule.val, rule.test, rule.seed]
    elif bpe_size(spec):
        key["training_part"] = rule.ends[0]
    tokenizer = None
    if given:
        tokenizer = Tokenizer.from_json(given)
    elif spec != "char" and not bpe_size(spec):
        tokenizer = Tokenizer.pretrained(spec)
    if tokenizer:
        # A checkpoint is often used on its training text: if its tokenizer was made for it, so were the tokens.
        made = _directory(settings, label, key) / "tokenizer.json"
        if not made.exists() or made.read_text(encoding="utf-8", errors="replace") != given:
            key.pop("training_part", None)
            key["digest"] = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()

    def make() -> Tokenizer:
        return tokenizer or make_tokenizer(spec, stored, rule.ends[0], max_tokens)

    def digests(counts: dict[Split, int]) -> dict[Split, str]:
        check(counts)
        return stored["train"].digests if rule.by_document else {}

    directory = _directory(settings, label, key)
    write_tokens(directory, make, stored, dict.fromkeys([*stored, *rule.taken]), max_tokens, digests)
    return open_tokens(directory)


def _directory(settings: Mapping[str, Any], label: str, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", label).strip(".-")[:80]
    return Path(settings["cache_dir"]).expanduser() / f"{name}-{digest[:12]}"
