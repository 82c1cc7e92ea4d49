"""Windows of tokens: each target once in evaluation, a function of seed and epoch in training; and bad input."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import thinned.data.text as text_module
import thinned.data.tokenisation as tokenisation_module
from thinned.data import TextDataModule, TokenBatch
from thinned.data.tokens import TokenBatches, Tokens

Make = Callable[..., TextDataModule]
LETTERS = "".join(chr(ord("a") + i * i % 26) for i in range(500))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a data module of a text file with its cache below the test's directory, after setup."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "letters.txt").write_text(LETTERS)

    def ready(path: str | Path = tmp_path / "letters.txt", text: str | None = None, **kwargs: Any) -> TextDataModule:
        if text is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        data = TextDataModule(str(path), **{"context_length": 8, "cache_dir": str(tmp_path / "cache"), **kwargs})
        data.setup()
        return data

    return ready


@pytest.fixture
def counted(tmp_path: Path) -> Callable[[int], Tokens]:
    """The numbers from 0 as tokens: each says where it is."""

    def write(count: int) -> Tokens:
        np.arange(count, dtype="<u2").tofile(tmp_path / "train.bin")
        return Tokens(tmp_path / "train.bin", "<u2", 0, count)

    return write


def whole(loader: Any, epoch: int = 0) -> TokenBatch:
    """All batches of an epoch as one, by index."""
    loader.sampler.set_epoch(epoch)
    batch = TokenBatch(*map(torch.cat, zip(*loader, strict=True)))
    return TokenBatch(*(part[batch.index.argsort()] for part in batch))


def text(data: TextDataModule, split: Any) -> str:
    return data.tokenizer.decode(data.tokens[split][:].tolist())


class TestSplits:
    def test_by_position(self, make: Make) -> None:
        data = make()
        assert text(data, "train") == LETTERS[: int(0.9 * 500)]
        assert text(data, "val") == text(data, "test") == LETTERS[450:]
        three = make(val_fraction=0.2, test_fraction=0.3)
        assert [text(three, split) for split in ("train", "val", "test")] == [
            LETTERS[:250],
            LETTERS[250:350],
            LETTERS[350:],
        ]

    def test_stored(self, make: Make, tmp_path: Path) -> None:
        def parts(name: str, stored: dict[str, str], **kwargs: Any) -> list[str]:
            (tmp_path / name).mkdir()
            for split, content in stored.items():
                Dataset.from_dict({"text": [content]}).to_parquet(tmp_path / name / f"{split}.parquet")
            data = make(tmp_path / name, val_fraction=0.25, **kwargs)
            return [text(data, split) for split in ("train", "val", "test")]

        train, val, test = LETTERS[:40], "validation", "testing"
        assert parts("a", {"train": train}) == [train[:30], train[30:], train[30:]]
        assert parts("b", {"train": train, "validation": val}) == [train, val, val]
        assert parts("c", {"train": train, "test": test}) == [train[:30], train[30:], test]
        assert parts("d", {"train": train, "test": test}, test_fraction=0.5) == [train[:30], train[30:], test]
        assert parts("e", {"train": train, "validation": val, "test": test}) == [train, val, test]
        assert parts("f", {"train": train, "validation": val}, test_fraction=0.5) == [train[:20], val, train[20:]]

    def test_streaming_some_of_it(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        rows = {"text": [LETTERS[i : i + 50] for i in range(0, 500, 50)]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "train.parquet")
        streamed, stored = (make(tmp_path / "set", streaming=stream, max_tokens=100) for stream in (True, False))
        for data in (streamed, stored):
            assert text(data, "train") + text(data, "val") == f"{LETTERS[:50]}\n\n{LETTERS[50:98]}"
        assert len(os.listdir(tmp_path / "cache")) == 1  # files of rows are always read row by row
        bpe = make(tmp_path / "set", streaming=True, max_tokens=40, tokenizer="bpe:300")
        assert "".join(f"{row}<|endoftext|>" for row in rows["text"]).startswith(text(bpe, "train") + text(bpe, "val"))
        assert sum(len(bpe.tokens[split]) for split in ("train", "val")) == 40

    def test_bpe_is_not_trained_on_validation_text(self, make: Make, tmp_path: Path) -> None:
        content = "abcabdabe " * 90 + "xyzxywxyv " * 10
        data = make(tmp_path / "t.txt", content, tokenizer="bpe:280")
        learned = "".join(data.tokenizer.pieces(range(257, data.vocab_size)))
        assert set(learned) == set("abcde ")
        assert text(data, "train") + text(data, "val") == content + "<|endoftext|>"

    def test_characters_are_those_of_all_splits(self, make: Make, tmp_path: Path) -> None:
        data = make(tmp_path / "t.txt", "ab" * 90 + "xy" * 10)
        assert data.vocab_size == 4


class TestTraining:
    @pytest.mark.parametrize(
        ("count", "length"), [(9, 8), (16, 8), (17, 8), (24, 8), (25, 8), (26, 8), (100, 8), (7, 1)]
    )
    def test_no_window_runs_over_the_end(self, counted: Callable[[int], Tokens], count: int, length: int) -> None:
        split = TokenBatches(counted(count), length, seed=0, training=True)
        offsets = set()
        for epoch in range(100):
            batch = split[epoch, list(range(len(split)))]
            offset = int(batch.input[0, 0])
            offsets.add(offset)
            assert batch.input.flatten().tolist() == list(range(offset, offset + len(split) * length))
            assert torch.equal(batch.target, batch.input + 1)  # and so none is missing
            assert batch.target.max() < count
        # That 100 epochs miss one of 8 offsets has a probability of 1e-5 for a seed drawn at random.
        assert offsets == (set(range(length)) if count > 2 * length else {0})
        assert len(split) == max((count - 1) // length - 1, 1)

    def test_is_a_function_of_seed_and_epoch(self, make: Make) -> None:
        def train(epoch: int, seed: int = 0, **kwargs: Any) -> TokenBatch:
            torch.manual_seed(epoch)
            np.random.seed(epoch)
            return whole(make(seed=seed, **kwargs).train_dataloader(), epoch)

        first = train(3, batch_size=11)
        assert first.index.tolist() == list(range(55))
        again = train(3, batch_size=5)
        assert all(map(torch.equal, first, again))
        assert not torch.equal(train(4, batch_size=11).input, first.input)
        assert not torch.equal(train(3, seed=1, batch_size=11).input, first.input)

    def test_targets_are_the_next_tokens(self, make: Make) -> None:
        data = make(batch_size=5)
        batch = whole(data.train_dataloader(), 2)
        assert [part.dtype for part in batch] == [torch.int64] * 3
        offset = TokenBatches(data.tokens["train"], 8, 0, True).offset(2)
        for index, inputs, targets in zip(batch.index.tolist(), batch.input, batch.target, strict=True):
            start = offset + 8 * index
            assert data.tokenizer.decode(inputs.tolist()) == LETTERS[start : start + 8]
            assert data.tokenizer.decode(targets.tolist()) == LETTERS[start + 1 : start + 9]

    def test_is_shuffled(self, make: Make) -> None:
        order = [next(iter(make(batch_size=20).train_dataloader())).index.tolist() for _ in range(2)]
        assert order[0] == order[1] != sorted(order[0])

    def test_two_processes_see_the_global_batches_of_one(self, make: Make) -> None:
        def batches(rank: int, world_size: int) -> list[TokenBatch]:
            data = make(batch_size=8)
            progress = SimpleNamespace(current=SimpleNamespace(ready=0), is_last_batch=False)
            fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
            data.trainer = SimpleNamespace(
                global_rank=rank,
                world_size=world_size,
                overfit_batches=0.0,
                accumulate_grad_batches=1,
                current_epoch=3,
                fit_loop=fit_loop,
            )
            return list(data.train_dataloader())

        one, first, second = batches(0, 1), batches(0, 2), batches(1, 2)
        assert len(one) == len(first) == len(second) == 55 // 8
        for together, half, other in zip(one, first, second, strict=True):
            for part, a, b in zip(together, half, other, strict=True):
                assert torch.equal(part[0::2], a)
                assert torch.equal(part[1::2], b)

    def test_workers_make_the_same_batches(self, make: Make) -> None:
        one, several = (whole(make(batch_size=5, num_workers=n).train_dataloader(), 1) for n in (0, 2))
        assert all(map(torch.equal, one, several))


class TestEvaluation:
    @pytest.mark.parametrize(("count", "length"), [(2, 8), (8, 8), (9, 8), (10, 8), (17, 8), (100, 8), (5, 1)])
    def test_each_target_is_there_once(self, counted: Callable[[int], Tokens], count: int, length: int) -> None:
        split = TokenBatches(counted(count), length, seed=0, training=False)
        batch = split[7, list(range(len(split)))]
        assert batch.input.shape == (len(split), length)
        targets = batch.target.flatten().tolist()
        inputs = batch.input.flatten().tolist()
        padding = len(targets) - (count - 1)
        assert 0 <= padding < length
        assert targets == [*range(1, count), *[-100] * padding]
        assert inputs == [*range(count - 1), *[0] * padding]
        assert batch.index.tolist() == list(range(len(split)))

    def test_batches_are_in_order(self, make: Make) -> None:
        data = make(eval_batch_size=3, predict_split="val")
        for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
            batches = list(loader)
            assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
            targets = torch.cat([batch.target for batch in batches]).flatten()
            assert data.tokenizer.decode(targets[targets != -100].tolist()) == LETTERS[451:]
        train = TextDataModule(**{**data.hparams, "predict_split": "train"})
        train.setup()
        assert train.tokenizer.decode(next(iter(train.predict_dataloader())).input[0].tolist()) == LETTERS[:8]


def test_fit_windows_are_a_fixed_part_of_the_training_split(make: Make) -> None:
    data = make(text="0123456789" * 40, val_fraction=0.25, eval_batch_size=3)
    windows = [len(data.batches(split, training=False)) for split in ("train", "val")]
    fit = TokenBatch(*map(torch.cat, zip(*data.fit_dataloader(), strict=True)))
    assert len(set(fit.index.tolist())) == len(fit.index) == windows[1] < windows[0]
    assert fit.input[:, 0].equal(data.batches("train", training=False)[0, fit.index.tolist()].input[:, 0])
    assert fit.index.equal(torch.cat([batch.index for batch in data.fit_dataloader()]))


class TestPreparation:
    def test_text_is_tokenised_once(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        first = make()
        monkeypatch.setattr(tokenisation_module, "token_arrays", lambda *_: pytest.fail("tokenised again"))
        second = make(context_length=4, val_fraction=0.3, batch_size=1, seed=7)
        assert text(second, "train") == LETTERS[:350]
        assert second.tokenizer.to_json() == first.tokenizer.to_json()

    def test_stages_share_it(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        data = make()
        tokens = data.tokens
        monkeypatch.setattr(text_module, "read_text", lambda **_: pytest.fail("read again"))
        data.prepare_data()
        data.setup("test")
        assert data.tokens is tokens

    def test_other_text_and_tokenizers_have_their_own(self, make: Make, tmp_path: Path) -> None:
        make()
        make(tokenizer="bpe:257")
        make(tokenizer="bpe:258")
        make(tokenizer="bpe:258", val_fraction=0.5)  # trained on less
        make(max_tokens=200)
        assert text(make(tmp_path / "letters.txt", "changed " * 10), "train") == "changed " * 9
        names = sorted(os.listdir(tmp_path / "cache"))
        assert len(names) == 6
        assert [name[:-13] for name in names] == [*["letters-bpe-257"], *["letters-bpe-258"] * 2, *["letters-char"] * 3]

    def test_net_arguments_need_no_setup(self, tmp_path: Path, make: Make) -> None:
        data = TextDataModule(str(tmp_path / "letters.txt"), context_length=5, cache_dir=str(tmp_path / "cache"))
        assert data.net_arguments(["vocab_size", "context_length", "width"]) == {
            "vocab_size": len(set(LETTERS)),
            "context_length": 5,
        }
        data.setup()
        assert data.vocab_size == len(set(LETTERS))

    def test_pretrained(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text(make(tokenizer="bpe:270").tokenizer.to_json(), encoding="utf-8")
        data = make(tokenizer=str(tmp_path / "tokenizer.json"))
        assert (data.vocab_size, text(data, "train")[:20]) == (270, LETTERS[:20])
        (tmp_path / "tokenizer.json").write_text(make(tokenizer="bpe:280").tokenizer.to_json(), encoding="utf-8")
        assert make(tokenizer=str(tmp_path / "tokenizer.json")).vocab_size == 280


class TestCheckpoint:
    def test_holds_the_tokenizer(self, make: Make, tmp_path: Path) -> None:
        data = make()
        torch.save(data.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state == data.state_dict()
        assert (state["tokenizer"], state["spec"]) == (data.tokenizer.to_json(), "char")
        assert TextDataModule(cache_dir=str(tmp_path)).state_dict() == {}

    @pytest.mark.parametrize("after_setup", [False, True])
    def test_its_tokenizer_encodes_other_text(self, make: Make, tmp_path: Path, after_setup: bool) -> None:
        state = make().state_dict()
        (tmp_path / "other.txt").write_text("zaza" * 20)
        other = TextDataModule(str(tmp_path / "other.txt"), context_length=8, cache_dir=str(tmp_path / "cache"))
        if after_setup:
            other.setup()
            assert other.vocab_size == 2
        other.load_state_dict(state)
        other.setup()
        assert other.net_arguments(["vocab_size"])["vocab_size"] == other.vocab_size == len(set(LETTERS))
        assert text(other, "test") == "zaza" * 20
        assert other.state_dict() == state

    @pytest.mark.parametrize("after_setup", [False, True])
    def test_nothing_is_redone_for_its_own_text(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_setup: bool
    ) -> None:
        state = make(tokenizer="bpe:300").state_dict()
        monkeypatch.setattr(tokenisation_module, "token_arrays", lambda *_: pytest.fail("tokenised again"))
        data = TextDataModule(
            str(tmp_path / "letters.txt"), None, None, "bpe:300", 8, cache_dir=str(tmp_path / "cache")
        )
        if after_setup:
            data.setup()
            tokens = data.tokens
        data.load_state_dict(state)
        data.setup()
        assert not after_setup or data.tokens is tokens
        assert len(os.listdir(tmp_path / "cache")) == 1

    def test_of_another_tokenizer_is_refused(self, make: Make) -> None:
        state = make().state_dict()
        with pytest.raises(ValueError, match=r"data\.tokenizer to be 'char', as the checkpoint has, but got 'bpe:300'"):
            make(tokenizer="bpe:300").load_state_dict(state)

    def test_characters_that_it_does_not_know(self, make: Make, tmp_path: Path) -> None:
        state = make().state_dict()
        other = make(tmp_path / "other.txt", "a!b?" * 30)
        before = os.listdir(tmp_path / "cache")
        with pytest.raises(ValueError, match=r"which has \d+ tokens, but got '!', '\?' \(data\.path, split 'train'\)"):
            other.load_state_dict(state)
        assert os.listdir(tmp_path / "cache") == before


class Count(LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[TokenBatch] = []

    def training_step(self, batch: TokenBatch) -> Tensor:
        self.seen.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: TokenBatch) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning(make: Make, make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    data, model = make(batch_size=11), Count()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, TextDataModule(**data.hparams))
    expected = [batch for epoch in range(2) for batch in at_epoch(data, epoch)]
    assert len(model.seen) == len(expected) == 10
    assert all(
        torch.equal(part, other)
        for pair in zip(model.seen, expected, strict=True)
        for part, other in zip(*pair, strict=True)
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["TextDataModule"]
    assert state == data.state_dict()
    restored = TextDataModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (restored.state_dict(), restored.hparams) == (state, data.hparams)


def at_epoch(data: TextDataModule, epoch: int) -> Iterator[TokenBatch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return iter(loader)


class TestBadInput:
    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("path", "", "to be 'pydocs', 'stdlib', a file of text or rows, .*"),
            ("tokenizer", "bpe:abc", "to be 'char', .*"),
            ("tokenizer", "bpe:10", "to be 'char', .*"),
            ("test_fraction", 0.95, r"below 1 - 0\.1, data\.val_fraction"),
        ],
    )
    def test_arguments(self, key: str, value: Any, expected: str) -> None:
        with pytest.raises(ValueError, match=rf"Expected data\.{key} {expected}, but got {value!r}"):
            TextDataModule(**{key: value})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("context_length", 0),
            ("batch_size", 0),
            ("eval_batch_size", -1),
            ("val_fraction", 0.0),
            ("test_fraction", 1.5),
            ("predict_split", "all"),
            ("max_tokens", 0),
            ("num_workers", -1),
            ("seed", -1),
        ],
    )
    def test_numbers_out_of_range_are_refused_by_the_command_line(self, key: str, value: Any) -> None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(TextDataModule, "data")
        with pytest.raises(ArgumentError, match=rf'(?s)"{key}".*{value}'):
            parser.parse_args(["--data", "TextDataModule", f"--data.{key}", str(value)])

    def test_numbers_of_the_command_line_are_primitives_in_a_checkpoint(self) -> None:
        parser = ArgumentParser()
        parser.add_subclass_arguments(TextDataModule, "data")
        numbers = {"context_length": 8, "val_fraction": 0.2, "test_fraction": 0.5, "max_tokens": 9, "split_seed": 1}
        given = {**numbers, "leave_out": ["*.csv", "dev"]}
        options = [f"--data.{key}={json.dumps(value)}" for key, value in given.items()]
        data = parser.instantiate(parser.parse_args(["--data=TextDataModule", *options])).data
        assert {key: (value, type(value)) for key, value in data.hparams.items() if key in given} == {
            key: (value, type(value)) for key, value in given.items()
        }

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            (
                {"context_length": 450},
                r"at least 451 tokens for train \(data.context_length and one\), but got 450 of the 500 in",
            ),
            ({"context_length": 8, "max_tokens": 9}, "at least 9 tokens for train .*, but got 8 of the 9"),
            (
                {"val_fraction": 0.001},
                "at least 2 tokens for val .*, but got 1 of the 500 .* a larger data.val_fraction",
            ),
            ({"test_fraction": 0.001}, "at least 2 tokens for test .*, but got 1 of .* a larger data.test_fraction"),
        ],
    )
    def test_too_little_text(self, make: Make, tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(**kwargs)
        assert list((tmp_path / "cache").iterdir()) == []
        if "max_tokens" not in kwargs:
            make()
            with pytest.raises(ValueError, match=message):  # of tokens that are there
                make(**kwargs)

    @pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
    def test_no_text(self, make: Make, tmp_path: Path, tokenizer: str) -> None:
        Dataset.from_dict({"text": ["", ""]}).save_to_disk(tmp_path / "set")
        with pytest.raises(ValueError, match=r"at least 9 tokens for train .*, but got 0 of the 0 in data\.path"):
            make(tmp_path / "set", tokenizer=tokenizer)
        assert list((tmp_path / "cache").iterdir()) == []

    @pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
    def test_an_empty_file(self, make: Make, tmp_path: Path, tokenizer: str) -> None:
        with pytest.raises(ValueError, match=r"at least 9 tokens for train .*, but got 0 of the 0 in data\.path"):
            make(tmp_path / "empty.txt", "", tokenizer=tokenizer)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_bytes_that_are_no_text(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "bad.txt").write_bytes(b"abc" * 50 + b"\xff")
        with pytest.raises(ValueError, match=r"data\.path to hold UTF-8, but got the byte 0xff at offset 150 of .*bad"):
            make(tmp_path / "bad.txt")
        assert not (tmp_path / "cache").exists()

    def test_a_full_disk(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(tokenisation_module, "token_arrays", full)
        with pytest.raises(OSError, match=r"data\.cache_dir, but got .*No space left"):
            make()
        assert list((tmp_path / "cache").iterdir()) == []
