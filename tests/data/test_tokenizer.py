"""Tokenizers: nothing is lost, bytes are counted, and what is outside a vocabulary is named."""

import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import thinned.data.tokenizer as tokenizer_module
from thinned.data import Tokenizer
from thinned.data.tokenizer import END_OF_TEXT, bpe_size

AWKWARD = [
    "a\r\n\t\x00 \n\n  b\x0b\x85\u2028\ufeff",
    f"end {END_OF_TEXT} and on",
    "e\u0301 \u00e9 👩‍👧 ▁ Ġ ##x <0x0A>",
    " ",
    "",
]


def any_text(seed: int) -> str:
    """300 characters from all of Unicode, half of them ASCII, so that there are words and lines too."""
    draw = random.Random(seed)
    wild = [chr(code) for code in draw.choices(range(0x110000), k=150) if not 0xD800 <= code < 0xE000]
    return "".join(draw.sample(wild + draw.choices(string.printable, k=150), len(wild) + 150))


TEXTS = [*map(any_text, range(20)), *AWKWARD]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.bpe(["the cat sat on the mat, the end"] * 3, 300)


@pytest.fixture(scope="module", params=["char", "bpe"])
def lossless(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return bpe if request.param == "bpe" else Tokenizer.characters(TEXTS)


def like_llama(text: str) -> tokenizers.Tokenizer:
    """A tokenizer with "▁" for spaces, one more at the start of a text, and bytes for what it does not know."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({*text, "▁"} - {" "})]
    ids = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


class TestRoundTrips:
    @pytest.mark.parametrize("text", TEXTS)
    def test_decoding_undoes_encoding(self, lossless: Tokenizer, text: str) -> None:
        ids = lossless.encode(text)
        assert lossless.decode(ids) == text
        assert lossless.token_bytes[ids].sum() == len(text.encode())
        several = lossless.encode_documents([text, "the", text])
        assert [document.tolist() for document in several] == [ids, lossless.encode("the"), ids]

    def test_json_holds_all_of_it(self, lossless: Tokenizer) -> None:
        again = Tokenizer.from_json(lossless.to_json())
        assert again.to_json() == lossless.to_json()
        assert again.vocab_size == lossless.vocab_size
        assert again.end_of_text == lossless.end_of_text
        assert all(again.encode(text) == lossless.encode(text) for text in TEXTS)
        assert torch.equal(again.token_bytes, lossless.token_bytes)


class TestCharacters:
    def test_ids_are_the_ranks_of_the_characters(self) -> None:
        tokenizer = Tokenizer.characters(["ba\n", "é a"])
        assert tokenizer.encode("\n abé") == [0, 1, 2, 3, 4]
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, None)
        assert tokenizer.token_bytes.tolist() == [1, 1, 1, 1, 2]
        assert tokenizer.pieces([4, 0]) == ["é", "\n"]
        assert tokenizer.token_bytes.dtype == torch.int64

    def test_others_are_refused_by_name(self) -> None:
        tokenizer = Tokenizer.characters(["abc"])
        with pytest.raises(ValueError, match=r"vocabulary of the tokenizer, which has 3 .* but got ' ', 'ü'$"):
            tokenizer.encode("a cü")
        with pytest.raises(ValueError, match=r"but got '0', .*, '9'$"):
            tokenizer.encode_documents(["abc", string.digits + string.ascii_uppercase + string.ascii_lowercase + "é"])


class TestBpe:
    def test_learns_what_is_frequent(self, bpe: Tokenizer) -> None:
        assert bpe.pieces(bpe.encode("the cat the")) == ["the", " cat", " the"]
        assert bpe.token_bytes[bpe.encode("the cat")].tolist() == [3, 4]
        assert bpe.vocab_size < 300  # there is nothing left to merge
        assert Tokenizer.bpe(["ab" * 9], 258).vocab_size == 258

    def test_end_of_text_is_no_text(self, bpe: Tokenizer) -> None:
        assert bpe.end_of_text == 0
        assert bpe.token_bytes[0] == 0
        assert (bpe.decode([0]), bpe.pieces([0])) == (END_OF_TEXT, [END_OF_TEXT])
        assert 0 not in bpe.encode(f"a{END_OF_TEXT}b")

    def test_bytes_that_are_no_characters_are_shown_as_such(self, bpe: Tokenizer) -> None:
        assert bpe.pieces(bpe.encode("é\n")) == [r"\xc3", r"\xa9", "\n"]

    def test_size(self) -> None:
        assert Tokenizer.bpe(["ab"], 257).vocab_size == 257


class TestPretrained:
    def test_spaces_and_bytes_that_stand_for_others(self) -> None:
        tokenizer = Tokenizer(like_llama("ab cdé"))
        ids = tokenizer.encode("a é€")
        assert tokenizer.pieces(ids) == [" ", "a", " ", "é", r"\xe2", r"\x82", r"\xac"]  # no <s>
        assert tokenizer.token_bytes[ids].tolist() == [1, 1, 1, 2, 1, 1, 1]
        assert tokenizer.decode(ids) == "a é€"
        assert tokenizer.end_of_text == 2
        assert tokenizer.token_bytes[:3].tolist() == [0, 0, 0]

    def test_words_and_their_parts(self) -> None:
        names = ["[UNK]", "token", "##izer", "the"]
        library = tokenizers.Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
        library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        library.add_special_tokens(["[UNK]"])
        tokenizer = Tokenizer(library)
        assert tokenizer.encode("the tokenizer") == [3, 1, 2]
        assert tokenizer.pieces([1, 2]) == [" token", "izer"]
        assert tokenizer.end_of_text is None
        with pytest.raises(
            ValueError, match="vocabulary of the tokenizer, which has 4 tokens, but got text of other tokens"
        ):
            tokenizer.encode_documents(["the token dog", "the cat"])

    def test_lengths_that_it_was_saved_with_do_not_apply(self, bpe: Tokenizer) -> None:
        library = tokenizers.Tokenizer.from_str(bpe.to_json())
        library.enable_truncation(3)
        library.enable_padding(length=20)
        text = "the cat sat on the mat"
        assert Tokenizer(library).encode(text) == bpe.encode(text)

    def test_from_files(self, tmp_path: Path, bpe: Tokenizer) -> None:
        (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")
        for name in (tmp_path, tmp_path / "tokenizer.json"):
            assert Tokenizer.pretrained(str(name)).encode("the cat") == bpe.encode("the cat")
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"Expected data\.tokenizer to hold a tokenizer as JSON, but got '\{\}'"):
            Tokenizer.pretrained(str(tmp_path))

    def test_from_the_cache_of_the_hub(self, tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")

        def download(name: str, file: str, **options: bool) -> str:
            assert (name, options) == ("someone/something", {"local_files_only": True})  # asks nobody
            return str(tmp_path / file)

        monkeypatch.setattr(tokenizer_module, "hf_hub_download", download)
        assert Tokenizer.pretrained("someone/something").encode("the") == bpe.encode("the")

    @pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/tokenizer.json"])
    def test_that_does_not_exist(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match=rf"Expected data\.tokenizer to be .*, but got '{name}' \(\w+") as e:
            Tokenizer.pretrained(name)
        assert e.value.__suppress_context__


def test_what_may_be_configured() -> None:
    assert [bpe_size(spec) for spec in ("char", "bpe:257", "gpt2", "bpe-like/model")] == [None, 257, None, None]
    for spec in ("", "bpe", "bpe:", "bpe:abc", "bpe:256", "bpe:-300", "bpe:1e3"):
        with pytest.raises(ValueError, match=rf"Expected data\.tokenizer to be 'char', .* but got '{spec}'"):
            bpe_size(spec)


def test_forks_after_encoding_are_quiet_and_can_encode() -> None:
    script = """if True:
        import os, signal
        from thinned.data import Tokenizer
        signal.alarm(30)  # for what could hang; a busy machine may take longer to get here
        tokenizer = Tokenizer.characters(["ab"])
        tokenizer.encode_documents(["ab"] * 100)
        if os.fork():
            print(os.waitstatus_to_exitcode(os.wait()[1]))
        else:
            os._exit(len(tokenizer.encode_documents(["ab"] * 9)))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    source = str(Path(tokenizer_module.__file__).parents[2])
    run = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(run, env=environment | {"PYTHONPATH": source}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("9\n", "")
