"""Turns text into token ids and back, by the Hugging Face `tokenizers` library.

Character tokens are a word-level model whose words are single characters. Byte-level BPE follows GPT-2 (Radford et al.,
"Language Models are Unsupervised Multitask Learners", 2019): its vocabulary has the 256 bytes, so it covers all text.

Shapes: V tokens in the vocabulary.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # of GPT-2, Llama 3, Llama 2 and Gemma
MIN_BPE_SIZE = 257  # the bytes and the end of text
EXPECTED = (
    f"'char', 'bpe:<size>' with a size of at least {MIN_BPE_SIZE}, a tokenizer.json, a folder with one, or the id of a "
    "model on the Hugging Face Hub that has one"
)


def bpe_size(spec: str) -> int | None:
    """Returns the size in "bpe:<size>", or None for "char" or a pretrained tokenizer; ValueError if it is invalid."""
    kind, _, size = spec.partition(":")
    if spec and kind != "bpe":
        return None
    if size.isdecimal() and int(size) >= MIN_BPE_SIZE:
        return int(size)
    raise ValueError(f"Expected data.tokenizer to be {EXPECTED}, but got {spec!r}")


class Tokenizer:
    """Encodes text as ids and decodes them.

    Names of special tokens in a text are encoded as ordinary text, so a document cannot end itself. A prompt can.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._names = [tokenizer.id_to_token(index) or "" for index in range(size)]  # ids may have gaps
        word_level = isinstance(tokenizer.model, models.WordLevel) and isinstance(tokenizer.decoder, decoders.Fuse)
        self.by_character = word_level and all(len(name) == 1 for name in self._names)

    @classmethod
    def characters(cls, documents: Iterable[str]) -> Self:
        """Returns the tokenizer whose tokens are the characters of the documents, in Unicode order."""
        has_point = np.zeros(sys.maxunicode + 1, bool)
        for document in documents:
            has_point[code_points(document)] = True
        ids = {chr(point): index for index, point in enumerate(np.flatnonzero(has_point))}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(ids))
        # In this syntax of regular expressions, a dot under (?m) also matches a newline.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return cls(tokenizer)

    @classmethod
    def bpe(cls, documents: Iterable[str], vocab_size: int) -> Self:
        """Returns a byte-level BPE tokenizer of `vocab_size` tokens, or fewer, trained on the documents.

        The library's trainer holds about 100 bytes for each character of a document, so long ones come in pieces.
        """
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return cls(tokenizer)

    @classmethod
    def pretrained(cls, name: str) -> Self:
        """Returns the tokenizer of a tokenizer.json, of a folder with one, or of a model on the hub or in its cache."""
        path = Path(name).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            try:
                path = Path(_cached_or_downloaded(name))
            except Exception as error:  # the type differs between versions of the client
                cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
                got = f"{name!r} ({cause})"
                raise FileNotFoundError(f"Expected data.tokenizer to be {EXPECTED}, but got {got}") from None
        return cls.from_json(path.read_text(encoding="utf-8", errors="replace"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns the tokenizer in the JSON of `to_json`; ValueError if there is none."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exceptions
            got = f"{text[:40]!r} ({error})"
            raise ValueError(f"Expected data.tokenizer to hold a tokenizer as JSON, but got {got}") from None

    def to_json(self) -> str:
        """Returns the whole tokenizer in the format of tokenizer.json."""
        return self._tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Number V of tokens."""
        return len(self._names)

    @cached_property
    def end_of_text(self) -> int | None:
        """The id that separates documents; None if the vocabulary has none."""
        ids = map(self._tokenizer.token_to_id, ENDS_OF_TEXT)
        return next((index for index in ids if index is not None), None)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; ValueError if it has characters outside the vocabulary."""
        return self.encode_documents([text])[0].tolist()

    def encode_documents(self, documents: list[str]) -> list[np.ndarray]:
        """Returns the ids of each document as integers, encoded in threads; ValueError as for `encode`."""
        if self.by_character:
            # A table of code points is forty times as fast as the library.
            ids = [self._id_of_point.take(code_points(document), mode="clip") for document in documents]
            unknown: int | None = -1
        else:
            encodings = self._tokenizer.encode_batch_fast(documents, add_special_tokens=False)
            ids = [np.array(encoding.ids, np.int64) for encoding in encodings]
            unknown = self._unknown
        for document, of_document in zip(documents, ids, strict=True):
            if (outside := of_document == unknown).any():
                characters = code_points(document)[outside] if self.by_character else []
                named = ", ".join(repr(chr(point)) for point in np.unique(characters)[:10])
                within = f"the vocabulary of the tokenizer, which has {self.vocab_size} tokens"
                raise ValueError(f"Expected text within {within}, but got {named or 'text of other tokens'}")
        return ids

    @cached_property
    def _id_of_point(self) -> np.ndarray:
        """The id of each code point, int32; -1 if it has none, as the last one."""
        points = np.array([ord(name) for name in self._names], np.int64)
        ids = np.full(points.max(initial=0) + 2, -1, np.int32)
        ids[points] = np.arange(len(points))
        return ids

    @cached_property
    def _unknown(self) -> int | None:
        """The id of text outside the vocabulary; None if there is none."""
        model = json.loads(self.to_json())["model"]
        return model["unk_id"] if "unk_id" in model else self._tokenizer.token_to_id(model.get("unk_token") or "")

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special tokens appear by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        r"""Returns the text of each token, special ones by name; bytes that are not a whole character as `\xe2`."""
        return [self._bytes[index].decode(errors="backslashreplace") or self._names[index] for index in ids]

    @cached_property
    def token_bytes(self) -> Tensor:
        """Number of UTF-8 bytes of each token, 0 for a special one, (V,) int64."""
        return torch.tensor([len(token) for token in self._bytes], dtype=torch.int64)

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The text of each token as UTF-8; empty for a special one."""
        if self.by_character:
            return [name.encode() for name in self._names]
        if isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            # A byte stands for itself as a character, or for the next one from U+0100 on.
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            own = {character: ord(character) for character in alphabet if ord(character) < 256}
            byte_of = own | dict(zip(alphabet[len(own) :], sorted({*range(256)} - {*own.values()}), strict=True))
            found = [bytes(byte_of.get(character, 0) for character in name) for name in self._names]
        else:
            # The text that a token adds to another one; alone, it may lose its leading space.
            anchor = (self._tokenizer.encode("a", add_special_tokens=False).ids or [0])[-1]
            skip = len(self.decode([anchor]))
            texts = [self.decode([anchor, index])[skip:] for index in range(self.vocab_size)]
            fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}  # of Llama 2, for rare characters
            found = [fallback.get(name, text.encode()) for name, text in zip(self._names, texts, strict=True)]
        for index, token in self._tokenizer.get_added_tokens_decoder().items():
            found[index] = b"" if token.special else token.content.encode()
        return found


def _cached_or_downloaded(name: str) -> str:
    try:
        return hf_hub_download(name, "tokenizer.json", local_files_only=True)
    except LocalEntryNotFoundError:
        HfApi().model_info(name, timeout=5)  # fails at once if the hub is out of reach; a download tries for 23 seconds
        return hf_hub_download(name, "tokenizer.json")


def code_points(text: str) -> np.ndarray:
    """Returns the code point of each character of a text, (n,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
