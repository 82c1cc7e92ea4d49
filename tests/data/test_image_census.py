"""The census of images: computed once, and again for what has changed."""

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from thinned.data import image_census
from thinned.data.content_split import content_hash
from thinned.data.image_census import take_census
from thinned.data.image_sources import StoredImages


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all contents that are looked at; every set counts as large."""
    sizes: list[int] = []
    monkeypatch.setattr(image_census, "MANY", 1)
    monkeypatch.setattr(
        image_census, "content_hash", lambda content: sizes.append(len(content)) or content_hash(content)
    )
    return sizes


def files(folder: Path, values: list[int]) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{value}.bmp" for value in values]
    for path, value in zip(paths, values, strict=True):
        Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
    return paths


def in_files(paths: list[Path]) -> StoredImages:
    stored = datasets.Dataset.from_dict({"image": list(map(str, paths))}).cast_column(
        "image", datasets.Image(decode=False)
    )
    return StoredImages(stored, {"train": len(paths)}, paths[0].parent)


def contents_in(sizes: list[int], paths: list[Path]) -> int:
    """How many of the contents, not of the paths, were hashed."""
    return sizes.count(paths[0].stat().st_size)


def test_hashes_are_those_of_the_contents(tmp_path: Path, examined: list[int]) -> None:
    paths = files(tmp_path / "set", [3, 200, 3])
    census = take_census(in_files(paths), tmp_path / "cache")
    assert census["hash"].tolist() == [content_hash(path.read_bytes()) for path in paths]
    assert census["hash"][0] == census["hash"][2] != census["hash"][1]
    assert census["header"].tolist() == [0, 0, 0]


def test_only_files_that_have_changed_are_read_again(tmp_path: Path, examined: list[int]) -> None:
    paths = files(tmp_path / "set", [1, 2, 3, 4])
    first = take_census(in_files(paths), tmp_path / "cache")
    assert contents_in(examined, paths) == 4
    examined.clear()
    assert np.array_equal(take_census(in_files(paths), tmp_path / "cache"), first)
    assert contents_in(examined, paths) == 0
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(paths[1])
    os.utime(paths[1], ns=(0, 1))
    again = take_census(in_files(paths[::-1]), tmp_path / "cache")  # in another order, too
    assert contents_in(examined, paths) == 1
    assert again["hash"].tolist() == [content_hash(path.read_bytes()) for path in paths[::-1]]


def test_a_dataset_is_known_by_its_fingerprint(tmp_path: Path, examined: list[int]) -> None:
    def stored(*values: int) -> StoredImages:
        contents: list[Any] = [
            {"bytes": path.read_bytes(), "path": None} for path in files(tmp_path / str(values), [*values])
        ]
        features = datasets.Features(image=datasets.Image(decode=False))
        return StoredImages(datasets.Dataset.from_dict({"image": contents}, features), {"train": 2}, tmp_path)

    same = stored(5, 6)
    first = take_census(same, tmp_path / "cache")
    examined.clear()
    assert np.array_equal(take_census(same, tmp_path / "cache"), first)
    assert len(examined) == 1  # the key alone
    assert not np.array_equal(take_census(stored(5, 7), tmp_path / "cache"), first)


def test_small_sets_leave_nothing_behind(tmp_path: Path) -> None:
    take_census(in_files(files(tmp_path / "set", [1, 2])), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
