"""No token is tested that was trained on, whatever becomes of the text, its files and the settings."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from lightning.pytorch.trainer.states import TrainerFn

from thinned.data import TextDataModule
from thinned.data.text_split import SplitRule

Make = Callable[..., TextDataModule]
NAMES: tuple[Any, ...] = ("train", "val", "test")


def story(count: int, seed: int = 0) -> list[str]:
    """Documents of five words, none twice."""
    draw = random.Random(seed)
    words = ["some", "birds", "sing", "when", "dawn", "is", "near", "and", "rivers", "run", "low"]
    return [f"{' '.join(draw.choices(words, k=5))} {seed}-{number}." for number in range(count)]


def save(folder: Path, documents: list[str], names: Any = None) -> Path:
    """Writes a file for each document, by default in their order."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for number, text in enumerate(documents):
        (folder / f"{names[number] if names else number:05}.txt").write_text(text)
    return folder


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a data module, of the split of a checkpoint if there is one, after setup."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def ready(path: object, state: Any = None, fits: bool = False, **options: Any) -> TextDataModule:
        data = TextDataModule(str(path), **{"context_length": 8, "cache_dir": str(tmp_path / "cache"), **options})
        if fits:
            data.trainer = Trainer()
        if state:
            data.load_state_dict(state)
        data.setup()
        return data

    return ready


class Trainer:
    """That fits."""

    class state:
        fn = TrainerFn.FITTING


def texts(data: TextDataModule) -> dict[str, str]:
    return {split: data.tokenizer.decode(data.tokens[split][:].tolist()) for split in NAMES}


def documents(data: TextDataModule) -> dict[str, set[str]]:
    return {split: set(text.split("\n\n")) for split, text in texts(data).items()}


SPLIT: dict[str, Any] = {"val_fraction": 0.1, "test_fraction": 0.2}


class TestRule:
    @pytest.mark.parametrize("seed", range(3))
    def test_each_document_is_in_one_split_about_as_often_as_asked(self, seed: int, make: Make, tmp_path: Path) -> None:
        """A count that is 5 standard deviations from its mean has a probability below 1e-6."""
        parts = documents(make(save(tmp_path / "set", story(400, seed)), **SPLIT))
        assert sorted(text for part in parts.values() for text in part) == sorted(story(400, seed))
        assert abs(len(parts["val"]) - 40) < 5 * (400 * 0.1 * 0.9) ** 0.5
        assert abs(len(parts["test"]) - 80) < 5 * (400 * 0.2 * 0.8) ** 0.5

    @pytest.mark.parametrize("seed", range(5))
    def test_growth_order_and_copies_change_no_place(self, seed: int, make: Make, tmp_path: Path) -> None:
        draw = random.Random(seed)
        old = story(300, seed)
        before = documents(make(save(tmp_path / "set", old), **SPLIT))
        now = old + story(draw.randrange(1, 200), seed + 100) + draw.choices(old, k=50)
        draw.shuffle(now)
        after = documents(make(save(tmp_path / "set", now), **SPLIT))
        for split in NAMES:
            assert after[split] & set(old) == before[split]
        assert not after["train"] & after["test"]
        assert not after["val"] & (after["train"] | after["test"])

    def test_depends_on_the_seed_of_the_split_alone(self, make: Make, tmp_path: Path) -> None:
        path = save(tmp_path / "set", story(300))
        first = texts(make(path, **SPLIT))
        assert texts(make(path, **SPLIT, seed=7)) == first
        other = make(path, **SPLIT, split_seed=1)
        assert texts(other) != first
        assert documents(other)["test"] != documents(make(path, **SPLIT))["test"]

    def test_of_few_documents_is_by_position(self, make: Make, tmp_path: Path) -> None:
        """Fifty documents of which a tenth is expected to be five: as nanoGPT's one document, they are cut."""
        path = save(tmp_path / "set", story(50))
        whole = "\n\n".join(story(50))
        parts = texts(make(path))
        assert parts["train"] + parts["val"] == whole
        assert len(parts["train"]) == int(0.9 * len(whole))
        assert texts(make("pydocs"))["train"] == texts(make("pydocs", split_seed=9))["train"]

    def test_a_tenth_is_of_a_hundred_documents(self, make: Make, tmp_path: Path) -> None:
        for count, by_document in ((99, False), (100, True)):
            data = make(save(tmp_path / f"set{count}", story(count)))
            assert data.state_dict()["split"]["by_document"] is by_document

    def test_copies_of_a_document_are_one(self, make: Make, tmp_path: Path) -> None:
        """Three that are there a hundred times would mostly leave a split empty."""
        data = make(save(tmp_path / "set", story(3) * 100), **SPLIT)
        assert data.state_dict()["split"]["by_document"] is False
        assert len(texts(data)["val"]) > 100

    def test_is_the_same_in_files_and_in_rows(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "rows").mkdir()
        datasets.Dataset.from_dict({"text": story(300)}).to_parquet(tmp_path / "rows/a.parquet")
        in_files, *in_rows = [
            texts(make(save(tmp_path / "set", story(300)), **SPLIT)),
            texts(make(tmp_path / "rows", **SPLIT)),
            texts(make(tmp_path / "rows", **SPLIT, streaming=True)),
        ]
        assert in_rows == [in_files] * 2

    def test_only_what_is_not_stored_is_taken(self, make: Make, tmp_path: Path) -> None:
        stored = {"train": story(300), "test": story(5, 9)}
        for name, rows in stored.items():
            (tmp_path / "rows").mkdir(exist_ok=True)
            datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / f"rows/{name}.parquet")
        parts = documents(make(tmp_path / "rows", **SPLIT))
        assert parts["test"] == set(stored["test"])
        assert parts["train"] | parts["val"] == set(stored["train"])

    def test_max_tokens_are_the_first_ones(self, make: Make, tmp_path: Path) -> None:
        data = make(save(tmp_path / "set", story(400)), **SPLIT, max_tokens=5000)
        assert sum(len(data.tokens[split]) for split in NAMES) == 5000
        all_of_it = documents(make(tmp_path / "set", **SPLIT))
        for split, part in documents(data).items():
            assert len(part - all_of_it[split]) <= 1  # the one that is cut off

    def test_hash_is_what_it_was(self) -> None:
        """Another one would move the documents of old checkpoints."""
        rule = SplitRule(0.1, 0.2, 3, by_document=True)
        assert (rule.hash("some text"), rule.split_of(rule.hash("some text"))) == (13257255836018003343, "train")
        assert [rule.split_of(int(place * 2**64)) for place in (0, 0.199, 0.201, 0.899, 0.901)] == [
            "test", "test", "train", "train", "val",
        ]  # fmt: skip


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(caplog.messages)


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


class TestCheckpointOfDocuments:
    @pytest.fixture
    def fitted(self, make: Make, tmp_path: Path) -> TextDataModule:
        return make(save(tmp_path / "set", story(300)), **SPLIT)

    def test_is_small_and_has_no_documents(self, fitted: TextDataModule) -> None:
        split = fitted.state_dict()["split"]
        assert set(split["parts"]) == set(NAMES)
        assert len(str(split)) < 5000
        assert not any(text[:20] in str(split) for text in story(300))

    @pytest.mark.parametrize("fits", [False, True])
    @pytest.mark.parametrize(
        "options", [{}, {"val_fraction": 0.4, "test_fraction": 0.4}, {"split_seed": 5}, {"test_fraction": 0.0}]
    )
    def test_settings_are_kept_and_said(
        self, options: dict[str, Any], fits: bool, fitted: TextDataModule, make: Make, caplog: Any
    ) -> None:
        caplog.clear()
        data = make(fitted.path, fitted.state_dict(), fits, **{**SPLIT, **options})
        assert texts(data) == texts(fitted)
        assert data.state_dict() == fitted.state_dict()
        for key, value in options.items():
            assert f"Kept data.{key} {fitted.hparams[key]} of the checkpoint, instead of {value}" in said(caplog)
            assert data.hparams[key] == fitted.hparams[key]
        assert options or not caplog.messages

    def test_the_order_of_examples_is_kept_in_training_alone(
        self, fitted: TextDataModule, make: Make, caplog: Any
    ) -> None:
        resumed = make(fitted.path, fitted.state_dict(), True, **SPLIT, seed=3)
        assert resumed.hparams["seed"] == 0
        assert caplog.messages == ["Kept data.seed 0 of the checkpoint, instead of 3"]
        assert make(fitted.path, fitted.state_dict(), **SPLIT, seed=3).hparams["seed"] == 3

    def test_nothing_is_said_of_another_order(
        self, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any
    ) -> None:
        caplog.clear()
        data = make(save(tmp_path / "set", story(300)[::-1]), fitted.state_dict(), **SPLIT)
        assert documents(data) == documents(fitted)
        assert not caplog.messages

    @pytest.mark.parametrize("moved", [False, True])
    def test_of_a_set_that_has_grown(
        self, moved: bool, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any
    ) -> None:
        before = documents(fitted)
        path = save(tmp_path / ("moved" if moved else "set"), story(60, 5) + story(300)[::-1])
        for options in ({}, {"split_seed": 1, "test_fraction": 0.5}):
            after = documents(make(path, fitted.state_dict(), **{**SPLIT, **options}))
            assert before["test"] < after["test"]
            assert not after["test"] & before["train"]
            assert not after["val"] & before["train"]

    def test_of_a_set_that_has_shrunk_below_enough(self, fitted: TextDataModule, make: Make, tmp_path: Path) -> None:
        before = documents(fitted)
        after = documents(make(save(tmp_path / "set", story(60)), fitted.state_dict(), **SPLIT))
        assert all(after[split] == before[split] & set(story(60)) for split in NAMES)

    def test_a_test_set_that_is_stored_since_is_not_used(
        self, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any
    ) -> None:
        """It may hold what was trained on."""
        (tmp_path / "both").mkdir()
        save(tmp_path / "both/train", story(300))
        save(tmp_path / "both/test", story(50))
        data = make(tmp_path / "both", fitted.state_dict(), **SPLIT)
        assert documents(data) == documents(fitted)
        assert "Left out of data.path: the stored split test" in said(caplog)

    @pytest.mark.parametrize("count", [3, 300])
    def test_all_of_another_text_is_predicted(
        self, count: int, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any
    ) -> None:
        data = make(save(tmp_path / "other", story(count, 8)), fitted.state_dict(), **SPLIT)
        assert documents(data)["test"] == set(story(count, 8))
        assert "not the text of the checkpoint, so all of it is predicted" in said(caplog)

    def test_training_does_not_resume_on_another_text(self, fitted: TextDataModule, make: Make, tmp_path: Path) -> None:
        path = save(tmp_path / "other", story(300, 8))
        with pytest.raises(ValueError, match="Expected the training text of the checkpoint, but got another one in"):
            make(path, fitted.state_dict(), True, **SPLIT)


LINES = "".join(f"{line}\n" for line in story(60))


class TestCheckpointOfOneText:
    @pytest.fixture
    def fitted(self, make: Make, tmp_path: Path) -> TextDataModule:
        (tmp_path / "text.txt").write_text(LINES)
        return make(tmp_path / "text.txt", **SPLIT)

    @pytest.mark.parametrize("fits", [False, True])
    @pytest.mark.parametrize("options", [{}, {"val_fraction": 0.4, "test_fraction": 0.0}])
    def test_settings_are_kept_and_said(
        self, options: dict[str, Any], fits: bool, fitted: TextDataModule, make: Make, caplog: Any
    ) -> None:
        caplog.clear()
        data = make(fitted.path, fitted.state_dict(), fits, **{**SPLIT, **options})
        assert texts(data) == texts(fitted)
        assert data.state_dict() == fitted.state_dict()
        assert [message.split()[1] for message in caplog.messages] == [f"data.{key}" for key in options]

    def test_split_seed_does_not_matter(self, fitted: TextDataModule, make: Make, caplog: Any) -> None:
        caplog.clear()
        assert texts(make(fitted.path, fitted.state_dict(), split_seed=4, **SPLIT)) == texts(fitted)
        assert not caplog.messages

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("moved", [False, True])
    def test_that_has_grown_at_its_end(
        self, moved: bool, seed: int, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any
    ) -> None:
        added = LINES[: random.Random(seed).randrange(1, len(LINES))]
        path = tmp_path / ("moved.txt" if moved else "text.txt")
        path.write_text(LINES + added)
        for options in ({}, {"val_fraction": 0.05, "test_fraction": 0.05}):
            assert texts(make(path, fitted.state_dict(), **{**SPLIT, **options})) == texts(fitted)
        assert f"has changed since training: the {len(added):,} tokens at its end are in no split" in said(caplog)

    @pytest.mark.parametrize("tokenizer", ["bpe:300", "char"])
    def test_grown_text_has_the_same_training_tokens(self, tokenizer: str, make: Make, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text(LINES)
        fitted = make(tmp_path / "text.txt", **SPLIT, tokenizer=tokenizer)
        (tmp_path / "text.txt").write_text(LINES + LINES[:100])
        data = make(tmp_path / "text.txt", fitted.state_dict(), **SPLIT, tokenizer=tokenizer)
        for split in ("train", "val"):
            assert texts(data)[split] == texts(fitted)[split]

    @pytest.mark.parametrize(
        "change", [lambda text: "s" + text, lambda text: text[:40] + text[41:], lambda text: text[:90]]
    )
    def test_that_has_changed_before_is_refused(
        self, change: Any, fitted: TextDataModule, make: Make, tmp_path: Path
    ) -> None:
        (tmp_path / "text.txt").write_text(change(LINES))
        with pytest.raises(ValueError, match=r"data.path to begin with the [\d,]+ tokens .* has changed before"):
            make(fitted.path, fitted.state_dict(), **SPLIT)

    def test_that_has_changed_in_its_test_is_used(
        self, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any
    ) -> None:
        (tmp_path / "text.txt").write_text(LINES[:-10])
        data = make(fitted.path, fitted.state_dict(), **SPLIT)
        assert texts(data) == {**texts(fitted), "test": texts(fitted)["test"][:-10]}

    def test_is_found_in_a_folder_and_in_rows(self, fitted: TextDataModule, make: Make, tmp_path: Path) -> None:
        (tmp_path / "rows").mkdir()
        datasets.Dataset.from_dict({"text": [LINES]}).to_parquet(tmp_path / "rows/a.parquet")
        assert texts(make(tmp_path / "rows", fitted.state_dict())) == texts(fitted)

    @pytest.mark.parametrize("count", [20, 300])
    def test_all_of_another_text_is_predicted(
        self, count: int, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any
    ) -> None:
        path = save(tmp_path / "other", [text.replace("-", ".") for text in story(count)])
        assert texts(make(path, fitted.state_dict(), **SPLIT))["test"].split("\n\n")[-1].endswith(f".{count - 1}.")
        assert len(documents(make(path, fitted.state_dict(), **SPLIT))["test"]) == count
        assert "not the text of the checkpoint, so all of it is predicted" in said(caplog)

    def test_training_does_not_resume_on_another_text(self, fitted: TextDataModule, make: Make, tmp_path: Path) -> None:
        path = save(tmp_path / "other", [text.replace("-", ".") for text in story(30)])
        with pytest.raises(ValueError, match="Expected the training text of the checkpoint, but got another one in"):
            make(path, fitted.state_dict(), True, **SPLIT)


class TestCheckpointOfStoredSplits:
    ROWS: ClassVar[dict[str, list[str]]] = {"train": story(30), "val": story(5, 1), "test": story(5, 2)}

    @pytest.fixture
    def fitted(self, make: Make, tmp_path: Path) -> TextDataModule:
        return make(self.write(tmp_path / "set", self.ROWS))

    def write(self, folder: Path, rows: dict[str, list[str]]) -> Path:
        folder.mkdir(exist_ok=True)
        for name, texts_ in rows.items():
            (folder / f"{name}.txt").write_text("\n".join(texts_))
        return folder

    def test_are_those_of_the_files(self, fitted: TextDataModule) -> None:
        assert texts(fitted) == {split: "\n".join(rows) for split, rows in self.ROWS.items()}

    def test_another_test_is_used(self, fitted: TextDataModule, make: Make, tmp_path: Path, caplog: Any) -> None:
        path = self.write(tmp_path / "set", {**self.ROWS, "test": story(7, 2)})
        assert texts(make(path, fitted.state_dict()))["test"] == "\n".join(story(7, 2))

    @pytest.mark.parametrize("folder", ["set", "moved"])
    def test_files_that_have_changed_places_are_refused(
        self, folder: str, fitted: TextDataModule, make: Make, tmp_path: Path
    ) -> None:
        swapped = {**self.ROWS, "train": self.ROWS["test"], "test": self.ROWS["train"]}
        with pytest.raises(ValueError, match=r"a test split in data.path that was not trained on, but got that"):
            make(self.write(tmp_path / folder, swapped), fitted.state_dict())

    def test_a_split_that_has_gone_is_refused(self, fitted: TextDataModule, make: Make, tmp_path: Path) -> None:
        (tmp_path / "set/test.txt").unlink()
        with pytest.raises(ValueError, match=r"a stored split 'test', as in training, but got \['train', 'val'\]"):
            make(tmp_path / "set", fitted.state_dict())

    def test_the_split_that_is_asked_for_is_predicted_of_another_text(
        self, fitted: TextDataModule, make: Make, tmp_path: Path
    ) -> None:
        rows = {name: [text.replace("-", ".") for text in texts_] for name, texts_ in self.ROWS.items()}
        data = make(self.write(tmp_path / "other", rows), fitted.state_dict())
        assert texts(data) == {split: "\n".join(texts_) for split, texts_ in rows.items()}

    def test_a_test_alone_can_be_predicted(self, fitted: TextDataModule, make: Make, tmp_path: Path) -> None:
        path = self.write(tmp_path / "other", {"test": [text.replace("-", ".") for text in story(9)]})
        assert texts(make(path, fitted.state_dict()))["test"] == (path / "test.txt").read_text()
        with pytest.raises(ValueError, match=r"Expected the training text of the checkpoint, but got another one in"):
            make(path, fitted.state_dict(), True)
