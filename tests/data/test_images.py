"""Images: reading and splitting, standardisation, augmentation, and what is said of bad input."""

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, Features, Value
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

import thinned.data.hugging_face as hub_module
import thinned.data.image_sources as sources_module
import thinned.data.images as images_module
from thinned.data import Batch, ImageDataModule
from thinned.data.images import rotate_and_shift

MNIST = Path(__file__).parents[3] / "shared/data/mnist/mnist"


digits = cache(sources_module.read_digits)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources_module, "read_digits", digits)


def noise(n: int, *shape: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8))


def table(
    images: Sequence[Any], labels: Sequence[Any], image: str = "image", label: str = "label", kind: Any = None
) -> datasets.Dataset:
    features = Features({image: datasets.Image(), label: kind or ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict({image: list(images), label: list(labels)}, features=features)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Writes splits in the layout of the hub and returns where."""

    def write(**splits: datasets.Dataset) -> str:
        (tmp_path / "set" / "data").mkdir(parents=True)
        for name, split in splits.items():
            split.to_parquet(tmp_path / "set" / "data" / f"{name}-00000-of-00001.parquet")
        return str(tmp_path / "set")

    return write


def ready(*args: Any, **kwargs: Any) -> ImageDataModule:
    data = ImageDataModule(*args, **kwargs)
    data.setup()
    return data


def whole(loader: Any, epoch: int = 0) -> Batch:
    """All batches of an epoch as one, by index."""
    loader.sampler.set_epoch(epoch)
    batch = Batch(*map(torch.cat, zip(*loader, strict=True)))
    return Batch(*(part[batch.index.argsort()] for part in batch))


class TestDigits:
    def test_images_are_scikit_learns(self) -> None:
        data = ready()
        assert (data.image_shape, data.num_classes) == ((1, 8, 8), 10)
        assert data.class_names == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
        source = load_digits()
        rows = data.rows["val"].numpy()
        raw = data.raw_images("val", range(180))
        assert raw.dtype == torch.uint8
        assert np.abs(raw[:, 0].numpy() - source.images[rows] * 255 / 16).max() <= 0.5
        assert raw.max() == 255
        assert np.array_equal(whole(data.val_dataloader()).target, source.target[rows])

    def test_splits_are_stratified_disjoint_and_complete(self) -> None:
        data = ready(val_fraction=0.1, test_fraction=0.2)
        assert {split: len(rows) for split, rows in data.rows.items()} == {
            "train": 1258,
            "val": 180,
            "test": 359,
        }
        assert torch.equal(torch.cat(list(data.rows.values())).sort().values, torch.arange(1797))
        classes = torch.from_numpy(load_digits().target).bincount() / 1797
        for target in data.target.values():
            assert (target.bincount() / len(target) - classes).abs().max() < 1.01 / len(target)

    def test_splits_come_from_the_seed_and_val_does_not_move_test(self) -> None:
        rows = ready(seed=1).rows
        assert all(torch.equal(rows[split], ready(seed=1).rows[split]) for split in rows)
        assert not torch.equal(rows["test"], ready(seed=2).rows["test"])
        assert torch.equal(rows["test"], ready(seed=1, val_fraction=0.3).rows["test"])

    def test_batches_are_standardised_and_training_is_shuffled(self) -> None:
        data = ready()
        batch = next(iter(data.val_dataloader()))
        assert [part.dtype for part in batch] == [torch.float32, torch.int64, torch.int64]
        assert batch.index.tolist() == list(range(180))
        train = whole(data.train_dataloader())
        assert len(train.index) == 1258 // 128 * 128
        back = train.image * data.std[0] + data.mean[0]
        assert torch.allclose(back, data.raw_images("train", train.index) / 255.0, atol=1e-6)
        assert torch.equal(train.target, data.target["train"][train.index])
        order = [next(iter(data.train_dataloader())).index.tolist() for _ in range(2)]
        assert order[0] == order[1] != sorted(order[0])

    def test_setup_reads_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reads: list[str] = []
        read = images_module.read_splits
        monkeypatch.setattr(images_module, "read_splits", lambda path: reads.append(path) or read(path))
        data = ImageDataModule()
        for stage in ("fit", "validate", "test", "predict"):
            data.setup(stage)
        assert reads == ["digits"]


class TestReading:
    def test_hub_layout(self, folder: Callable[..., str]) -> None:
        train, test = noise(20, 4, 6), noise(3, 4, 6, seed=1)
        path = folder(train=table(train, [0, 1] * 10), test=table(test, [1, 0, 1]))
        data = ready(path, predict_split="test")
        assert (data.image_shape, data.class_names) == ((1, 4, 6), ["cat", "dog"])
        assert data.raw_images("test", [2, 0]).squeeze(1).tolist() == [test[2].tolist(), test[0].tolist()]
        assert data.target["test"].tolist() == [1, 0, 1]
        assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 18, "val": 2, "test": 3}
        assert whole(data.predict_dataloader()).index.tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("stored", "sizes"),
        [
            ({"train": 20}, (14, 2, 4)),
            ({"train": 20, "test": 5}, (18, 2, 5)),
            ({"train": 20, "validation": 6}, (18, 2, 6)),
            ({"train": 20, "valid": 6, "test": 5}, (20, 6, 5)),
        ],
    )
    def test_which_split_is_which(self, tmp_path: Path, stored: dict[str, int], sizes: tuple[int, ...]) -> None:
        splits = DatasetDict({name: table(noise(n, 2, 2), ([0, 1] * n)[:n]) for name, n in stored.items()})
        splits.save_to_disk(tmp_path / "set")
        data = ready(str(tmp_path / "set"))
        assert tuple(len(data.rows[split]) for split in ("train", "val", "test")) == sizes

    def test_a_single_saved_split_is_train(self, tmp_path: Path) -> None:
        table(noise(20, 2, 2), [0, 1] * 10).save_to_disk(tmp_path / "set")
        assert len(ready(str(tmp_path / "set")).rows["train"]) == 14

    def test_images_become_what_the_first_one_is(self, folder: Callable[..., str]) -> None:
        gray, color = noise(9, 2, 2), noise(1, 2, 2, 3)
        path = folder(train=table([*gray, *color], [0, 1] * 5), valid=table(gray, [0] * 9), test=table(color, [0]))
        expected = np.asarray(Image.fromarray(color[0]).convert("L"))
        assert ready(path).raw_images("test", [0])[0, 0].tolist() == expected.tolist()

    def test_color_channels_come_first(self, folder: Callable[..., str]) -> None:
        color = noise(10, 2, 4, 3)
        data = ready(folder(train=table(color, [0, 1] * 5), test=table(color, [0, 1] * 5)), val_fraction=0.2)
        assert data.image_shape == (3, 2, 4)
        assert data.raw_images("test", [7])[0].tolist() == color[7].transpose(2, 0, 1).tolist()

    def test_image_size_resizes_bilinearly(self, folder: Callable[..., str]) -> None:
        images = [*noise(5, 4, 6), *noise(5, 7, 3)]
        path = folder(train=table(images, [0, 1] * 5), test=table(images, [0, 1] * 5))
        data = ready(path, image_size=5, val_fraction=0.2)
        expected = Image.fromarray(images[8]).resize((5, 5), Image.Resampling.BILINEAR)
        assert data.image_shape == (1, 5, 5)
        assert data.raw_images("test", [8])[0, 0].tolist() == np.asarray(expected).tolist()

    def test_columns_are_found_by_what_they_hold(self, tmp_path: Path) -> None:
        table(noise(20, 2, 2), [0, 1] * 10, image="img").save_to_disk(tmp_path / "cifar10")
        assert ready(str(tmp_path / "cifar10")).class_names == ["cat", "dog"]
        integers = table(noise(30, 2, 2), [0, 2, 1] * 10, label="target", kind=Value("int32"))
        integers = integers.add_column("size", [0, 1] * 15)
        integers.save_to_disk(tmp_path / "integers")
        assert ready(str(tmp_path / "integers")).class_names == ["0", "1", "2"]
        assert ready(str(tmp_path / "integers"), label_column="size").class_names == ["0", "1"]
        fine = table(noise(20, 2, 2), [0, 1] * 10, label="fine_label")
        coarse = fine.add_column("coarse_label", [0] * 20, feature=ClassLabel(names=["animal", "plant"]))
        coarse.save_to_disk(tmp_path / "cifar100")
        assert ready(str(tmp_path / "cifar100"), label_column="coarse_label").class_names == [
            "animal",
            "plant",
        ]
        with pytest.raises(ValueError, match=r"data\.label_column .*'fine_label', 'coarse_label'\], but got None"):
            ready(str(tmp_path / "cifar100"))
        with pytest.raises(ValueError, match=r"data\.image_column .*\['image'\], but got 'fine_label' \(all"):
            ready(str(tmp_path / "cifar100"), image_column="fine_label")
        integers.remove_columns("target").save_to_disk(tmp_path / "unlabelled")
        with pytest.raises(ValueError, match=r"data\.label_column .* \[\], but got None .*\['image', 'size'\]"):
            ready(str(tmp_path / "unlabelled"))

    @pytest.mark.skipif(not MNIST.is_dir(), reason=f"needs a copy of MNIST in {MNIST}")
    def test_mnist(self) -> None:
        data = ImageDataModule(str(MNIST), cache_gib=0)
        data.load_state_dict({"mean": [0.1307], "std": [0.3081]})
        data.setup()
        assert (data.image_shape, data.num_classes) == ((1, 28, 28), 10)
        assert [len(data.rows[split]) for split in ("train", "val", "test")] == [54000, 6000, 10000]
        test = next(iter(data.test_dataloader()))
        assert test.target[:9].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5]
        assert data.raw_images("test", range(10000)).double().mean() / 255 == pytest.approx(0.1325, abs=1e-4)


class TestStatistics:
    def test_by_hand(self, folder: Callable[..., str]) -> None:
        # Red is 0 and 51: mean and deviation 0.1. Green is 255 throughout. Blue is 102 and 204: 0.6 and 0.2.
        pixels = np.array([[[0, 255, 102], [51, 255, 204]]], np.uint8)
        elsewhere = np.full((1, 2, 3), 7, np.uint8)
        data = ready(folder(train=table([pixels] * 20, [0, 1] * 10), test=table([elsewhere], [0])))
        assert data.mean == pytest.approx([0.1, 1.0, 0.6])
        assert data.std == pytest.approx([0.1, 1.0, 0.2])
        image = whole(data.val_dataloader()).image
        assert image[0].flatten(1).tolist() == [pytest.approx(row, abs=1e-5) for row in ([-1, 1], [0, 0], [-1, 1])]

    def test_of_the_training_split_alone(self) -> None:
        data = ready(val_fraction=0.5)
        train = data.raw_images("train", range(len(data.rows["train"]))).numpy() / 255
        assert data.mean == pytest.approx([train.mean()], abs=1e-12)
        assert data.std == pytest.approx([train.std()], abs=1e-12)

    def test_come_back_from_a_checkpoint_and_are_not_recomputed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = ready()
        torch.save(data.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state == {"mean": data.mean, "std": data.std}
        monkeypatch.setattr(images_module, "channel_statistics", lambda *_: pytest.fail("recomputed"))
        restored = ready()
        restored.load_state_dict({"mean": [0.5], "std": [0.25]})
        assert (restored.mean, restored.std) == ([0.5], [0.25])
        image = whole(restored.test_dataloader()).image
        assert image.max() == 2.0  # (1 - 0.5) / 0.25

    def test_of_other_images_are_refused(self) -> None:
        data = ready()
        data.load_state_dict({"mean": [0.5] * 3, "std": [0.25] * 3})
        with pytest.raises(ValueError, match=r"Expected data\.path .* 3 channels, as the checkpoint has, but got 1"):
            data.test_dataloader()


@pytest.mark.parametrize("augmentation", [{}, {"shift": 1.5, "rotation": 20.0}])
def test_lazy_batches_equal_cached_ones(folder: Callable[..., str], augmentation: dict[str, float]) -> None:
    images = noise(30, 5, 4, 3)
    path = folder(train=table(images, [0, 1] * 15), test=table(images[:4], [0, 1] * 2))
    cached, lazy, workers = (
        ready(path, batch_size=8, cache_gib=gib, num_workers=n, **augmentation) for gib, n in ((4, 0), (0, 0), (0, 2))
    )
    assert isinstance(cached._pixels("train"), Tensor)
    assert not isinstance(lazy._pixels("train"), Tensor)
    for other in (lazy, workers):
        assert (other.mean, other.std) == (cached.mean, cached.std)
        for split in ("train", "val", "test"):
            loaders = [getattr(data, f"{split}_dataloader")() for data in (cached, other)]
            for one, another in zip(*loaders, strict=True):
                assert all(map(torch.equal, one, another))


class TestAugmentation:
    @pytest.fixture
    def path(self, folder: Callable[..., str]) -> str:
        return folder(train=table(noise(80, 8, 6), [0, 1] * 40))

    def test_is_a_function_of_seed_epoch_and_index(self, path: str) -> None:
        def train(epoch: int, batch_size: int = 56, seed: int = 0) -> Tensor:
            torch.manual_seed(epoch + batch_size)
            data = ready(path, batch_size=batch_size, shift=2.0, rotation=30.0)
            data.hparams["seed"] = seed  # after the split
            return whole(data.train_dataloader(), epoch).image

        assert torch.equal(train(3, batch_size=7), train(3))
        assert not torch.equal(train(4), train(3))
        assert not torch.equal(train(3, seed=1), train(3))

    def test_does_not_depend_on_the_rank(self, path: str) -> None:
        parts = []
        for rank in range(2):
            data = ready(path, batch_size=8, shift=2.0)
            data.trainer = SimpleNamespace(
                global_rank=rank, world_size=2, overfit_batches=0.0, accumulate_grad_batches=1, current_epoch=0
            )
            progress = SimpleNamespace(current=SimpleNamespace(ready=0), is_last_batch=False)
            data.trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
            parts.append(whole(data.train_dataloader()))
        assert not set(parts[0].index.tolist()) & set(parts[1].index.tolist())
        one = whole(ready(path, batch_size=8, shift=2.0).train_dataloader())
        assert all(torch.equal(part.image, one.image[part.index]) for part in parts)

    def test_leaves_evaluation_alone(self, path: str) -> None:
        plain, augmented = ready(path), ready(path, shift=2.0, rotation=30.0)
        for split in ("val", "test", "predict"):
            loader = f"{split}_dataloader"
            assert torch.equal(whole(getattr(plain, loader)()).image, whole(getattr(augmented, loader)()).image)
        assert not torch.equal(whole(plain.train_dataloader()).image, whole(augmented.train_dataloader()).image)

    def test_black_comes_in(self, folder: Callable[..., str]) -> None:
        white = [np.full((6, 6), 255, np.uint8)] * 20
        data = ready(folder(train=table(white, [0, 1] * 10)), batch_size=14, shift=3.0)
        image = whole(data.train_dataloader()).image
        # White is the mean, so black is -1; a mean image that came in would be 0.
        assert image.min() == pytest.approx(-1, abs=1e-5)
        assert image.max() == pytest.approx(0, abs=1e-5)
        kept = (image + 1).sum((1, 2, 3))  # a shift by (x, y) keeps (6 - |x|) * (6 - |y|) pixels
        assert 9 <= kept.min() < 16
        assert 25 < kept.max() <= 36

    def test_moves_pixels_exactly(self) -> None:
        image = torch.rand(1, 2, 5, 7)

        def moved(angle: float, right: float, down: float, image: Tensor = image) -> Tensor:
            return rotate_and_shift(image, torch.tensor([angle]), torch.tensor([[right, down]]).float())

        shifted = torch.zeros_like(image)
        shifted[:, :, :3, 2:] = image[:, :, 2:, :5]
        assert torch.allclose(moved(0, 2, -2), shifted, atol=1e-5)
        assert torch.allclose(moved(0, 0, 0), image, atol=1e-5)
        assert torch.allclose(moved(180, 0, 0), image.flip(2, 3), atol=1e-5)
        square = image[:, :, :, :5]
        turned = square.rot90(1, (2, 3))  # counter-clockwise
        assert torch.allclose(moved(90, 0, 0, square), turned, atol=1e-5)
        assert torch.allclose(moved(90, 1, 0, square)[..., 1:], turned[..., :-1], atol=1e-5)  # rotated, then shifted
        # A wide image's right end turns up out of sight, and its centre column shows what was its centre row.
        assert torch.allclose(moved(90, 0, 0)[0, :, :, 3], image[0, :, 2, 1:6].flip(-1), atol=1e-5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("path", "", "to be 'digits', a folder or an id"),
            ("image_size", 0, "to be at least 1"),
            ("batch_size", 0, "to be at least 1"),
            ("eval_batch_size", -1, "to be at least 1"),
            ("val_fraction", 1.5, r"in \(0, 1\)"),
            ("test_fraction", math.nan, r"in \(0, 1\)"),
            ("predict_split", "all", "to be 'train', 'val' or 'test'"),
            ("shift", -1.0, r"in \[0, inf\)"),
            ("rotation", 181.0, r"in \[0, 180\]"),
            ("cache_gib", -0.5, "to be at least 0"),
            ("num_workers", -1, "to be at least 0"),
            ("seed", -1, r"in \[0, 2\*\*32\)"),
        ],
    )
    def test_arguments(self, key: str, value: Any, expected: str) -> None:
        with pytest.raises(ValueError, match=rf"Expected data\.{key} {expected}, but got {value!r}"):
            ImageDataModule(**{key: value})

    @pytest.mark.parametrize("path", ["./missing", "/no/such/folder", "a/b/c"])
    def test_no_such_folder(self, path: str, unreachable: None) -> None:
        with pytest.raises(FileNotFoundError, match=rf"Expected data\.path .*, but got '{path}'"):
            ready(path)

    def test_an_unreachable_hub_is_noticed_at_once(self, unreachable: None) -> None:
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match=r"Expected data\.path .* got 'nobody/nothing' \(.*reach") as error:
            ready("nobody/nothing")
        assert time.monotonic() - start < 5
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__
        assert not datasets.config.HF_HUB_OFFLINE

    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"Expected data\.path .*, but got '.*' \(EmptyDatasetError"):
            ready(str(tmp_path))

    def test_no_train_split(self, folder: Callable[..., str]) -> None:
        path = folder(test=table(noise(2, 2, 2), [0, 1]))
        with pytest.raises(ValueError, match=r"Expected data\.path to have a split 'train', but got \['test'\]"):
            ready(path)

    @pytest.mark.parametrize(("bad", "got"), [(-1, "-1"), (None, "nan"), (2, "2")])
    def test_labels(self, tmp_path: Path, bad: int | None, got: str) -> None:
        integers = Value("int64")
        train = table(noise(20, 2, 2), [0, 1] * 10, kind=integers)
        DatasetDict(train=train, test=table(noise(2, 2, 2), [0, bad], kind=integers)).save_to_disk(tmp_path / "set")
        with pytest.raises(ValueError, match=rf"labels in \[0, 2\) in .* split 'test' of data\.path, but got {got}"):
            ready(str(tmp_path / "set"))

    @pytest.mark.parametrize("cache_gib", [0, 4])
    def test_sizes_that_differ(self, folder: Callable[..., str], cache_gib: float) -> None:
        images = noise(20, 2, 3)
        images[11] = np.zeros((4, 2), np.uint8)
        path = folder(train=table(images, [0, 1] * 10), test=table(images[:2], [0, 1]))
        with pytest.raises(ValueError, match=r"data\.image_size, as not all images are 3x2 .* row 11 .*'train' is 2x4"):
            ready(path, cache_gib=cache_gib).train_dataloader()

    def test_a_class_of_one(self, folder: Callable[..., str]) -> None:
        path = folder(train=table(noise(20, 2, 2), [0] * 19 + [1]))
        with pytest.raises(ValueError, match=r"Expected data\.test_fraction .*, but got 0\.2 for 20 .* only 1 member"):
            ready(path)

    def test_a_missing_image(self, folder: Callable[..., str]) -> None:
        path = folder(train=table([*noise(19, 2, 2), None], [0, 1] * 10))
        with pytest.raises(ValueError, match=r"Expected images in split 'train' of data\.path, but got None in row 19"):
            ready(path).train_dataloader()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that no request reaches."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(hub_module.HfApi, "dataset_info", refuse)


class Linear(LightningModule):
    """The least that can be trained on digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(64, 10)

    def training_step(self, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch.image.flatten(1)), batch.target)

    def validation_step(self, batch: Batch) -> None:
        assert batch.image.shape[1:] == (1, 8, 8)

    def test_step(self, batch: Batch) -> None:
        accuracy = (self.net(batch.image.flatten(1)).argmax(1) == batch.target).float().mean()
        self.log("accuracy", accuracy, batch_size=len(batch.target))

    def predict_step(self, batch: Batch) -> Tensor:
        return batch.index

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_under_the_trainer(tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ImageDataModule(seed=3, eval_batch_size=100)
    model = Linear()
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert trainer.test(model, data, verbose=False)[0]["accuracy"] > 0.9  # a linear classifier has 0.95
    assert torch.cat(trainer.predict(model, data)).tolist() == list(range(359))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["ImageDataModule"] == {"mean": data.mean, "std": data.std}
    restored = ImageDataModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (restored.mean, restored.hparams) == (data.mean, data.hparams)
