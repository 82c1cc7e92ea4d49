"""Distorted images: by hand, against NumPy, and the same whatever the batch and the process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thinned.data import ImageDataModule
from thinned.data.distortion import SEED, Distortion
from thinned.data.image_batches import IMAGE_KINDS, DistortedImages

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (6, 3, 8, 9), generator=GENERATOR, dtype=torch.uint8)
BLACK, WHITE = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 255.0)


def distorted(kind: str, severity: float, images: Tensor = IMAGES) -> Tensor:
    return DistortedImages(images, Distortion(kind, severity), BLACK, WHITE)[torch.arange(len(images))]


@pytest.mark.parametrize(("kind", "severity"), [
    ("rotation", 0), ("translation", 0), ("roll", 0), ("roll", 9), ("noise", 0), ("blur", 0), ("contrast", 1),
])  # fmt: skip
def test_mildest_severity_changes_nothing(kind: str, severity: float) -> None:
    assert distorted(kind, severity).equal(IMAGES)


def test_rotation_by_90_degrees_is_numpys() -> None:
    square = IMAGES[..., :8]
    assert distorted("rotation", 90, square).equal(torch.from_numpy(np.rot90(square.numpy(), axes=(2, 3)).copy()))


def test_roll_moves_columns_to_the_right() -> None:
    assert distorted("roll", 2)[..., 2:].equal(IMAGES[..., :-2])
    assert distorted("roll", 2)[..., :2].equal(IMAGES[..., -2:])


def test_translation_moves_a_spot_by_the_severity() -> None:
    """The centre of mass of a spot moves by 3 pixels, in a direction that differs between images."""
    spots = torch.zeros(6, 1, 15, 15, dtype=torch.uint8)
    spots[:, 0, 7, 7] = 255
    moved = distorted("translation", 3, spots)[:, 0].double()
    place = torch.arange(15) - 7.0
    x, y = (moved.sum(dim) @ place.double() / moved.sum((1, 2)) for dim in (1, 2))
    torch.testing.assert_close(x.hypot(y), torch.full((6,), 3.0).double(), atol=0.02, rtol=0)
    assert len({round(angle, 2) for angle in torch.atan2(y, x).tolist()}) == 6


def test_noise_is_numpys_of_each_row() -> None:
    expected = [np.random.default_rng((SEED, row)).standard_normal((3, 8, 9)) for row in range(6)]
    exact = IMAGES.numpy() + 255 * 0.1 * np.stack(expected)
    assert np.abs(distorted("noise", 0.1).numpy() - exact.clip(0, 255)).max() <= 0.501


def test_blur_is_a_convolution_with_a_gaussian() -> None:
    """A spot far from the borders becomes the product of two Gaussians."""
    spot = torch.zeros(1, 1, 21, 21, dtype=torch.uint8)
    spot[0, 0, 10, 10] = 255
    weights = np.exp(-(np.arange(-10, 11) ** 2) / 2 / 1.5**2)
    expected = 255 * np.outer(weights, weights) / weights.sum() ** 2
    assert np.abs(distorted("blur", 1.5, spot)[0, 0].numpy() - expected).max() < 0.6


def test_contrast_by_hand() -> None:
    image = torch.tensor([[[[0, 100], [200, 100]]]], dtype=torch.uint8)
    assert distorted("contrast", 0.5, image).flatten().tolist() == [50, 100, 150, 100]


@pytest.mark.parametrize("kind", sorted(IMAGE_KINDS))
def test_same_whatever_the_batch(kind: str) -> None:
    """Of one image or of all, in any order, of 8 bits or of floats; and within the range of the type."""
    severity = 1 if kind == "roll" else 0.7
    for images, high in ((IMAGES, WHITE), (IMAGES / 255, torch.ones(1, 1, 1))):
        all_of_them = DistortedImages(images, Distortion(kind, severity), BLACK, high)
        whole = all_of_them[torch.arange(6)]
        assert whole.dtype == images.dtype
        assert not whole.equal(images)
        assert 0 <= whole.min() <= whole.max() <= high.item()
        assert all_of_them[torch.tensor([4, 1])].equal(whole[[4, 1]])
        assert all_of_them[torch.tensor([3])].equal(whole[[3]])


@pytest.mark.parametrize(("spec", "said"), [
    ("rotatoin:30", "<kind>:<severity> with a kind among ['blur', "),
    ("rotation", "<kind>:<severity>"),
    ("rotation:", "<kind>:<severity>"),
    ("rotation:nan", "<kind>:<severity>"),
    ("rotation:200", "rotation with a severity in [0, 180]"),
    ("rotation:-1", "rotation with a severity in [0, 180]"),
    ("roll:1.5", "roll with an integer severity in [0, 1e+06]"),
    ("blur:inf", "blur with a severity in [0, 1e+06]"),
    ("characters:0.1", "<kind>:<severity>"),
])  # fmt: skip
def test_unknown_distortion_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"Expected data\.distortion ") as error:
        ImageDataModule(distortion=spec)
    assert said in str(error.value)
    assert repr(spec) in str(error.value)


def test_data_are_distorted_for_a_test_alone() -> None:
    """Raw pixels of the test and of a prediction, before standardisation; not what nets and ways learn from."""
    plain, shifted = ImageDataModule(), ImageDataModule(distortion="roll:3")
    for data in (plain, shifted):
        data.setup()
    assert plain.statistics == shifted.statistics
    for name in ("train", "val"):
        ((ours, *_), *_), ((theirs, *_), *_) = (getattr(data, f"{name}_dataloader")() for data in (plain, shifted))
        assert ours.equal(theirs)
    for name in ("test", "predict"):
        ((ours, *_),), ((theirs, *_),) = (getattr(data, f"{name}_dataloader")() for data in (plain, shifted))
        assert theirs.equal(ours.roll(3, -1))
    assert shifted.raw_images("test", [5]).equal(plain.raw_images("test", [5]).roll(3, -1))
    assert shifted.provenance("test", 1.0)["distortion"] == "roll:3"


def test_letters_are_predicted_as_a_whole_in_the_size_of_the_checkpoint() -> None:
    digits = ImageDataModule()
    digits.setup()
    letters = ImageDataModule(path="letters")
    letters.load_state_dict(digits.state_dict())
    letters.setup("predict")
    assert letters.image_shape == (1, 8, 8)
    assert letters.num_examples("test") == 1000
    ((images, target, index),) = letters.predict_dataloader()
    assert target is None
    assert index.tolist() == list(range(1000))
    assert len(torch.unique(images, dim=0)) > 990  # each in a font, size, rotation and place of its own
    raw = letters.raw_images("test", range(1000)).float()
    assert 0.05 < raw.mean() / 255 < 0.5  # white on black
    assert raw.amax((1, 2, 3)).min() > 100  # none is empty


def test_letters_are_as_large_as_is_asked() -> None:
    digits = ImageDataModule(image_size=20)
    digits.setup()
    letters = ImageDataModule(path="letters", image_size=20)
    letters.load_state_dict(digits.state_dict())
    letters.setup("predict")
    assert letters.image_shape == (1, 20, 20)


def test_images_of_other_classes_are_predicted_without_their_labels(tmp_path: Path) -> None:
    import datasets

    digits = ImageDataModule(image_size=8)
    digits.setup()
    folder = tmp_path / "other"
    names = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"P5 8 8 255\n" + bytes(64), "path": None}], "label": ["x"]}
    )
    names.cast_column("image", datasets.Image()).save_to_disk(folder)

    def foreign(**settings: Any) -> ImageDataModule:
        data = ImageDataModule(path=str(folder), image_size=8, **settings)
        data.load_state_dict(digits.state_dict())
        data.setup("predict")
        return data

    with pytest.raises(ValueError, match=r"Expected the classes of the checkpoint.*data\.use_labels"):
        foreign()
    ((_, target, _),) = foreign(use_labels=False).predict_dataloader()
    assert target is None
