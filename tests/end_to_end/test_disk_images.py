"""Images on a read-only disk, or that vanish: one line that names the place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[..., Any]

ROOT = Path(__file__).parents[2]
IMAGES = ("--config", ROOT / "configs/mlp_digits.yaml", "--trainer.accelerator", "cpu", "--trainer.logger=false")
FEW = ("--trainer.max_epochs", 1, "--mc_dropout.num_samples", 2)


def error_of(finished: Any) -> str:
    """The one line of a failure."""
    assert finished.status == 1
    assert "Traceback" not in finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
def test_read_only_runs_dir(read_only: Script, tmp_path: Path) -> None:
    error = error_of(read_only("train", *IMAGES, *FEW))
    assert f"Expected runs_dir to be writable, but got Permission denied: {tmp_path}/runs" in error
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """200 + 40 images of two classes as files."""
    import numpy as np
    from PIL import Image

    for split, count in (("train", 100), ("test", 20)):
        for label in range(2):
            folder = tmp_path / f"images/{split}/class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng((label, i)).integers(100 * label, 100 + 100 * label, (8, 8))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(("cache_gib", "workers"), [(4, 0), (0, 0), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_vanished_image_folder(
    cache_gib: int, workers: int, image_folder: Path, vanishing: Any, run_script: Script
) -> None:
    """With all images in memory, nothing is missed."""
    options = ("--data.path", image_folder, "--model.net.num_classes", 2, "--data.batch_size", 4)
    own = ("--data.cache_gib", cache_gib, "--data.num_workers", workers, *vanishing(image_folder))
    finished = run_script("train", *IMAGES, *FEW, *options, *own)
    if cache_gib:
        assert finished.status == 0, finished.err
        return
    error = error_of(finished)
    assert "Expected data.path to hold all its images while they are read, but got " in error
    assert str(image_folder) in error
