"""Documents: from where, in which order, under which split; and what is said of what is no text."""

import json
import os
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from thinned.data.text_sources import TextColumn, TextSource, read_text


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def documents(source: TextSource) -> dict[str, list[str]]:
    read = {split: list(texts) for split, texts in source.splits.items()}
    assert read == {split: list(texts) for split, texts in source.splits.items()}  # each can be read again
    return read


def write_parquet(folder: Path, **splits: dict[str, list[Any]]) -> str:
    folder.mkdir(exist_ok=True)
    for split, columns in splits.items():
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_pydocs() -> None:
    topics = pydoc_data.topics.topics
    source = read_text("pydocs")
    assert documents(source) == {"train": [topics[key] for key in sorted(topics)]}


class TestFiles:
    def test_one_is_a_document_with_its_own_newlines(self, tmp_path: Path) -> None:
        path = tmp_path / "some.text"
        path.write_bytes("a\r\n\rü\n".encode())
        source = read_text(str(path))
        assert documents(source) == {"train": ["a\r\n\rü\n"]}

    def test_of_a_folder_are_sorted_and_are_text(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a/z.md", "a.TXT", "a/b/c.py", "picture.png", ".git/config.txt", "no_suffix", "a/.x.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        (tmp_path / "folder.txt").mkdir()
        assert documents(read_text(str(tmp_path))) == {"train": ["a.TXT", "a/b/c.py", "a/z.md", "b.txt"]}

    def test_content_tells_sources_apart(self, tmp_path: Path) -> None:
        contents = set()
        for number, names in enumerate(({"a.txt": "x"}, {"a.txt": "y"}, {"b.txt": "y"}, {"a.txt": "", "b.txt": "x"})):
            folder = tmp_path / str(number)
            folder.mkdir()
            for name, text in names.items():
                (folder / name).write_text(text)
            contents.add(read_text(str(folder)).content)
            assert read_text(str(folder)).content in contents
        assert len(contents) == 4

    def test_of_the_same_size_and_time_are_told_apart(self, tmp_path: Path) -> None:
        """As an archive has them, which gives all its files one time, or a copy."""
        path = tmp_path / "a.txt"
        contents = set()
        for text in ("old", "new"):
            time.sleep(0.05)  # file systems count time in steps of up to 10 ms
            path.write_text(text)
            os.utime(path, ns=(10**18, 10**18))
            contents.add(read_text(str(path)).content)
        assert len(contents) == 2

    def test_that_are_not_utf8_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("fine")
        (tmp_path / "b.txt").write_bytes(b"ol\xc3\xa9 ol\xe9!")
        message = r"Expected data\.path to hold UTF-8, but got the byte 0xe9 at offset 7 of .*/b\.txt$"
        with pytest.raises(ValueError, match=message):
            documents(read_text(str(tmp_path)))

    def test_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.txt").write_text("a")
        source = read_text(str(tmp_path))
        (tmp_path / "a.txt").unlink()
        with pytest.raises(OSError, match=r"Expected data\.path to hold text that can be read, but got .*a\.txt"):
            documents(source)

    @pytest.mark.parametrize("argument", [{"name": "x"}, {"text_column": "x"}])
    def test_have_no_use_for_what_datasets_have(self, tmp_path: Path, argument: dict[str, Any]) -> None:
        (tmp_path / "a.txt").write_text("a")
        for path in (str(tmp_path / "a.txt"), str(tmp_path), "pydocs"):
            with pytest.raises((ValueError, FileNotFoundError), match=r"Expected .*data\..* but got"):
                read_text(path, **argument)

    def test_of_rows_have_a_readme_beside_them(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
        (tmp_path / "README.md").write_text("not this")
        source = read_text(str(tmp_path))
        assert documents(source) == {"train": ["a"]}
        assert source.left_out == ["README.md"]


@pytest.mark.parametrize("streaming", [False, True])
class TestDatasets:
    def test_splits_are_what_they_are_called(self, tmp_path: Path, streaming: bool) -> None:
        splits = {name: {"text": [name, "and more"]} for name in ("train", "validation", "test")}
        source = read_text(write_parquet(tmp_path / "set", **splits), streaming=streaming)
        assert documents(source) == {
            "train": ["train", "and more"],
            "val": ["validation", "and more"],
            "test": ["test", "and more"],
        }

    def test_saved_to_disk(self, tmp_path: Path, streaming: bool) -> None:
        saved = DatasetDict(train=Dataset.from_dict({"story": ["a", "b"]}), valid=Dataset.from_dict({"story": ["c"]}))
        saved.save_to_disk(tmp_path / "set")
        source = read_text(str(tmp_path / "set"), streaming=streaming)
        assert documents(source) == {"train": ["a", "b"], "val": ["c"]}
        saved["train"].save_to_disk(tmp_path / "single")
        assert documents(read_text(str(tmp_path / "single"), streaming=streaming)) == {"train": ["a", "b"]}

    def test_column(self, tmp_path: Path, streaming: bool) -> None:
        columns = {"id": [1], "title": ["A"], "text": ["a"]}
        path = write_parquet(tmp_path / "set", train=columns)
        assert documents(read_text(path, streaming=streaming)) == {"train": ["a"]}
        title = read_text(path, text_column="title", streaming=streaming)
        assert documents(title) == {"train": ["A"]}
        assert title.content != read_text(path, streaming=streaming).content
        with pytest.raises(ValueError, match=r"data\.text_column .* columns \['title', 'text'\], but got 'id'"):
            read_text(path, text_column="id", streaming=streaming)
        several = write_parquet(tmp_path / "several", train={"a": ["x"], "b": ["y"]})
        with pytest.raises(ValueError, match=r"data\.text_column .* columns \['a', 'b'\], but got None"):
            read_text(several, streaming=streaming)

    def test_column_that_a_split_lacks(self, tmp_path: Path, streaming: bool) -> None:
        saved = DatasetDict(train=Dataset.from_dict({"text": ["a"]}), test=Dataset.from_dict({"story": ["c"]}))
        saved.save_to_disk(tmp_path / "set")
        with pytest.raises(ValueError, match=r"data\.text_column .* columns \['story'\], but got 'text'"):
            read_text(str(tmp_path / "set"), streaming=streaming)

    def test_a_row_without_text(self, tmp_path: Path, streaming: bool) -> None:
        rows = {"text": [*"a" * 300, None]}
        source = read_text(write_parquet(tmp_path / "set", train=rows), streaming=streaming)
        with pytest.raises(ValueError, match=r"text in column 'text' of data\.path, but got None in row 300 of "):
            documents(source)

    def test_content_changes_with_the_files(self, tmp_path: Path, streaming: bool) -> None:
        path = write_parquet(tmp_path / "set", train={"text": ["a"]})
        first = read_text(path, streaming=streaming).content
        assert read_text(path, streaming=streaming).content == first
        write_parquet(tmp_path / "set", train={"text": ["a", "b"]})
        assert read_text(path, streaming=streaming).content != first

    def test_no_train_split(self, tmp_path: Path, streaming: bool) -> None:
        path = write_parquet(tmp_path / "set", test={"text": ["a"]})
        assert documents(read_text(path, streaming=streaming)) == {"test": ["a"]}

    @pytest.mark.parametrize("path", ["./missing", "/no/such/folder", "nobody/nothing"])
    def test_missing(self, path: str, streaming: bool) -> None:
        with pytest.raises(FileNotFoundError, match=rf"Expected data\.path to be 'pydocs', .*, but got '{path}' \("):
            read_text(path, streaming=streaming)

    def test_configuration(self, tmp_path: Path, streaming: bool) -> None:
        for name in ("first", "second"):
            write_parquet(tmp_path / "set", **{name: {"text": [name]}})
        names = [{"config_name": name, "data_files": f"{name}.parquet"} for name in ("first", "second")]
        (tmp_path / "set" / "README.md").write_text(f"---\nconfigs: {json.dumps(names)}\n---\n")
        source = read_text(str(tmp_path / "set"), "second", streaming=streaming)
        assert documents(source) == {"train": ["second"]}
        assert source.content != read_text(str(tmp_path / "set"), "first", streaming=streaming).content
        with pytest.raises(FileNotFoundError, match=r"data\.path .* 'third'"):
            read_text(str(tmp_path / "set"), "third", streaming=streaming)


def test_a_stream_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

    def break_off(*_: Any, **__: Any) -> Any:
        yield {"text": ["a"]}
        raise ConnectionResetError("gone")

    monkeypatch.setattr(datasets.IterableDataset, "iter", break_off)
    with pytest.raises(OSError, match=r"text to the end of column 'text' of data\.path, but got Connection.*gone"):
        list(TextColumn(stored, "text"))
