"""Bad text, or a network that does not fit it, ends a script with one line and leaves nothing behind.

`Finished.error` is that line; it asserts exit status 1, no traceback, and a working directory as it was before.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[..., Any]

CONFIG = Path(__file__).parents[2] / "configs/gpt_pydocs.yaml"


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tokens are kept, outside of the working directory."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(run_script: Script, small_gpt: Any, text_file: Path, cache: Path) -> Script:
    """Trains a small GPT on the text, with options; returns the error."""

    def run(*options: object) -> str:
        defaults = ("--data.path", text_file, "--data.cache_dir", cache, "--trainer.callbacks=null")
        return run_script("train", "--config", CONFIG, *small_gpt, *defaults, *options).error

    return run


@pytest.fixture
def predict(run_script: Script, trained_text: Any, cache: Path) -> Script:
    """Predicts from a checkpoint, with options; returns the error."""

    def run(*options: object) -> str:
        checkpoint = trained_text.run / "checkpoints/best.ckpt"
        return run_script("predict", "--ckpt_path", checkpoint, "--data.cache_dir", cache, *options).error

    return run


def assert_said(error: str, *said: str) -> None:
    for text in said:
        assert text in error


TEXTS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["data.path"]),
    "not UTF-8": (b"abc" * 100 + b"\xff" + b"abc" * 100, ["data.path", "UTF-8", "0xff", "offset 300"]),
    "cut off within a character": (b"abc" * 100 + "é".encode()[:1], ["data.path", "UTF-8", "0xc3", "offset 300"]),
    "one character": (b"a", ["data.path", "at least"]),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("script", ["train", "predict"])
def test_text(kind: str, script: str, cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Nor are tokens left of it."""
    content, said = TEXTS[kind]
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert_said(request.getfixturevalue(script)("--data.path", path), *said)
    assert not list(cache.iterdir())


def test_text_that_is_shorter_than_a_window(train: Script, cache: Path, tmp_path: Path) -> None:
    """It can be predicted, but there is no training."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc" * 10)
    assert_said(train("--data.path", path), "data.path", "data.context_length", "at least 33", "train")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("path", ["missing.txt", "missing/folder"])
@pytest.mark.parametrize("script", ["train", "predict"])
def test_missing_file(path: str, script: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert_said(request.getfixturevalue(script)("--data.path", tmp_path / path), "data.path", str(tmp_path / path))


def test_folder_without_text(train: Script, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/program.bin").write_bytes(b"\x7fELF")
    assert_said(train("--data.path", tmp_path / "folder"), "data.path", str(tmp_path / "folder"))


def test_characters_outside_the_vocabulary_of_the_checkpoint(predict: Script, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox, she said; " * 50)
    assert_said(predict("--data.path", path), "data.path", "29 tokens", "','", "';'")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("spec", ["bpe:300", "tokenizer.json"])
def test_another_tokenizer_than_that_of_the_checkpoint(spec: str, predict: Script, trained_text: Any) -> None:
    if spec == "tokenizer.json":  # not even the same one
        (stored,) = trained_text.cwd.glob("data/*/tokenizer.json")
        spec = str(stored)
    assert_said(predict("--data.tokenizer", spec), "data.tokenizer", "'char'", spec)


@pytest.mark.parametrize("spec", ["words", "bpe:20", "bpe:many", "missing.json"])
def test_no_such_tokenizer(spec: str, train: Script) -> None:
    assert_said(train("--data.tokenizer", spec), "data.tokenizer", spec)


@pytest.mark.parametrize(("key", "value"), [("context_length", 0), ("val_fraction", 1), ("max_tokens", 0)])
def test_numbers_out_of_range(key: str, value: int, train: Script) -> None:
    error = train(f"--data.{key}", value)
    assert_said(error, f'"data.{key}"', "does not conform to restriction")
    assert str(value) in error.partition("Not of type")[2]
    assert error.count("(") == error.count(")")


NETS = {
    "heads that do not divide the width": ({"num_heads": 3}, ["net.num_heads", "16", "3"]),
    "no heads": ({"num_heads": 0}, ["net.num_heads", "at least 1", "0"]),
    "fewer positions than a window": ({"context_length": 8}, ["model.net.context_length", "32", "8"]),
    "fewer tokens than the vocabulary": ({"vocab_size": 28}, ["model.net.vocab_size", "29", "28"]),
    "dropout of a site that is not there": ({"dropout.atention": 0.1}, ["atention", "did you mean attention?"]),
}


@pytest.mark.parametrize("kind", NETS)
def test_net(kind: str, train: Script) -> None:
    changed, said = NETS[kind]
    options = [part for key, value in changed.items() for part in (f"--model.net.{key}", value)]
    assert_said(train(*options), *said)


def test_longer_windows_than_the_net_of_the_checkpoint_has(predict: Script) -> None:
    assert_said(predict("--data.context_length", 33), "model.net.context_length", "33", "32")
