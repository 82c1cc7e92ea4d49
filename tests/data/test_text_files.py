"""The same text in any files gives the same tokens, and what files are called decides their split."""

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest

from thinned.data import TextDataModule
from thinned.data.sources import walk
from thinned.data.text_sources import TextFiles, read_text

TEXT = 'First line, "quoted".\r\n\r\n  NA\tnull\n\u2028naïve \ufeff 👩‍👧 <|endoftext|>\n' * 3
SPLITS = {"train": TEXT, "val": "valid: " + TEXT, "test": "test: " + TEXT}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def content(suffix: str, text: str) -> bytes:
    """A file of one document."""
    rows = [{"text": text}]
    if suffix in (".csv", ".tsv"):
        file = io.StringIO(newline="")
        csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",").writerows([["text"], [text]])
        return file.getvalue().encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        datasets.Dataset.from_list(rows).to_parquet(buffer)
        return buffer.getvalue()
    if suffix == ".json":
        return json.dumps(rows).encode()
    return json.dumps(rows[0]).encode() if suffix == ".jsonl" else text.encode()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def splits(path: Path, **options: Any) -> dict[str, list[str]]:
    return {split: list(documents) for split, documents in read_text(str(path), **options).splits.items()}


def tokens(path: Path, tmp_path: Path) -> dict[str, list[int]]:
    data = TextDataModule(str(path), context_length=4, cache_dir=str(tmp_path / "tokens"))
    data.setup()
    return {split: part[:].tolist() for split, part in data.tokens.items()}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".JSONL"])
def test_the_same_text_gives_the_same_tokens(suffix: str, packed: str, tmp_path: Path) -> None:
    if suffix == ".parquet" and packed:
        pytest.skip("parquet is compressed inside")
    name = f"some{suffix}{packed}"
    write(tmp_path / "folder", {name: PACK[packed](content(suffix.lower(), TEXT))})
    write(tmp_path, {"plain.txt": TEXT})
    assert splits(tmp_path / "folder") == splits(tmp_path / "folder" / name) == {"train": [TEXT]}
    assert tokens(tmp_path / "folder" / name, tmp_path) == tokens(tmp_path / "plain.txt", tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("ptb.train.txt", "ptb.dev.txt", "ptb.testing.txt"),
        ("train.txt.gz", "val.txt", "test_0.txt"),
        ("train/a.txt", "valid/a.txt", "test/train.txt"),
        ("data/Training/x/a.txt", "data/DEV/a.txt", "data/Test/a.txt"),
        ("train.csv", "eval.csv", "test.csv"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train_0.json.gz", "evaluation_0.parquet", "test.JSONL"),
        ("train/rows.parquet", "val/rows.parquet", "test/rows.parquet"),
        ("train/a.py", "val/train.py", "test/c.py"),
    ],
)
def test_what_is_named_for_a_split_is_in_it(names: tuple[str, ...], tmp_path: Path) -> None:
    for name, text in zip(names, SPLITS.values(), strict=True):
        packed = ".gz" * name.endswith(".gz")
        suffix = Path(name.removesuffix(".gz")).suffix.lower()
        write(tmp_path / "set", {name: PACK[packed](content(suffix, text))})
    write(
        tmp_path / "set", {"README.md": "About it.", ".gitattributes": "*", "extra/notes.md": "More.", "x.png": "PNG"}
    )
    if names[0].endswith((".csv", ".jsonl", ".json.gz", ".parquet")):  # text and rows that are not just about them
        assert read_text(str(tmp_path / "set")).left_out == ["README.md", "extra/notes.md", "x.png"]
    assert splits(tmp_path / "set") == {split: [text] for split, text in SPLITS.items()}


def test_rows_that_look_like_nothing_are_text(tmp_path: Path) -> None:
    rows = ["NA", "null", "n/a", " 12 ", "None", "text"]
    write(tmp_path / "set", {"a.csv": "\n".join(["text", *rows])})
    assert splits(tmp_path / "set") == {"train": rows}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_may_have_any_characters(streaming: bool, tmp_path: Path) -> None:
    """Links too, such as those of the hub's cache to files without a suffix."""
    write(tmp_path / "a [1] *?", {"train[0].jsonl": b'{"text": "yes"}', "blobs/0123": gzip.compress(b'{"text": "no"}')})
    (tmp_path / "a [1] *?/linked.jsonl.gz").symlink_to(tmp_path / "a [1] *?/blobs/0123")
    source = read_text(str(tmp_path / "a [1] *?"), streaming=streaming)
    assert (list(source.splits["train"]), source.left_out) == (["no", "yes"], ["blobs/0123"])


def test_shards_of_a_split_are_in_order(tmp_path: Path) -> None:
    write(tmp_path / "set", {f"train-{i:05d}-of-00012.txt": str(i) for i in reversed(range(12))})
    assert splits(tmp_path / "set") == {"train": [str(i) for i in range(12)]}


class TestWithoutASplitForTraining:
    def test_names_mean_nothing_beside_others(self, tmp_path: Path) -> None:
        write(tmp_path / "set", {"test.txt": "a", "stress_test.md": "b", "valid/c.txt": "c", "story.txt": "d"})
        assert splits(tmp_path / "set") == {"train": ["d", "b", "a", "c"]}

    def test_programs_are_not_splits(self, tmp_path: Path) -> None:
        write(tmp_path / "set", {"train.py": "a", "model.py": "b", "test.py": "c", "config.train.yaml": "d"})
        assert splits(tmp_path / "set") == {"train": ["d", "b", "c", "a"]}

    @pytest.mark.parametrize("suffix", [".txt", ".csv"])
    def test_there_is_no_training(self, suffix: str, tmp_path: Path) -> None:
        write(tmp_path / "set", {f"{name}{suffix}": content(suffix, name + TEXT) for name in ("test", "dev")})
        with pytest.raises(ValueError, match=r"Expected data.path to have a split 'train', but got \['val', 'test'\]"):
            tokens(tmp_path / "set", tmp_path)
        assert splits(tmp_path / "set") == {"test": ["test" + TEXT], "val": ["dev" + TEXT]}


class TestClones:
    """Of the repository of a dataset: what is about the rows is not one of them."""

    @pytest.mark.parametrize("name", ["train.csv", "train.json", "train.jsonl.gz", "train.JSONL", "rows.parquet"])
    def test_have_a_readme(self, name: str, tmp_path: Path) -> None:
        suffix = Path(name.removesuffix(".gz")).suffix.lower()
        rows = PACK[".gz" * name.endswith(".gz")](content(suffix, TEXT))
        about = {
            "README.md": "---\nlicense: mit\n---\n# My corpus\n" * 60,
            ".gitattributes": "*.gz lfs",
            "LICENSE.txt": "x",
        }
        write(tmp_path / "set", {f"data/{name}": rows, **about})
        source = read_text(str(tmp_path / "set"))
        assert {split: list(documents) for split, documents in source.splits.items()} == {"train": [TEXT]}
        assert source.left_out == ["LICENSE.txt", "README.md"]

    def test_may_say_themselves_which_files_are_which(self, tmp_path: Path) -> None:
        configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "other.csv"}]}]
        readme = f"---\nlicense: mit\nconfigs: {json.dumps(configs)}\n---\n"
        write(tmp_path / "set", {"README.md": readme, "train.csv": "text\nno\n", "other.csv": "text\nyes\n"})
        assert splits(tmp_path / "set") == {"train": ["yes"]}


class TestTwoKinds:
    def test_are_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "set", {"notes.txt": "a", "rows.csv": "text\nb\n"})
        write(tmp_path / "two", {"a.json": '[{"text": "a"}]', "rows.csv": "text\nb\n"})
        for name, kinds in (("set", r"\['.csv', 'text'\]"), ("two", r"\['.csv', '.json'\]")):
            with pytest.raises(
                ValueError, match=rf"of one kind for each split in data.path, but got {kinds}: .*leave_out"
            ):
                read_text(str(tmp_path / name))
        assert splits(tmp_path / "set", leave_out=["*.csv"]) == {"train": ["a"]}
        assert splits(tmp_path / "set", leave_out=["notes.txt"]) == {"train": ["b"]}


class TestLeaveOut:
    FILES: ClassVar = {"train.txt": "a", "dev.txt": "b", "valid.txt": "c", "old/train.txt": "d"}

    def test_names_one_of_two_splits(self, tmp_path: Path) -> None:
        write(tmp_path / "set", self.FILES)
        with pytest.raises(ValueError, match=r"one stored split for val in data.path, but got 'dev' and 'valid'"):
            read_text(str(tmp_path / "set"))
        source = read_text(str(tmp_path / "set"), leave_out=["dev", "old"])
        assert {split: list(documents) for split, documents in source.splits.items()} == {"train": ["a"], "val": ["c"]}
        assert source.left_out == ["dev.txt", "old/train.txt"]

    def test_must_be_there(self, tmp_path: Path) -> None:
        write(tmp_path / "set", self.FILES)
        with pytest.raises(ValueError, match=r"leave_out to name files or splits of data.path, but got 'devel'"):
            read_text(str(tmp_path / "set"), leave_out=["devel"])
        with pytest.raises(ValueError, match=r"no data.name, text_column or leave_out for 'pydocs', but got \['a'\]"):
            read_text("pydocs", leave_out=["a"])

    def test_stored_splits_of_any_name(self, tmp_path: Path) -> None:
        rows = {
            name: datasets.Dataset.from_dict({"text": [name]}) for name in ("Train", "DEV", "testing", "unlabelled")
        }
        datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
        source = read_text(str(tmp_path / "set"))
        assert {split: list(documents) for split, documents in source.splits.items()} == {
            "train": ["Train"],
            "val": ["DEV"],
            "test": ["testing"],
        }
        assert source.left_out == ["unlabelled"]
        assert set(splits(tmp_path / "set", leave_out=["testing"])) == {"train", "val"}

    def test_is_said_with_counts(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        write(tmp_path / "set", {"train.txt": TEXT, ".hidden": "x", **{f"{i}.png": "x" for i in range(8)}})
        tokens(tmp_path / "set", tmp_path)
        assert "Left out of data.path: 0.png, 1.png, 2.png, 3.png, 4.png (8 in all)" in caplog.messages


def test_a_linked_folder_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, {"set/a.txt": "a", "elsewhere/b.txt": "b", "elsewhere/deep/c.txt": "c"})
    (tmp_path / "set/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/again").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "set")
    assert sorted(path.read_text() for path in walk(tmp_path / "set")) == ["a", "b", "c"]


class TestBytes:
    def test_nor_is_it_in_rows(self, tmp_path: Path) -> None:
        for suffix in (".csv", ".jsonl"):
            (tmp_path / f"a{suffix}").write_bytes(codecs.BOM_UTF8 + content(suffix, TEXT))
            assert splits(tmp_path / f"a{suffix}") == {"train": [TEXT]}

    def test_that_are_no_text_are_named_by_their_offset_in_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"ab\xff")
        with pytest.raises(ValueError, match=r"hold UTF-8, but got the byte 0xff at offset 5 of .*a.txt$"):
            list(TextFiles([tmp_path / "a.txt"], ""))

    def test_that_are_not_compressed(self, tmp_path: Path) -> None:
        for suffix in (".gz", ".bz2", ".xz"):
            path = tmp_path / f"a.txt{suffix}"
            path.write_bytes(b"plain")
            with pytest.raises(OSError, match=r"Expected data.path to hold text that can be read, but got .*a.txt"):
                list(TextFiles([path], ""))
            path.write_bytes(PACK[suffix](TEXT.encode() * 99)[:-9])
            with pytest.raises(OSError, match=r"Expected data.path to hold text that can be read, but got .*a.txt"):
                list(TextFiles([path], ""))


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    """By one with the same time of change, as an archive or a copy may have it."""
    for rows in ("one\n" * 3, "another\n" * 5):
        (tmp_path / "set.csv").write_text(f"text\n{rows}")
        os.utime(tmp_path / "set.csv", ns=(10**18, 10**18))
        assert list(read_text(str(tmp_path / "set.csv")).splits["train"]) == rows.split()


def test_cells_may_be_separated_by_semicolons(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("id;text\n1;first, of two\n2;second\n")
    documents = read_text(str(tmp_path / "set.csv"), text_column="text").splits["train"]
    assert list(documents) == ["first, of two", "second"]


def test_text_with_commas_that_is_not_quoted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("text\nfirst\nsecond, of two\n")
    with pytest.raises(
        ValueError, match=r"rows that can be read, but got 2 cells instead of 1 in line 3: quote its text"
    ):
        list(read_text(str(tmp_path / "set.csv")).splits["train"])


def test_numbers_keep_their_zeros_wherever_they_begin(tmp_path: Path) -> None:
    rows = ["word"] * 11_000 + ["000123"] * 11_000
    (tmp_path / "set.csv").write_text("text\n" + "\n".join(rows) + "\n")
    assert list(read_text(str(tmp_path / "set.csv")).splits["train"]) == rows


def test_utf_16_without_a_mark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("some text".encode("utf-16-le"))
    with pytest.raises(OSError, match=r"but got a zero byte, which is no text in UTF-8 \(.*text\.txt\)"):
        list(read_text(str(tmp_path / "text.txt")).splits["train"])


def test_a_column_of_splits_is_refused(tmp_path: Path) -> None:
    """Else a test would be trained on."""
    (tmp_path / "set.csv").write_text("text,Split\none,train\ntwo,dev\nthree,train\nfour,test\nfive,extra\n")
    with pytest.raises(ValueError, match=r"a file for each split in data.path, but got splits in the column 'Split'"):
        read_text(str(tmp_path / "set.csv"))


def test_words_in_file_names_are_refused_if_they_may_be_splits(tmp_path: Path) -> None:
    """Else a test would be trained on."""
    write(
        tmp_path / "set", {"train_data.txt": "a", "my-dev.txt": "b", "corpus_TEST_01.txt": "c", "README.md": "About."}
    )
    with pytest.raises(ValueError, match=r"called train, valid and test, but got names such as train_data\.txt"):
        read_text(str(tmp_path / "set"))
    write(tmp_path / "titles", {"strangers_on_a_train.txt": "a", "persuasion.txt": "b", "train_a_dog.txt": "c"})
    assert splits(tmp_path / "titles") == {"train": ["b", "a", "c"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b"{"), ("a.json", b'{"a": 1}'), ("a.jsonl", b"1\n"), ("a.parquet", b"no"), ("a.csv.gz", b"no")],
)
def test_rows_that_cannot_be_read_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"Expected data\.path to hold rows that can be read, but got .*{name}\)$"):
        read_text(str(tmp_path / name))
