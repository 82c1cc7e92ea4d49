"""Whatever the layout, the same images have the same splits and classes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thinned.data.image_folder import read_image_folder
from thinned.data.split_names import walk


def draw(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
    return path


def found(root: Path) -> tuple[dict[str, dict[str, object]], list[str]]:
    """The label of each image by its name, by split; and what is left out."""
    splits, left_out = read_image_folder(root, list(walk(root)))
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
    return rows, [path.relative_to(root).as_posix() for path in left_out]


def by_class(root: Path) -> None:
    draw(root / "cat/1.png"), draw(root / "cat/2.png"), draw(root / "dog/3.png")


def nested_deeper(root: Path) -> None:
    draw(root / "cat/old/1.png"), draw(root / "cat/new/2.png"), draw(root / "dog/3.png")


def with_csv(root: Path) -> None:
    for n in "123":
        draw(root / f"images/{n}.png")
    (root / "labels.csv").write_text("file,label\nimages/1.png,cat\n./images/2.png,cat\nimages/3.png,dog\n")


def with_names_alone(root: Path) -> None:
    with_csv(root)
    (root / "labels.csv").write_text("id,label\n1,cat\n2,cat\n3,dog\n")


def with_tsv(root: Path) -> None:
    with_csv(root)
    (root / "labels.csv").rename(root / "labels.tsv").write_text("label\tname\ncat\t1.png\ncat\t2.png\ndog\t3.png\n")


def with_json_lines(root: Path) -> None:
    by_class(root)
    lines = [{"file_name": f"{c}/{n}.png", "label": c} for c, n in (("cat", 1), ("cat", 2), ("dog", 3))]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def with_json(root: Path) -> None:
    by_class(root)
    rows = [{"path": f"{n}.png", "label": c} for c, n in (("cat", 1), ("cat", 2), ("dog", 3))]
    (root / "annotations.json").write_text(json.dumps(rows))


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
        by_class, nested_deeper, with_csv, with_names_alone, with_tsv, with_json_lines, with_json, through_a_link,
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


def test_a_split_that_no_table_names_has_no_labels(tmp_path: Path) -> None:
    draw(tmp_path / "train/1.png"), draw(tmp_path / "test/2.png")
    (tmp_path / "train.csv").write_text("id,label\n1,cat\n")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat"}, "test": {"2.png": None}}


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


@pytest.mark.parametrize(("name", "got"), [("missing", 0), ("1", 2)])
def test_a_name_of_no_image_or_of_two_is_refused(tmp_path: Path, name: str, got: int) -> None:
    for path in ("a/1.png", "b/1.png", "a/2.png", "a/3.png"):
        draw(tmp_path / path)
    (tmp_path / "labels.csv").write_text(f"id,label\n2,cat\n3,dog\n{name},cat\n")
    with pytest.raises(ValueError, match=rf"each image that labels\.csv names, but got {got} of '{name}'"):
        found(tmp_path)


def labels(root: Path, text: str, name: str = "labels.csv") -> dict[str, dict[str, object]]:
    for n in ("0001", "0002", "0003"):
        draw(root / f"part{n[-1]}/{n}.png")
    (root / name).write_text(text.replace("ROOT", str(root)))
    return found(root)[0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("id,label\n0001,cat\n0002,cat\n0003,dog\n", "labels.csv"),  # no numbers
        ("id;label\n0001;cat\n0002;cat\n0003;dog\n", "labels.csv"),
        ("file,label\nROOT/part1/0001.png,cat\nROOT/part2/0002.png,cat\nROOT/part3/0003.png,dog\n", "labels.csv"),
        ("file,label\nset/part1/0001.png,cat\nset/part2/0002.png,cat\nset/part3/0003.png,dog\n", "labels.csv"),
        ("file,label\npart1\\0001.png,cat\npart2\\0002.png,cat\npart3\\0003.png,dog\n", "labels.csv"),
        ('{"0001.png": "cat", "0002.png": "cat", "0003.png": "dog"}', "labels.json"),
        ('{"file": ["0001.png", "0002.png", "0003.png"], "label": ["cat", "cat", "dog"]}', "labels.json"),
    ],
)
def test_tables_name_images_in_many_ways(tmp_path: Path, text: str, name: str) -> None:
    rows = labels(tmp_path / "set", text, name)
    assert rows == {"train": {"0001.png": "cat", "0002.png": "cat", "0003.png": "dog"}}


def test_a_table_with_labels_of_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"each image that labels\.csv names, but got no column with their names of"):
        labels(tmp_path, "code,label\n7,cat\n8,cat\n9,dog\n")


def test_a_table_without_labels_leaves_the_classes_to_the_folders(tmp_path: Path) -> None:
    rows = labels(tmp_path, "file,width\n0001.png,2\n0002.png,2\n0003.png,2\n")
    assert rows == {"train": {f"000{n}.png": f"part{n}" for n in (1, 2, 3)}}


def test_a_row_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected 2 cells in each row of .*labels\.csv, but got 3 in row 3"):
        labels(tmp_path, "id,label\n0001,cat\n0002,cat,large\n0003,dog\n")


def test_tables_of_other_images_are_added_up_and_two_of_one_image_refused(tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("id,label\n0003,dog\n")
    assert labels(tmp_path, "id,label\n0001,cat\n0002,cat\n") == {
        "train": {"0001.png": "cat", "0002.png": "cat", "0003.png": "dog"}
    }
    (tmp_path / "backup.csv").write_text("id,label\n0001,dog\n")
    with pytest.raises(ValueError, match=r"one table of labels for each image in data\.path, but got \w+\.csv beside"):
        found(tmp_path)


def test_one_table_for_folders_of_splits(tmp_path: Path) -> None:
    draw(tmp_path / "train/1.png"), draw(tmp_path / "test/2.png")
    (tmp_path / "labels.csv").write_text("id,label\n1,cat\n2,dog\n")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat"}, "test": {"2.png": "dog"}}


def test_tables_with_the_split_in_a_word(tmp_path: Path) -> None:
    draw(tmp_path / "images/1.png"), draw(tmp_path / "images/2.png")
    for split, row in (("train", "1,cat"), ("test", "2,dog")):
        (tmp_path / f"{split}_labels.csv").write_text(f"id,label\n{row}\n")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat"}, "test": {"2.png": "dog"}}


def test_splits_within_classes(tmp_path: Path) -> None:
    draw(tmp_path / "cat/train/1.png"), draw(tmp_path / "cat/test/2.png"), draw(tmp_path / "dog/train/3.png")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat", "3.png": "dog"}, "test": {"2.png": "cat"}}


def test_folders_with_the_split_in_a_word(tmp_path: Path) -> None:
    draw(tmp_path / "train_images/cat/1.png"), draw(tmp_path / "images-test/cat/2.png")
    assert found(tmp_path)[0] == {"train": {"1.png": "cat"}, "test": {"2.png": "cat"}}


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
