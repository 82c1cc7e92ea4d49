"""Distorted text: how many characters are exchanged, for which, and where; and sources of the standard library."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from thinned.data import TextDataModule


def text_of(data: TextDataModule, name: str = "test") -> str:
    """Returns the text of a loader: the first token, and all that follow."""
    batches = list(getattr(data, f"{name}_dataloader")())
    targets = torch.cat([batch.target.flatten() for batch in batches])
    return data.tokenizer.decode([int(batches[0].input[0, 0]), *targets[targets >= 0].tolist()])


def data_of(path: Path, distortion: str | None = None, **settings: object) -> TextDataModule:
    data = TextDataModule(
        str(path), distortion=distortion, context_length=32, cache_dir=str(path.parent / "data"), **settings
    )
    data.setup()
    return data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 characters: a of probability one half, and b, c and line breaks."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    letters = np.random.default_rng(0).choice(list("aaabc\n"), 100_000)
    path.write_text("".join(letters))
    return path


def test_characters_are_exchanged_at_the_rate(written: Path) -> None:
    """Of 20,000 characters, a share of 0.3 (1 - sum p^2) differs: five standard errors fail once in a million times."""
    plain, other = data_of(written, test_fraction=0.2), data_of(written, "characters:0.3", test_fraction=0.2)
    before, after = (np.array(list(text_of(data))) for data in (plain, other))
    assert len(before) == len(after) == 20_000
    expected = 0.3 * (1 - (0.5**2 + 3 / 6**2))
    error = math.sqrt(expected * (1 - expected) / 20_000)
    assert (before != after).mean() == pytest.approx(expected, abs=5 * error)
    new = after[before != after]
    assert (new == "a").mean() == pytest.approx(0.5 * 0.5 / (1 - (0.5**2 + 3 / 6**2)), abs=0.05)
    assert other.provenance("test", 1.0)["distortion"] == "characters:0.3"


def test_text_is_distorted_for_a_test_alone(written: Path) -> None:
    plain, other = data_of(written), data_of(written, "characters:1")
    for name in ("train", "val"):
        assert text_of(plain, name) == text_of(other, name)
    assert text_of(other, "test") == text_of(other, "predict") == text_of(data_of(written, "characters:1"), "test")
    assert text_of(other, "test") != text_of(plain, "test")


@pytest.mark.parametrize("tokenizer", ["char", "bpe:260"])
def test_nothing_changes_at_rate_0(tokenizer: str, written: Path) -> None:
    texts = [text_of(data_of(written, spec, tokenizer=tokenizer)) for spec in (None, "characters:0")]
    assert texts[0] == texts[1]


def test_tokens_are_made_anew(tmp_path: Path) -> None:
    """Exchanged characters break the tokens of words, so there are more windows, all of which are evaluated."""
    path = tmp_path / "words.txt"
    path.write_text("the yield statement\n" * 5_000)
    plain, other = (data_of(path, spec, tokenizer="bpe:300") for spec in (None, "characters:0.5"))
    number = other.num_examples("test")
    assert number > 1.5 * plain.num_examples("test")
    assert other.provenance("test", 1.0)["examples"] == number
    assert sum(len(batch.index) for batch in other.test_dataloader()) == number


def test_documents_keep_their_ends(tmp_path: Path) -> None:
    """The token between documents is no text, and is not exchanged."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("abcdef\n" * 40)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({**{chr(97 + i): i for i in range(6)}, "Ċ": 6}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer": str(tmp_path / "tokenizer.json"), "leave_out": ["tokenizer.json"], "val_fraction": 0.4}
    plain, other = (data_of(tmp_path, spec, **settings) for spec in (None, "characters:1"))
    before, after = text_of(plain), text_of(other)
    assert before != after
    where = [[i for i in range(len(text)) if text.startswith("<|", i)] for text in (before, after)]
    assert where[0] == where[1] != []


@pytest.mark.parametrize("spec", ["characters", "characters:1.1", "words:0.1", "rotation:30"])
def test_unknown_distortion_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"Expected data\.distortion .*characters.*, but got '"):
        TextDataModule(distortion=spec)


def test_network_of_pydocs_can_predict_the_standard_library(tmp_path: Path) -> None:
    known = TextDataModule(cache_dir=str(tmp_path))
    known.setup()
    code = TextDataModule("stdlib", max_tokens=20_000, cache_dir=str(tmp_path))
    code.load_state_dict(known.state_dict())
    code.setup("predict")
    assert len(code.tokens["test"]) == 20_000
    assert "def " in text_of(code, "predict")
