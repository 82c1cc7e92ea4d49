"""The census of images: computed once, and again for what has changed."""

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from thinned.data import image_store
from thinned.data.content_split import content_hash
from thinned.data.image_store import StoredImages, channel_statistics


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all contents that are looked at; every set counts as large."""
    sizes: list[int] = []
    monkeypatch.setattr(image_store, "MANY", 1)
    monkeypatch.setattr(
        image_store, "content_hash", lambda content: sizes.append(len(content)) or content_hash(content)
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
    return StoredImages(stored, {"train": range(len(paths))}, paths[0].parent)


def test_hashes_are_those_of_the_contents(tmp_path: Path, examined: list[int]) -> None:
    paths = files(tmp_path / "set", [3, 200, 3])
    census = in_files(paths).census(tmp_path / "cache")
    assert census["hash"].tolist() == [content_hash(path.read_bytes()) for path in paths]
    assert census["hash"][0] == census["hash"][2] != census["hash"][1]
    assert census["header"].tolist() == [0, 0, 0]


def test_files_are_read_again_if_one_has_changed(tmp_path: Path, examined: list[int]) -> None:
    paths = files(tmp_path / "set", [1, 2, 3, 4])
    first = in_files(paths).census(tmp_path / "cache")
    assert examined.count(paths[0].stat().st_size) == 4
    examined.clear()
    assert np.array_equal(in_files(paths).census(tmp_path / "cache"), first)
    assert examined.count(paths[0].stat().st_size) == 0
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(paths[1])
    os.utime(paths[1], ns=(0, 1))
    again = in_files(paths).census(tmp_path / "cache")
    assert again["hash"].tolist() == [content_hash(path.read_bytes()) for path in paths]


def test_a_dataset_is_known_by_its_fingerprint(tmp_path: Path, examined: list[int]) -> None:
    def stored(*values: int) -> StoredImages:
        contents: list[Any] = [
            {"bytes": path.read_bytes(), "path": None} for path in files(tmp_path / str(values), [*values])
        ]
        features = datasets.Features(image=datasets.Image(decode=False))
        return StoredImages(datasets.Dataset.from_dict({"image": contents}, features), {"train": range(2)}, tmp_path)

    same = stored(5, 6)
    first = same.census(tmp_path / "cache")
    examined.clear()
    assert np.array_equal(same.census(tmp_path / "cache"), first)
    assert len(examined) == 1  # the key alone
    assert not np.array_equal(stored(5, 7).census(tmp_path / "cache"), first)


def test_small_sets_leave_nothing_behind(tmp_path: Path) -> None:
    in_files(files(tmp_path / "set", [1, 2])).census(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_errors_of_a_large_set_name_the_image_or_the_setting(tmp_path: Path, examined: list[int]) -> None:
    paths = files(tmp_path / "set", [1, 2])
    with pytest.raises(OSError, match=r"Expected data\.cache_dir to be a folder to write to, but got .*1\.bmp"):
        in_files(paths).census(paths[0])
    paths[1].write_text("no image")
    with pytest.raises(OSError, match=r"^Expected images in data\.path that can be decoded, but got 2\.bmp"):
        in_files(paths).census(tmp_path / "cache")


def test_statistics_hold_few_images_as_float64_at_once() -> None:
    sizes: list[int] = []

    class Images:
        def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
            sizes.append(len(rows))
            return torch.full((len(rows), 2, 3, 3), 0.1)

    statistics = channel_statistics(Images(), torch.arange(150))  # type: ignore[arg-type]
    assert statistics.std == [0, 0]  # exactly: it would be divided by
    assert (sum(sizes), max(sizes)) == (150, 64)
