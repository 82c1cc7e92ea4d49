"""Whatever the layout, the same images have the same splits and classes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thinned.data.image_sources import read_image_folder
from thinned.data.sources import walk


def draw(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
    return path


def found(root: Path) -> tuple[dict[str, dict[str, object]], list[str]]:
    """The label of each image by its name, by split; and what is left out."""
    files = walk(root)
    splits, used = read_image_folder(root, files)
    rows = {
        split: {
            Path(image["path"]).name: label
            for image, label in zip(
                stored["image"],
                stored["label"] if "label" in stored.column_names else [None] * len(stored),
                strict=True,
            )
        }
        for split, stored in splits.items()
    }
    return rows, [path.relative_to(root).as_posix() for path in files if str(path) not in used]


def by_class(root: Path) -> None:
    draw(root / "cat/1.png"), draw(root / "cat/2.png"), draw(root / "dog/3.png")


def nested_deeper(root: Path) -> None:
    draw(root / "cat/old/1.png"), draw(root / "cat/new/2.png"), draw(root / "dog/3.png")


def with_csv(root: Path) -> None:
    for n in "123":
        draw(root / f"images/{n}.png")
    (root / "labels.csv").write_text("file,label\nimages/1.png,cat\n./images/2.png,cat\nimages/3.png,dog\n")


def with_tsv(root: Path) -> None:
    with_csv(root)
    (root / "labels.csv").rename(root / "labels.tsv").write_text(
        "label\tfile_name\ncat\timages/1.png\ncat\timages/2.png\ndog\timages/3.png\n"
    )


def with_json_lines(root: Path) -> None:
    by_class(root)
    lines = [{"file_name": f"{c}/{n}.png", "label": c} for c, n in (("cat", 1), ("cat", 2), ("dog", 3))]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def through_a_link(root: Path) -> None:
    by_class(root.with_name("elsewhere"))
    root.mkdir()
    (root / "cat").symlink_to(root.with_name("elsewhere") / "cat")
    (root / "dog").symlink_to(root.with_name("elsewhere") / "dog")


def with_what_file_managers_leave(root: Path) -> None:
    by_class(root)
    for name in (".DS_Store", "cat/._1.png", "__MACOSX/cat/1.png", ".ipynb_checkpoints/1-checkpoint.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")


@pytest.mark.parametrize(
    "write",
    [
        by_class, nested_deeper, with_csv, with_tsv, with_json_lines, through_a_link,
        with_what_file_managers_leave,
    ],
)  # fmt: skip
def test_layouts_of_the_same_images(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "set")
    assert found(tmp_path / "set") == ({"train": {"1.png": "cat", "2.png": "cat", "3.png": "dog"}}, [])


@pytest.mark.parametrize("top", ["", "data/"])
@pytest.mark.parametrize(("train", "val", "test"), [("train", "val", "test"), ("Training", "DEV", "testing")])
def test_folders_of_splits(tmp_path: Path, top: str, train: str, val: str, test: str) -> None:
    for split, n in ((train, 1), (val, 2), (test, 3)):
        draw(tmp_path / f"{top}{split}/cat/{n}.png")
    assert found(tmp_path)[0] == {train: {"1.png": "cat"}, val: {"2.png": "cat"}, test: {"3.png": "cat"}}


def test_tables_of_splits(tmp_path: Path) -> None:
    for n in "12":
        draw(tmp_path / f"images/{n}.png")
    (tmp_path / "train.csv").write_text("file,label\nimages/1.png,cat\n")
    (tmp_path / "dev.csv").write_text("file,label\nimages/2.png,dog\n")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat"}, "dev": {"2.png": "dog"}}


def test_a_table_in_each_folder(tmp_path: Path) -> None:
    for split, n in (("train", 1), ("test", 2)):
        draw(tmp_path / f"{split}/{n}.png")
        (tmp_path / f"{split}/metadata.csv").write_text(f"file_name,label\n{n}.png,cat\n")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat"}, "test": {"2.png": "cat"}}


@pytest.mark.parametrize("names", [("car", "bus"), ("train", "bus"), ("stress_test", "normal")])
def test_names_of_files_and_classes_are_not_taken_for_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        for file in ("train_1.png", "test.png"):
            draw(tmp_path / name / f"{name}_{file}")
    rows, _ = found(tmp_path)
    assert rows == {"train": {f"{name}_{file}": name for name in sorted(names) for file in ("test.png", "train_1.png")}}


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    assert found(tmp_path) == ({"train": {"1.png": None}}, [])


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    by_class(tmp_path)
    draw(tmp_path / "preview.png")
    (tmp_path / "README.md").write_text("A set.")
    (tmp_path / "prices.csv").write_text("item,price\n9,2\n")
    rows, left_out = found(tmp_path)
    assert len(rows["train"]) == 3
    assert left_out == ["README.md", "preview.png", "prices.csv"]


def test_a_linked_folder_is_followed_once(tmp_path: Path) -> None:
    by_class(tmp_path)
    (tmp_path / "cat/loop").symlink_to(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)] == ["cat/1.png", "cat/2.png", "dog/3.png"]


def test_one_table_for_folders_of_splits(tmp_path: Path) -> None:
    draw(tmp_path / "train/1.png"), draw(tmp_path / "test/2.png")
    (tmp_path / "labels.csv").write_text("file,label\ntrain/1.png,cat\ntest/2.png,dog\n")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat"}, "test": {"2.png": "dog"}}


@pytest.mark.parametrize("top", ["images", "a/b"])
def test_a_single_folder_of_folders_is_gone_into(tmp_path: Path, top: str) -> None:
    by_class(tmp_path / top)
    assert found(tmp_path)[0] == {"train": {"1.png": "cat", "2.png": "cat", "3.png": "dog"}}


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2", "a/9", "b/1", "a/10"):
        draw(tmp_path / f"{name}.png")
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)] == [
        "a/10.png", "a/9.png", "b/1.png", "b/2.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("code,label\n7,cat\n", r"a column file_name beside the labels in .*labels\.csv, but got \['code', 'label'\]"),
        ("file,label\ncat/1.png,cat\ncat/9.png,dog\n", r"each image that a table names, but got no .*cat/9\.png"),
        ("file,label\ncat/1.png,cat\ncat/1.png,dog\n", r"one row for each image in the tables of data\.path, but got"),
        (
            "file,label\ncat/1.png,cat\ncat/2.png,dog,large\n",
            r"rows that can be read, but got 3 cells instead of 2 in line 3: .*labels\.csv",
        ),
    ],
)
def test_a_table_that_does_not_fit_the_images_is_refused(tmp_path: Path, text: str, got: str) -> None:
    by_class(tmp_path)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=got):
        found(tmp_path)


def test_splits_that_are_words_in_names_of_tables_are_refused(tmp_path: Path) -> None:
    """Else the labels for the test would be trained on."""
    draw(tmp_path / "images/1.png"), draw(tmp_path / "images/2.png")
    for split, number in (("train", 1), ("test", 2)):
        (tmp_path / f"{split}_labels.csv").write_text(f"file,label\nimages/{number}.png,cat\n")
    with pytest.raises(ValueError, match=r"called train, valid and test, but got .*train_labels\.csv"):
        found(tmp_path)


def test_splits_within_classes_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "cat/train/1.png"), draw(tmp_path / "cat/test/2.png"), draw(tmp_path / "dog/train/3.png")
    with pytest.raises(ValueError, match=r"Expected classes in folders of splits"):
        found(tmp_path)


def test_splits_that_are_words_in_names_of_folders_are_refused(tmp_path: Path) -> None:
    """They would be classes."""
    for name in ("train_images/cat/1.png", "test_images/cat/2.png"):
        draw(tmp_path / name)
    with pytest.raises(ValueError, match=r"^Expected files or folders of splits .* such as train_images: rename them"):
        found(tmp_path)
