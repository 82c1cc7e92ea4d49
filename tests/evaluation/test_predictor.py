"""The Predictor of a classifier: the same image, as anyone has it, gives the same row as the scripts do."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from PIL.Image import Image, fromarray
from torch import nn

from thinned.data import ImageDataModule
from thinned.data.image_sources import read_digits
from thinned.evaluation import Prediction, Predictor
from thinned.evaluation.ways import SampledNetworks
from thinned.models.dropout import derive_seed
from thinned.uncertainty import mc_predict

ROOT = Path(__file__).parents[2]
Script = Callable[..., Any]
SMALL = ("--trainer.logger", "false", "--trainer.accelerator", "cpu", "--mc_dropout.num_samples", 5)


def assert_same(prediction: Prediction, row: dict[str, Any], names: list[str], way: str = "mc_dropout") -> None:
    """Compares all that both have, to 1e-6."""
    assert prediction.label == names[row[f"{way}_prediction"]]
    probs = dict(zip(names, row[f"{way}_probs"], strict=True))
    assert prediction.probabilities == pytest.approx(probs, abs=1e-6)
    assert [*prediction.probabilities.values()] == sorted(prediction.probabilities.values(), reverse=True)
    assert prediction.predictive_entropy == pytest.approx(row[f"{way}_predictive_entropy"], abs=1e-6)
    assert prediction.mutual_information == pytest.approx(row["mc_dropout_mutual_information"], abs=1e-6)


def rows_of(run: Path) -> dict[str, Any]:
    return {row["source"]: row for row in pq.read_table(run / "predictions.parquet").to_pylist()}


def images(size: tuple[int, int], seed: int) -> dict[str, Image]:
    """An image of noise of each kind."""
    rng = np.random.default_rng(seed)
    rgba = rng.integers(0, 256, (*size, 4), dtype=np.uint8)
    return {
        "grey.png": fromarray(rgba[..., 0]),
        "deep.png": fromarray(rng.integers(0, 65536, size, dtype=np.uint16)),
        "colour.png": fromarray(rgba[..., :3]),
        "alpha.png": fromarray(rgba),
        "grey_alpha.png": fromarray(rgba[..., :2]),
        "palette.png": fromarray(rgba[..., :3]).quantize(16),
        "photo.jpg": fromarray(rgba[..., :3]),
    }


def save(folder: Path, kinds: dict[str, Image]) -> Path:
    folder.mkdir(parents=True)
    for name, image in kinds.items():
        turned = PIL.Image.Exif()
        turned[0x0112] = 6 if name == "photo.jpg" else 1  # taken with the camera on its side
        image.save(folder / name, exif=turned)
    return folder


@pytest.fixture(scope="module")
def mixed(run_script_in: Script, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier of images of all depths, in colour, of 6x6 pixels before a red background."""
    cwd = tmp_path_factory.mktemp("mixed")
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for seed in range(count):
            for label in ("cat", "dog"):
                save(cwd / f"set/{split}/{label}/{seed}", images((7, 9), seed))
    options = ("--data.path", "set", "--data.image_size", 6, "--data.background", "red", "--trainer.max_epochs", 1)
    masks = ("--model.net.dropout.embedding", 0.2, "--model.net.dropout.mlp", 0.4, "--mc_dropout.seed", 3)
    return run_script_in(cwd, "train", "--config", ROOT / "configs/mlp_digits.yaml", *options, *masks, *SMALL)


def test_every_kind_of_image_has_the_row_of_its_file(mixed: Any, run_script: Script, tmp_path: Path) -> None:
    folder = save(tmp_path / "new", images((11, 5), 99))
    checkpoint = mixed.run / "checkpoints/best.ckpt"
    rows = rows_of(run_script("predict", "--ckpt_path", checkpoint, "--data.path", folder).run)
    predictor, names = Predictor.from_checkpoint(checkpoint), ["cat", "dog"]
    paths = sorted(folder.iterdir())
    assert rows.keys() == {path.name for path in paths}
    for path, in_list in zip(paths, predictor(paths), strict=True):
        assert_same(in_list, rows[path.name], names)
        assert_same(predictor(str(path)), rows[path.name], names)
        assert_same(predictor(PIL.Image.open(path)), rows[path.name], names)
        if path.name not in ("palette.png", "photo.jpg"):  # whose pixels are not all that they hold
            pixels = np.asarray(PIL.Image.open(path))
            assert_same(predictor(pixels), rows[path.name], names)
            channels_first = torch.from_numpy(pixels.copy() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
            assert_same(predictor(channels_first), rows[path.name], names)
    assert len({str(row["mc_dropout_probs"]) for row in rows.values()}) == len(paths)


def test_grey_images_of_any_kind_that_are_not_resized(trained: Any, run_script: Script, tmp_path: Path) -> None:
    """In a set of 8 bits: as files of grey, and of colours that are grey."""
    digits = read_digits()
    for row in (0, 1, 2):
        digit = digits[row]["image"]
        save(tmp_path / f"new/{row}", {"grey.png": digit, "rgb.png": digit.convert("RGB"), "bright.bmp": digit})
    checkpoint = trained.run / "checkpoints/best.ckpt"
    run = run_script("predict", "--ckpt_path", checkpoint, "--data.path", tmp_path / "new", *SMALL[-2:]).run
    predictor = Predictor.from_checkpoint(trained.run)
    predictor.way.num_samples = 5
    for name, row in rows_of(run).items():
        image = PIL.Image.open(tmp_path / "new" / name)
        assert_same(predictor(image), row, [str(k) for k in range(10)])
        assert_same(predictor(np.asarray(image).copy()), row, [str(k) for k in range(10)])


@pytest.fixture(scope="module")
def evaluated(trained: Any, run_script_in: Script, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = ("--mc_dropout.sites", "auto", "--mc_dropout.seed", 7, *SMALL)
    return run_script_in(tmp_path_factory.mktemp("evaluated"), "evaluate", "--ckpt_path", trained.run, *options)


@pytest.mark.parametrize("file", [".", "evaluation.json"])
def test_what_an_evaluation_has_measured(file: str, trained: Any, evaluated: Any) -> None:
    """Sites, scale and temperature that it chose on validation, S and seed that it was given."""
    predictor = Predictor.from_checkpoint(trained.run, evaluated.run / file)
    rows = pq.read_table(evaluated.run / "predictions.parquet").to_pylist()[:3]
    digits, data = read_digits(), ImageDataModule()
    data.setup()
    for row, stored in zip(rows, data.rows["test"].tolist(), strict=False):
        prediction = predictor(digits[stored]["image"])
        assert_same(prediction, row, data.class_names, "mc_dropout_tempered")
        assert prediction.num_samples == 5
    assert predictor.way.acting
    assert predictor.reported.temperature != 1  # type: ignore[attr-defined]


def test_an_evaluation_of_another_checkpoint(trained: Any, evaluated: Any, tmp_path: Path) -> None:
    last = trained.run / "checkpoints/last.ckpt"
    said = f"Expected an evaluation of {last}, but got one of another checkpoint, {evaluated.run}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Predictor.from_checkpoint(last, evaluated.run)
    shutil.copy(evaluated.run / "evaluation.json", tmp_path)  # without the rows, which name the checkpoint
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"^Expected an evaluation by scripts/evaluate\.py, but got .*\)$"):
            Predictor.from_checkpoint(last, folder)


def test_a_net_of_another_make(trained: Any) -> None:
    """Its dropout is found at the first call; masks of a single input are those of the first of a batch."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 10))
    data = Predictor.from_checkpoint(trained.run).data
    predictor, image = Predictor(net, data, SampledNetworks(6)), read_digits()[5]["image"]
    expected = mc_predict(net, data.input_of(image)[None], num_samples=6, seed=derive_seed(0, 0))
    for _ in range(2):
        prediction = predictor(image)
        probs = [prediction.probabilities[name] for name in data.class_names]
        assert probs == pytest.approx(expected.mean[0].tolist(), abs=1e-6)
        assert prediction.mutual_information == pytest.approx(expected.mutual_information.item(), abs=1e-6)


PIXELS = np.zeros((8, 8), np.uint8)
LIKE = "Expected an image like those of the training, but got one that"
SHAPE = r"Expected pixels \(H, W\), \(H, W, C\) or \(C, H, W\) with C from 1 to 4, but got"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"P5 8 8 255", "Expected an image, its pixels or the path of its file, but got bytes"),
        ([[0, 1], [1, 0]], "Expected an image, its pixels or the path of its file, but got list"),
        ("none.png", r"Expected an image that can be decoded, but got none.png \(No such file or directory\)"),
        ([], "Expected at least one input, but got an empty list"),
        (PIXELS[:0], rf"{SHAPE} \(0, 8\)"),
        (PIXELS[0], rf"{SHAPE} \(8,\)"),
        (np.zeros((8, 8, 5), np.uint8), rf"{SHAPE} \(8, 8, 5\)"),
        (np.zeros((1, 1, 8, 8), np.uint8), rf"{SHAPE} \(1, 1, 8, 8\)"),
        (np.zeros((3, 8, 3), np.uint8), rf"{SHAPE} \(3, 8, 3\)"),
        (
            PIXELS.astype(np.int64),
            r"Expected pixels of type uint8, or in one channel .*, but got int64 of shape \(8, 8\)",
        ),
        (
            np.zeros((8, 8, 3), np.float32),
            r"Expected pixels of type uint8, or in one channel .*, but got float32 of shape \(8, 8, 3\)",
        ),
        (PIXELS / 255, "Expected an image of 8 or 16 bits, as in the training, but got one of floats"),
        (np.arange(192, dtype=np.uint8).reshape(8, 8, 3), f"{LIKE} is in colour"),
        (np.zeros((9, 8), np.uint8), r"Expected inputs of the shape \(1, 8, 8\), but got \(1, 9, 8\)"),
    ],
)
def test_what_is_no_image_that_it_knows(trained: Any, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        Predictor.from_checkpoint(trained.run)(given)


def test_a_file_that_is_no_image_and_pixels_that_are_no_numbers(trained: Any, tmp_path: Path) -> None:
    predictor, path = Predictor.from_checkpoint(trained.run), tmp_path / "notes.png"
    path.write_text("No image.")
    said = f"Expected an image that can be decoded, but got {path} (cannot identify image file)"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        predictor(path)
    predictor.data.load_state_dict(predictor.data.state_dict() | {"scale": "floats"})
    with pytest.raises(ValueError, match=f"^{LIKE} holds NaN or infinity$"):
        predictor(torch.full((8, 8), torch.nan))


@pytest.mark.parametrize("damage", ["none", "text"])
def test_what_is_no_checkpoint(damage: str, tmp_path: Path) -> None:
    if damage == "text":
        (tmp_path / "a.ckpt").write_text("No checkpoint.")
    with pytest.raises(ValueError, match=r"^Expected a checkpoint of scripts/train\.py, but got [^\n]*a\.ckpt$"):
        Predictor.from_checkpoint(tmp_path / "a.ckpt")
