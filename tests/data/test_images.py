"""Images: reading and splitting, standardisation, augmentation, and what is said of bad input."""

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

import thinned.data.image_sources as sources_module
import thinned.data.images as images_module
import thinned.data.sources as hub_module
from thinned.data import Batch, ImageDataModule
from thinned.data.image_batches import rotate_and_shift
from thinned.data.image_store import StoredImages

DIGITS = {"train": 1271, "val": 161, "test": 365}  # examples of each split
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
        raw = data.raw_images("val", range(DIGITS["val"]))
        assert raw.dtype == torch.uint8
        assert np.abs(raw[:, 0].numpy() - source.images[rows] * 255 / 16).max() <= 0.5
        assert raw.max() == 255
        assert np.array_equal(whole(data.val_dataloader()).target, source.target[rows])

    def test_splits_are_disjoint_and_complete(self) -> None:
        data = ready(val_fraction=0.1, test_fraction=0.2)
        assert {split: len(rows) for split, rows in data.rows.items()} == DIGITS
        assert torch.equal(torch.cat(list(data.rows.values())).sort().values, torch.arange(1797))

    def test_splits_come_from_their_seed_alone(self) -> None:
        rows = ready(split_seed=1).rows
        assert all(torch.equal(rows[split], ready(split_seed=1, seed=5).rows[split]) for split in rows)
        assert not torch.equal(rows["test"], ready(split_seed=2).rows["test"])
        assert torch.equal(rows["test"], ready(split_seed=1, val_fraction=0.3).rows["test"])

    def test_batches_are_standardised_and_training_is_shuffled(self) -> None:
        data = ready()
        batch = next(iter(data.val_dataloader()))
        assert [part.dtype for part in batch] == [torch.float32, torch.int64, torch.int64]
        assert batch.index.tolist() == list(range(DIGITS["val"]))
        train = whole(data.train_dataloader())
        assert len(train.index) == DIGITS["train"] // 128 * 128
        back = train.image * data.statistics.std[0] + data.mean[0]
        assert torch.allclose(back, data.raw_images("train", train.index) / 255.0, atol=1e-6)
        assert torch.equal(train.target, data.target["train"][train.index])
        order = [next(iter(data.train_dataloader())).index.tolist() for _ in range(2)]
        assert order[0] == order[1] != sorted(order[0])

    def test_fit_examples_are_a_fixed_part_of_the_training_split_as_it_is(self) -> None:
        data, again, other = (ready(shift=2, rotation=90, seed=seed, eval_batch_size=50) for seed in (0, 0, 1))
        batches = list(data.fit_dataloader())
        fit = Batch(*map(torch.cat, zip(*batches, strict=True)))
        assert [len(batch.index) for batch in batches] == [50, 50, 50, DIGITS["val"] - 150]
        assert len(set(fit.index.tolist())) == DIGITS["val"] < DIGITS["train"]
        back = fit.image * data.statistics.std[0] + data.statistics.mean[0]
        assert torch.allclose(back, data.raw_images("train", fit.index) / 255.0, atol=1e-6)  # not rotated, not shifted
        assert torch.equal(fit.target, data.target["train"][fit.index])
        same, another = (torch.cat([batch.index for batch in each.fit_dataloader()]) for each in (again, other))
        assert torch.equal(same, fit.index)
        assert not torch.equal(another, fit.index)

    def test_setup_reads_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reads: list[str] = []
        read = sources_module.read_splits
        monkeypatch.setattr(sources_module, "read_splits", lambda *args: reads.append(args[0]) or read(*args))
        data = ImageDataModule()
        for stage in ("fit", "validate", "test", "predict"):
            data.setup(stage)
        assert reads == ["digits"]


class TestReading:
    def test_hub_layout(self, folder: Callable[..., str]) -> None:
        train, test = noise(40, 4, 6), noise(3, 4, 6, seed=1)
        path = folder(train=table(train, [0, 1] * 20), test=table(test, [1, 0, 1]))
        data = ready(path, predict_split="test")
        assert (data.image_shape, data.class_names) == ((1, 4, 6), ["cat", "dog"])
        assert data.raw_images("test", [2, 0]).squeeze(1).tolist() == [test[2].tolist(), test[0].tolist()]
        assert data.target["test"].tolist() == [1, 0, 1]
        assert len(data.rows["train"]) + len(data.rows["val"]) == 40
        assert len(data.rows["test"]) == 3
        assert whole(data.predict_dataloader()).index.tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("stored", "sources"),
        [
            ({"train": 60}, ("train", "train", "train")),
            ({"train": 60, "test": 5}, ("train", "train", "test")),
            ({"Train": 60, "Validation": 6}, ("Train", "Train", "Validation")),
            ({"train": 60, "dev": 6, "testing": 5}, ("train", "dev", "testing")),
            ({"train": 60, "eval": 6, "test": 5, "extra": 9}, ("train", "eval", "test")),
        ],
    )
    def test_which_split_is_which(self, tmp_path: Path, stored: dict[str, int], sources: tuple[str, ...]) -> None:
        splits = {name: table(noise(n, 2, 2, seed=n), ([0, 1] * n)[:n]) for name, n in stored.items()}
        DatasetDict(splits).save_to_disk(tmp_path / "set")
        data = ready(str(tmp_path / "set"))
        assert tuple(data.sources(split, [0])[0].partition("[")[0] for split in DIGITS) == sources
        for name in sources:  # and nothing of it is lost
            drawn = [split for split, source in zip(DIGITS, sources, strict=True) if source == name]
            assert sum(len(data.rows[split]) for split in drawn) == stored[name]

    def test_a_single_saved_split_is_train(self, tmp_path: Path) -> None:
        table(noise(60, 2, 2), [0, 1] * 30).save_to_disk(tmp_path / "set")
        assert sum(map(len, ready(str(tmp_path / "set")).rows.values())) == 60

    def test_the_whole_set_decides_on_colour(self, folder: Callable[..., str]) -> None:
        gray, color = noise(49, 2, 2), noise(1, 2, 2, 3)
        path = folder(
            train=table([*gray, *color], [0, 1] * 25), valid=table(gray, [0] * 49), test=table(gray, [0] * 49)
        )
        data = ready(path)
        assert data.image_shape[0] == 3
        assert data.raw_images("test", [7])[0].tolist() == [gray[7].tolist()] * 3

    def test_color_channels_come_first(self, folder: Callable[..., str]) -> None:
        color = noise(40, 2, 4, 3)
        data = ready(folder(train=table(color, [0, 1] * 20), test=table(color, [0, 1] * 20)), val_fraction=0.2)
        assert data.image_shape == (3, 2, 4)
        assert data.raw_images("test", [7])[0].tolist() == color[7].transpose(2, 0, 1).tolist()

    def test_image_size_resizes_bilinearly(self, folder: Callable[..., str]) -> None:
        images = [*noise(5, 4, 6), *noise(35, 7, 3)]
        path = folder(train=table(images, [0, 1] * 20), test=table(images, [0, 1] * 20))
        data = ready(path, image_size=5, val_fraction=0.2)
        expected = Image.fromarray(images[8]).resize((5, 5), Image.Resampling.BILINEAR)
        assert data.image_shape == (1, 5, 5)
        assert data.raw_images("test", [8])[0, 0].tolist() == np.asarray(expected).tolist()

    def test_columns_are_found_by_what_they_hold(self, tmp_path: Path) -> None:
        table(noise(60, 2, 2), [0, 1] * 30, image="img").save_to_disk(tmp_path / "cifar10")
        assert ready(str(tmp_path / "cifar10")).class_names == ["cat", "dog"]
        integers = table(noise(60, 2, 2), [0, 2, 1] * 20, label="target", kind=Value("int32"))
        integers = integers.add_column("size", [0, 1] * 30)
        integers.save_to_disk(tmp_path / "integers")
        assert ready(str(tmp_path / "integers")).class_names == ["0", "1", "2"]
        assert ready(str(tmp_path / "integers"), label_column="size").class_names == ["0", "1"]
        fine = table(noise(60, 2, 2), [0, 1] * 30, label="fine_label")
        coarse = fine.add_column("coarse_label", [0] * 60, feature=ClassLabel(names=["animal", "plant"]))
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
        with pytest.raises(
            ValueError, match=r"labels to train on, but got none .*label_column: None, .*\['image', 'size'\]"
        ):
            ready(str(tmp_path / "unlabelled"))

    @pytest.mark.skipif(not MNIST.is_dir(), reason=f"needs a copy of MNIST in {MNIST}")
    def test_mnist(self, tmp_path: Path) -> None:
        data = ready(str(MNIST), cache_gib=0, cache_dir=str(tmp_path))
        assert (data.image_shape, data.num_classes) == ((1, 28, 28), 10)
        assert [len(data.rows[split]) for split in ("train", "val", "test")] == [54041, 5959, 10000]
        assert len(list(tmp_path.glob("*.npy"))) == 1  # hashes are kept for the next start
        assert data.target["test"][:9].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5]
        assert data.raw_images("test", range(10000)).double().mean() / 255 == pytest.approx(0.1325, abs=1e-4)


class TestStatistics:
    def test_by_hand(self, folder: Callable[..., str]) -> None:
        # Red is 0 and 51: mean and deviation 0.1. Green is 255 throughout. Blue is 102 and 204: 0.6 and 0.2.
        pixels = np.array([[[0, 255, 102], [51, 255, 204]]], np.uint8)
        elsewhere = np.full((1, 2, 3), 7, np.uint8)
        path = folder(train=table([pixels] * 2, [0, 1]), val=table([pixels], [0]), test=table([elsewhere], [0]))
        data = ready(path)
        assert data.statistics.mean == pytest.approx([0.1, 1.0, 0.6])
        assert data.statistics.std == pytest.approx([0.1, 0.0, 0.2])
        image = whole(data.val_dataloader()).image
        assert image[0].flatten(1).tolist() == [pytest.approx(row, abs=1e-5) for row in ([-1, 1], [0, 0], [-1, 1])]

    def test_of_the_training_split_alone(self) -> None:
        data = ready(val_fraction=0.5)
        train = data.raw_images("train", range(len(data.rows["train"]))).numpy() / 255
        assert data.statistics.mean == pytest.approx([train.mean()], abs=1e-12)
        assert data.statistics.std == pytest.approx([train.std()], abs=1e-12)

    def test_come_back_from_a_checkpoint_and_are_not_recomputed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = ready()
        torch.save(data.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["statistics"] == {
            "mean": data.statistics.mean,
            "std": data.statistics.std,
            "low": [0.0],
            "high": [1.0],
        }
        monkeypatch.setattr(images_module, "channel_statistics", lambda *_: pytest.fail("recomputed"))
        restored = ready()
        state["statistics"] |= {"mean": [0.5], "std": [0.25]}
        restored.load_state_dict(state)
        assert (restored.statistics.mean, restored.statistics.std) == ([0.5], [0.25])
        image = whole(restored.test_dataloader()).image
        assert image.max() == 2.0  # (1 - 0.5) / 0.25


class TestTrained:
    """With the state of a checkpoint, what comes later is kept, mapped or refused."""

    @pytest.fixture
    def images(self, tmp_path: Path) -> Callable[..., str]:
        """Writes digits into folders of classes, by the names that are given."""

        def write(name: str, rows: Sequence[int], names: Sequence[str] = "0123456789", kind: str = "png") -> str:
            source = digits()
            for row in rows:
                label = source[row]["label"]
                path = tmp_path / name / (names[label] if names else "") / f"{row:04}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                source[row]["image"].save(path)
            return str(tmp_path / name)

        return write

    @staticmethod
    def number(source: str) -> int:
        """The number in the name of a file."""
        return int(Path(source).stem)

    def later(self, state: dict[str, Any], path: str, stage: str = "predict", **options: Any) -> ImageDataModule:
        data = ImageDataModule(path, **options)
        data.load_state_dict(state)
        data.setup(stage)
        return data

    def test_names_in_another_order_are_mapped(self, images: Callable[..., str], tmp_path: Path) -> None:
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        features = Features(image=datasets.Image(), label=ClassLabel(names=names))
        digits().select(range(300)).cast(features).save_to_disk(tmp_path / "saved")
        state = ready(str(tmp_path / "saved")).state_dict()
        data = self.later(state, images("folder", range(300, 340), names))  # whose classes are sorted by name
        assert data.class_names == names
        rows = [self.number(source) for source in data.sources("test", range(40))]
        assert data.target["test"].tolist() == digits()[rows]["label"]

    def test_some_of_the_classes_are_predicted_and_scored(self, images: Callable[..., str]) -> None:
        state = ready().state_dict()
        rows = [row for row in range(200) if digits()[row]["label"] in (1, 7)]
        data = self.later(state, images("some", rows))
        assert data.num_classes == 10
        assert sorted(data.target["test"].tolist()) == sorted(digits()[rows]["label"])

    def test_other_classes_are_refused(self, images: Callable[..., str]) -> None:
        with pytest.raises(ValueError, match=r"the classes of the checkpoint, \[0, 1, .*9\], .* but got \[cat\] among"):
            self.later(ready().state_dict(), images("other", [0], ["cat"]))

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_another_set_is_predicted_as_a_whole(self, images: Callable[..., str], split: Any) -> None:
        data = self.later(ready().state_dict(), images("new", range(50), []), predict_split=split)
        assert data.target[split] is None
        batch = next(iter(data.predict_dataloader()))
        assert batch.target is None
        assert data.sources(split, batch.index) == [f"{row:04}.png" for row in range(50)]
        expected = [np.asarray(image).tolist() for image in digits()[range(50)]["image"]]
        assert data.raw_images(split, range(50))[:, 0].tolist() == expected

    def test_splits_of_another_set_may_be_called_as_they_like(self, tmp_path: Path, said: list[str]) -> None:
        stored = DatasetDict(fold1=table(noise(5, 8, 8), ["3"] * 5, kind=Value("string")))
        stored["fold2"] = table(noise(4, 8, 8, seed=1), ["7"] * 4, kind=Value("string"))
        stored.save_to_disk(tmp_path / "set")
        data = self.later(ready().state_dict(), str(tmp_path / "set"))
        assert data.target["test"].tolist() == [3] * 5 + [7] * 4
        assert data.sources("test", [4, 5]) == ["fold1[4]", "fold2[0]"]
        with pytest.raises(ValueError, match=r"to have a split 'train', but got \['fold1', 'fold2'\]"):
            ready(str(tmp_path / "set"))

    def test_a_set_that_has_grown_keeps_everyone_in_place(self, images: Callable[..., str]) -> None:
        before = ready(images("set", range(400)))
        of_before = {split: set(before.sources(split, range(len(before.rows[split])))) for split in DIGITS}
        data = self.later(before.state_dict(), images("set", range(400, 500)), "test", split_seed=7, test_fraction=0.5)
        of_after = {split: set(data.sources(split, range(len(data.rows[split])))) for split in DIGITS}
        assert sum(map(len, of_after.values())) == 500
        for split in DIGITS:
            assert of_before[split] < of_after[split]

    def test_a_set_that_was_moved_is_the_same(self, images: Callable[..., str], tmp_path: Path) -> None:
        before = ready(images("set", range(400)))
        sources, state = before.sources("test", range(len(before.rows["test"]))), before.state_dict()
        Path(images("set", [])).rename(tmp_path / "elsewhere")
        data = self.later(state, str(tmp_path / "elsewhere"))
        assert data.sources("test", range(len(data.rows["test"]))) == sources

    def test_a_state_that_comes_after_setup_counts_too(self) -> None:
        state = ready(split_seed=1).state_dict()
        data = ready()
        data.load_state_dict(state)
        assert torch.equal(data.rows["test"], ready(split_seed=1).rows["test"])

    def test_training_does_not_resume_on_another_set(self, images: Callable[..., str]) -> None:
        with pytest.raises(ValueError, match="Expected the training examples and labels of the checkpoint"):
            self.later(ready().state_dict(), images("new", range(9)), "fit")

    def test_the_background_is_that_of_the_training(self, tmp_path: Path) -> None:
        for i in range(40):
            path = tmp_path / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((1, 2, 2), (i, i % 3), np.uint8)).save(path)  # LA, nearly transparent
        state = ready(str(tmp_path), background="black").state_dict()
        data = self.later(state, str(tmp_path), background="white")
        assert data.raw_images("train", range(9)).max() == 0

    def test_eight_and_sixteen_bits_have_one_scale_and_floats_another(self, tmp_path: Path) -> None:
        for i, image in enumerate(noise(40, 2, 2)):
            deep = {"8": image, "16": image.astype(np.uint16) * 257, "float": image.astype(np.float32)}
            for name, pixels in deep.items():
                path = tmp_path / name / "ab"[i % 2] / f"{i}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        eight = ready(str(tmp_path / "8"))
        sixteen = self.later(eight.state_dict(), str(tmp_path / "16"))
        image = next(iter(sixteen.predict_dataloader())).image  # all of them, as their bytes are others
        order = [self.number(source) for source in sixteen.sources("test", range(40))]
        expected = torch.from_numpy(np.stack(noise(40, 2, 2))[order])
        assert torch.allclose(
            image[:, 0] * eight.statistics.std[0] + eight.statistics.mean[0], expected / 255, atol=1e-6
        )
        with pytest.raises(ValueError, match=r"images of 8 or 16 bits in data\.path, but got floats"):
            self.later(eight.state_dict(), str(tmp_path / "float"))


@pytest.mark.parametrize("augmentation", [{}, {"shift": 1.5, "rotation": 20.0}])
def test_lazy_batches_equal_cached_ones(folder: Callable[..., str], augmentation: dict[str, float]) -> None:
    images = noise(60, 5, 4, 3)
    path = folder(train=table(images, [0, 1] * 30), test=table(images[:4], [0, 1] * 2))
    cached, lazy, workers = (
        ready(path, batch_size=8, cache_gib=gib, num_workers=n, **augmentation) for gib, n in ((4, 0), (0, 0), (0, 2))
    )
    assert isinstance(cached._pixels, Tensor)
    assert not isinstance(lazy._pixels, Tensor)
    for other in (lazy, workers):
        assert other.statistics == cached.statistics
        for split in ("train", "val", "test"):
            loaders = [getattr(data, f"{split}_dataloader")() for data in (cached, other)]
            for one, another in zip(*loaders, strict=True):
                assert all(map(torch.equal, one, another))


@pytest.mark.parametrize("distortion", [None, "blur:1"])
def test_no_image_is_decoded_to_count_those_of_a_prediction(
    folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch, distortion: str | None
) -> None:
    data = ready(folder(train=table(noise(60, 5, 4), [0, 1] * 30)), distortion=distortion)
    monkeypatch.setattr(StoredImages, "open", lambda *_: pytest.fail("decoded"))
    assert data.provenance("test", 1.0)["examples"] == len(data.rows["test"])


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
        assert all(torch.equal(part.image, one.image[torch.searchsorted(one.index, part.index)]) for part in parts)

    def test_leaves_evaluation_alone(self, path: str) -> None:
        plain, augmented = ready(path), ready(path, shift=2.0, rotation=30.0)
        for split in ("val", "test", "predict"):
            loader = f"{split}_dataloader"
            assert torch.equal(whole(getattr(plain, loader)()).image, whole(getattr(augmented, loader)()).image)
        assert not torch.equal(whole(plain.train_dataloader()).image, whole(augmented.train_dataloader()).image)

    def test_black_comes_in(self, folder: Callable[..., str]) -> None:
        white = [np.full((6, 6), 255, np.uint8)] * 20
        data = ready(
            folder(**{split: table(white, [0, 1] * 10) for split in ("train", "val", "test")}), batch_size=14, shift=3.0
        )
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

    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"Expected data\.path .*, but got '.*' \(EmptyDatasetError"):
            ready(str(tmp_path))

    def test_classes_are_those_of_training_whatever_comes_first(self, tmp_path: Path) -> None:
        text = Value("string")
        test, train = (
            table(noise(9, 2, 2, seed=1), ["b"] * 9, kind=text),
            table(noise(60, 2, 2), ["a", "b"] * 30, kind=text),
        )
        DatasetDict(test=test, train=train).save_to_disk(tmp_path / "set")
        data = ready(str(tmp_path / "set"))
        assert data.class_names == ["a", "b"]
        assert data.target["test"].tolist() == [1] * 9

    def test_no_train_split(self, folder: Callable[..., str]) -> None:
        path = folder(test=table(noise(2, 2, 2), [0, 1]))
        with pytest.raises(ValueError, match=r"Expected data\.path to have a split 'train', but got \['test'\]"):
            ready(path)

    @pytest.mark.parametrize(
        ("bad", "got"),
        [
            (-1, "a label for each example of split 'test' of data.path, or for none, but got none for 1 of 3"),
            (None, "a label for each example of split 'test' of data.path, or for none, but got none for 1 of 3"),
            (2, r"the classes of the training split, \[0, 1\], in split 'test' .* but got \[2\] among \[0, 1, 2\]"),
        ],
    )
    def test_labels(self, tmp_path: Path, bad: int | None, got: str) -> None:
        integers = Value("int64")
        train = table(noise(60, 2, 2), [0, 1] * 30, kind=integers)
        test = table(noise(3, 2, 2, seed=1), [0, 1, bad], kind=integers)
        DatasetDict(train=train, test=test).save_to_disk(tmp_path / "set")
        with pytest.raises(ValueError, match=got):
            ready(str(tmp_path / "set"))

    @pytest.mark.parametrize("missing", [-1, None])
    def test_a_split_is_hidden_if_all_its_labels_are_missing(self, tmp_path: Path, missing: int | None) -> None:
        train = table(noise(60, 2, 2), [0, 1] * 30, kind=Value("int64"))
        test = table(noise(3, 2, 2, seed=1), [missing] * 3, kind=Value("int64"))
        DatasetDict(train=train, test=test).save_to_disk(tmp_path / "set")
        data = ready(str(tmp_path / "set"))
        assert [data.target[split] is None for split in DIGITS] == [False, False, True]

    @pytest.mark.parametrize("cache_gib", [0, 4])
    def test_sizes_that_differ(self, folder: Callable[..., str], cache_gib: float) -> None:
        images = noise(20, 2, 3)
        images[11] = np.zeros((4, 2), np.uint8)
        path = folder(train=table(images, [0, 1] * 10), test=table(images[:2], [0, 1]))
        with pytest.raises(
            ValueError, match=r"images of 3x2 \(or data\.image_size\) in data\.path, .* but train\[11\] is 2x4"
        ):
            ready(path, cache_gib=cache_gib).train_dataloader()

    def test_a_missing_image(self, folder: Callable[..., str]) -> None:
        path = folder(train=table([*noise(19, 2, 2), None], [0, 1] * 10))
        with pytest.raises(ValueError, match=r"Expected images in data\.path, but got None in train\[19\]"):
            ready(path)

    @pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", None])
    def test_a_broken_file_is_named(self, tmp_path: Path, content: bytes | None) -> None:
        """None stands for one that is cut off, which is noticed only when it is decoded."""
        for i, image in enumerate(noise(60, 32, 32)):
            path = tmp_path / f"set/{'ab'[i % 2]}/{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        broken = tmp_path / "set/b/7.jpg"
        broken.write_bytes(broken.read_bytes()[:400] if content is None else content)
        with pytest.raises(OSError, match=r"images in data\.path that can be decoded, but got b/7\.jpg \(\w+"):
            ready(str(tmp_path / "set")).statistics  # noqa: B018


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    lines: list[Any] = []
    for module in ("images", "image_sources", "image_splits"):
        monkeypatch.setattr(f"thinned.data.{module}.rank_zero_info", lines.append)
    return lines


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
    assert torch.cat(trainer.predict(model, data)).tolist() == list(range(DIGITS["test"]))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["ImageDataModule"] == data.state_dict()
    restored = ImageDataModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (restored.statistics, restored.hparams) == (data.statistics, data.hparams)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_column_may_name_the_splits(tmp_path: Path, kind: str) -> None:
    stored = table(noise(60, 2, 2), [0, 1] * 30).add_column("split", ["train"] * 30 + ["dev"] * 10 + ["test"] * 20)
    if kind == "parquet":
        path = tmp_path / "set.parquet"
        stored.to_parquet(path)
    else:
        path = tmp_path
        lines = [f"{i}.png,{row['label']},{row['split']}\n" for i, row in enumerate(stored)]
        (tmp_path / "labels.csv").write_text("".join(["file,label,split\n", *lines]))
        for i, row in enumerate(stored):
            row["image"].save(tmp_path / f"{i}.png")
    data = ready(str(path))
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 30, "val": 10, "test": 20}
    assert data.target["test"].tolist() == [0, 1] * 10
    assert data.raw_images("test", [3])[0, 0].tolist() == np.asarray(stored[43]["image"]).tolist()


def permuted(names: list[str], rows: Sequence[int]) -> datasets.Dataset:
    """Digits whose classes have these names, with the numbers that belong to them."""
    source = digits()[rows]
    labels = [names.index(str(label)) for label in source["label"]]
    features = Features(image=datasets.Image(), label=ClassLabel(names=names))
    return datasets.Dataset.from_dict({"image": source["image"], "label": labels}, features=features)


@pytest.mark.parametrize("name", ["test.parquet", "train-1.parquet"])
def test_each_split_has_its_own_names_of_classes(tmp_path: Path, name: str) -> None:
    """`datasets` would give all files the names of the first."""
    names = [str(k) for k in range(10)]
    permuted(names, range(300)).to_parquet(tmp_path / "train-0.parquet")
    permuted(names[::-1], range(300, 400)).to_parquet(tmp_path / name)
    if name == "train-1.parquet":
        with pytest.raises(ValueError, match="files of one split with other features or names of classes"):
            ready(str(tmp_path))
        return
    data = ready(str(tmp_path))
    for split in ("train", "test"):
        rows = [int(source.partition("[")[2][:-1]) for source in data.sources(split, range(len(data.rows[split])))]
        rows = [row + 300 if split == "test" and name == "test.parquet" else row for row in rows]
        assert [data.class_names[k] for k in data.target[split]] == [str(k) for k in digits()[rows]["label"]]


def test_files_that_the_readme_declares_are_taken_as_it_says(tmp_path: Path) -> None:
    names = [str(k) for k in range(10)]
    for name, rows in (("a", range(300)), ("b", range(300, 400))):
        permuted(names, rows).to_parquet(tmp_path / f"{name}.parquet")
    files = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{files}  - split: test\n    path: b.parquet\n---\n# Digits\n")
    assert len(ready(str(tmp_path)).rows["test"]) == 100


def test_rows_of_no_split_are_left_out_by_a_column_in_any_case(tmp_path: Path, said: list[str]) -> None:
    stored = table(noise(60, 2, 2), [0, 1] * 30).add_column("Split", ["train"] * 40 + ["test"] * 15 + ["extra"] * 5)
    stored.to_parquet(tmp_path / "set.parquet")
    data = ready(str(tmp_path))
    assert (len(data.rows["train"]) + len(data.rows["val"]), len(data.rows["test"])) == (40, 15)
    assert said[0] == "Left out of data.path: [split extra]"


def test_other_labels_of_the_same_images_are_said_and_refused_in_training(tmp_path: Path, said: list[str]) -> None:
    images = noise(60, 2, 2)
    for name, labels in (("one", [0, 1] * 30), ("two", [1, 0] * 30)):
        table(images, labels).save_to_disk(tmp_path / name)
    state = ready(str(tmp_path / "one")).state_dict()
    for stage in ("test", "fit"):
        data = ImageDataModule(str(tmp_path / "two"))
        data.load_state_dict(state)
        if stage == "test":
            data.setup(stage)
            assert "data.path has other examples or labels than in training for train, val, test" in said
        else:
            with pytest.raises(
                ValueError, match="Expected the training examples and labels of the checkpoint, but got others"
            ):
                data.setup(stage)


@pytest.mark.parametrize("background", ["reddish", "#12345", "12"])
def test_a_background_that_is_no_colour(background: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.background to be the name of a colour or #rrggbb, .* '{background}'"):
        ImageDataModule(background=background)
