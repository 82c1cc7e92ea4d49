"""Files of tokens: borders, damage, what separates documents, and builds that break off or run at the same time."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers

import thinned.data.tokenisation as tokenisation_module
from thinned.data import Tokenizer
from thinned.data.tokenisation import cached_tokens, in_pieces, make_tokenizer, token_arrays, write_tokens
from thinned.data.tokens import Tokens

Build = Callable[..., dict[str, Tokens]]


def labelled(documents: Iterable[str], split: Any = "train") -> Iterator[Any]:
    """Documents as they come from a stored split."""
    return ((split, text) for text in documents)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache" / "tokens"


@pytest.fixture
def build(directory: Path) -> Build:
    """Writes tokens of characters and opens them."""

    def run(max_tokens: int | None = None, **splits: Any) -> dict[str, Tokens]:
        make = Tokenizer.characters
        stored = {split: labelled(documents, split) for split, documents in splits.items()}

        def write(folder: Path) -> None:
            write_tokens(folder, make(["abcdefghij\n"]), stored, stored, max_tokens)

        return cached_tokens(directory, write).tokens

    return run


def pieces(document: str, tokenizer: Tokenizer | None = None) -> list[str]:
    return [piece for _, piece in in_pieces([("train", document)], tokenizer)]


def joined(arrays: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([tokens for _, tokens in arrays])


def text(tokens: Tokens) -> str:
    return Tokenizer.characters(["abcdefghij\n"]).decode(tokens[:].tolist())


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def awkward_lines() -> str:
    lines = ["def f(x):", "    return x  ", "", "\tpass", "\r", "it's 42!!", "  ", "naïve", "end.\r", "!\x1c\u3000x"]
    return "\n".join(np.random.default_rng(0).choice(lines, 400))


class TestReading:
    def test_of_any_part(self, build: Build) -> None:
        tokens = build(train=["abcdefghij"])["train"]
        whole = np.arange(1, 11)
        for start in range(11):
            for stop in range(start, 11):
                assert tokens[start:stop].tolist() == whole[start:stop].tolist()
                part = tokens.part(start, stop)
                assert len(part) == stop - start
                assert part[:].tolist() == whole[start:stop].tolist()
        assert tokens[:1].dtype == np.int64
        assert tokens.part(2, 9).part(3, 5)[1:2].tolist() == [7]
        assert tokens.part(2, 5)[1:9].tolist() == [4, 5]  # it ends where the part does
        with pytest.raises(AssertionError):
            tokens.part(2, 5).part(0, 4)

    def test_a_file_that_is_cut_off_is_an_error(self, build: Build, directory: Path) -> None:
        tokens = build(train=["abcdef"])["train"]
        os.truncate(tokens.path, 6)
        assert tokens[:3].tolist() == [1, 2, 3]
        with pytest.raises(ValueError, match=rf"but got a shorter file {tokens.path}: start again to make"):
            tokens[2:4]

    def test_pickles_where_the_tokens_are_and_not_what_they_are(self, build: Build) -> None:
        tokens = build(train=["abc" * 10_000])["train"]
        first = tokens[5:9].tolist()
        pickled = pickle.dumps(tokens)
        assert len(pickled) < 1000
        assert pickle.loads(pickled)[5:9].tolist() == first

    def test_files_that_are_deleted_stay_readable(self, build: Build, directory: Path) -> None:
        splits = build(train=["abc"], test=["de"])
        shutil.rmtree(directory)
        assert [text(splits["train"]), text(splits["test"].part(1, 2))] == ["abc", "e"]

    @pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
    def test_tokens_are_as_wide_as_the_vocabulary_needs(self, directory: Path, vocab_size: int, dtype: str) -> None:
        characters = "".join(map(chr, range(0xE000, 0xE000 + vocab_size)))
        tokenizer = Tokenizer.characters([characters])
        stored = {"train": labelled([characters[::-1]])}
        write = partial(write_tokens, tokenizer=tokenizer, stored=stored, splits=stored, max_tokens=None)
        tokens = cached_tokens(directory, write).tokens["train"]
        assert tokens.dtype == dtype
        assert tokens.path.stat().st_size == vocab_size * int(dtype[-1])
        assert tokens[:vocab_size].tolist() == list(range(vocab_size))[::-1]


class TestDocuments:
    def test_characters_have_a_blank_line_between_them(self, build: Build) -> None:
        splits = build(train=["ab", "", "c\n", "d"], val=["e"])
        assert text(splits["train"]) == "ab\n\nc\n\n\nd"
        assert text(splits["val"]) == "e"

    def test_end_of_text_is_after_each(self) -> None:
        bpe = Tokenizer.bpe(["ab"], 257)
        tokens = joined(token_arrays(labelled(["ab", "", "c"]), bpe))
        assert tokens.tolist() == [*bpe.encode("ab"), 0, *bpe.encode("c"), 0]

    def test_max_tokens_is_exact_and_reads_no_further(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenisation_module, "GROUP", 3)

        def endless() -> Iterator[str]:
            yield from ["abcd", "efgh"]
            pytest.fail("read too far")

        splits = build(max_tokens=8, train=endless(), val=["abc"])
        assert text(splits["train"]) == "abcd\n\nef"
        assert text(splits["val"]) == "abc"

    @pytest.mark.parametrize("kind", ["char", "bpe"])
    def test_cuts_leave_the_tokens_as_they_are(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenisation_module, "PIECE", 40)
        monkeypatch.setattr(tokenisation_module, "GROUP", 100)
        document = awkward_lines()
        tokenizer = Tokenizer.characters([document]) if kind == "char" else Tokenizer.bpe([document], 400)
        cut = list(pieces(document, tokenizer))
        assert len(cut) > 30
        assert "".join(cut) == document
        end = [] if kind == "char" else [0]
        assert joined(token_arrays(labelled([document]), tokenizer)).tolist() == tokenizer.encode(document) + end

    def test_a_tokenizer_that_marks_the_start_of_a_text_gets_it_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenisation_module, "PIECE", 4)
        ids = {name: index for index, name in enumerate("▁ab\n")}
        library = tokenizers.Tokenizer(models.BPE(ids, []))
        library.normalizer = normalizers.Prepend("▁")
        document = "a\nb\n" * 9
        assert list(pieces(document, Tokenizer(library))) == [document]
        assert len(list(pieces(document, Tokenizer.bpe(["a"], 257)))) == 9


class Stored:
    """Documents that can be read again, each with its split: the name, unless another is given."""

    def __init__(self, documents: list[str], *splits: str) -> None:
        self.pairs = list(zip(splits or ["train"] * len(documents), documents, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pairs)


class TestTokenizers:
    def test_bpe_sees_the_training_part_alone(self) -> None:
        stored: Any = {"train": Stored(["abab" * 20, "cdcd" * 60]), "val": Stored(["efef" * 99], "val")}
        names = make_tokenizer("bpe:400", stored, 0.25, None).pieces(range(257, 262))
        assert set("".join(names)) == set("ab")
        # half of it is 160 characters
        assert set("".join(make_tokenizer("bpe:400", stored, 0.5, None).pieces(range(257, 265)))) == set("abcd")

    def test_bpe_learns_from_pieces_what_it_learns_from_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        document = awkward_lines()
        monkeypatch.setattr(tokenisation_module, "PIECE", 20)
        assert len(list(pieces(document))) > 100
        in_pieces = make_tokenizer("bpe:400", {"train": Stored([document])}, 1.0, None)
        assert in_pieces.to_json() == Tokenizer.bpe([document], 400).to_json()

    def test_bpe_sees_the_training_documents_alone(self) -> None:
        stored: Any = {"train": Stored(["abab" * 20, "cdcd" * 20, "efef" * 20], "train", "val", "train")}
        tokenizer = make_tokenizer("bpe:400", stored, 1, None)
        assert set("".join(tokenizer.pieces(range(257, tokenizer.vocab_size)))) == set("abef")

    def test_bpe_sees_no_more_than_the_tokens_that_are_kept(self) -> None:
        stored: Any = {"train": Stored(["é" * 50, "ab" * 50])}
        tokenizer = make_tokenizer("bpe:400", stored, 1.0, 100)  # bytes, if nothing is merged
        assert set("".join(tokenizer.pieces(range(257, tokenizer.vocab_size)))) == {"é"}

    def test_characters_are_those_of_all_text_that_is_kept(self) -> None:
        stored: Any = {"train": Stored(["ab", "c"]), "val": Stored(["xyz"], "val")}
        assert make_tokenizer("char", stored, 0.5, None).decode(range(7)) == "\nabcxyz"
        assert make_tokenizer("char", stored, 0.5, 2).decode(range(5)) == "\nabxy"
        nothing_to_separate: Any = {"train": Stored(["ab", ""])}
        assert make_tokenizer("char", nothing_to_separate, 0.5, None).vocab_size == 2


class TestFailures:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("bad text")])
    def test_leave_nothing(self, build: Build, tmp_path: Path, error: BaseException) -> None:
        def breaks_off() -> Iterator[str]:
            yield "abc"
            raise error

        with pytest.raises(type(error)):
            build(train=["abc"], val=breaks_off())
        assert below(tmp_path / "new/cache") == []
        assert text(build(train=["abc"])["train"]) == "abc"

    def test_leave_what_others_have_written(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "mine").touch()
        with pytest.raises(ValueError, match=r"but got 'x' \(data\.path, split 'val'\)"):
            build(train=["abc"], val=["x"])
        assert below(tmp_path) == ["new", "new/cache", "new/mine"]

    def test_a_full_disk(self, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(tokenisation_module, "token_arrays", full)
        with pytest.raises(
            OSError, match=r"data\.cache_dir, but got OSError \(.*No space left.*\) for .*/cache/tokens"
        ):
            build(train=["abc"])
        assert below(tmp_path / "new/cache") == []

    def test_a_cache_that_is_no_folder(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "new").touch()
        with pytest.raises(OSError, match=r"Expected to write tokens to data\.cache_dir, but got NotADirectoryError"):
            build(train=["abc"])


class TestReuse:
    def test_a_directory_that_is_there_is_left_alone(self, build: Build, directory: Path) -> None:
        build(train=["abc"])
        before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
        directory.parent.chmod(0o500)
        assert text(build(train=iter(lambda: pytest.fail("read again"), None))["train"]) == "abc"
        directory.parent.chmod(0o700)
        assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "train.bin").write_bytes(b"\1\0\2\0"),
            lambda folder: (folder / "train.bin").write_bytes(b"\1\0\2\0\3\0\4\0"),
            lambda folder: (folder / "train.bin").write_bytes(b""),
            lambda folder: (folder / "train.bin").unlink(),
            lambda folder: (folder / "manifest.json").unlink(),
            lambda folder: (folder / "manifest.json").write_text("{}"),
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
        ],
    )
    def test_damage_is_made_anew(self, build: Build, directory: Path, damage: Any) -> None:
        build(train=["abc"])
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        damage(directory)
        assert text(build(train=["abc"])["train"]) == "abc"
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
        assert [path.name for path in directory.parent.iterdir()] == [directory.name]

    def test_manifest(self, build: Build, directory: Path) -> None:
        build(train=["abc"], val=["a"])
        manifest = json.loads((directory / "manifest.json").read_text())
        assert manifest == {"dtype": "<u2", "tokens": {"train": 3, "val": 1}, "sketch": ""}


def slow_build(directory: Path, log: Path, fail_first: bool) -> None:
    """Builds in a second of many processes, and writes down that it has."""

    def tokenizer() -> Tokenizer:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.5)
        if fail_first and len(log.read_text().split()) == 1:
            raise ValueError("the first one fails")
        return Tokenizer.characters(["abc"])

    stored = {"train": labelled(["abc"])}

    def write(folder: Path) -> None:
        write_tokens(folder, tokenizer(), stored, stored, None)

    found = cached_tokens(directory, write)
    assert found.tokens["train"][:3].tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("fail_first", [False, True])
def test_of_several_processes_one_builds(tmp_path: Path, fail_first: bool) -> None:
    fork = multiprocessing.get_context("fork")
    arguments = (tmp_path / "tokens", tmp_path / "log", fail_first)
    processes = [fork.Process(target=slow_build, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert sorted(process.exitcode for process in processes) == [0, 0, int(fail_first)]
    assert (tmp_path / "log").read_text().split() == ["built"] * (1 + fail_first)
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".partial", ".bin")] == []
