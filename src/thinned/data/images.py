"""Reads images with classes: scikit-learn's digits, folders of image files, or datasets from a folder or the hub.

Images are decoded when a batch is made. The checkpoint keeps what a trained network relies on: class names, statistics
of the pixels, and how the examples were split. Later data are compared with it.

Shapes: N examples, C channels, H height, W width, K classes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt, restricted_number_type
from lightning.pytorch.utilities import rank_zero_info
from PIL import ImageColor
from torch import Tensor

from thinned.data.distortion import Distortion
from thinned.data.image_batches import IMAGE_KINDS, DistortedImages, ImageBatches
from thinned.data.image_sources import Stored, read_images
from thinned.data.image_splits import arrange
from thinned.data.image_store import Statistics, StoredImages, channel_statistics, standardised
from thinned.data.labels import UNKNOWN
from thinned.data.module import SplitDataModule
from thinned.data.order import Split

HalfTurn = restricted_number_type("HalfTurn", float, [(">=", 0), ("<=", 180)], docstring="Degrees in [0, 180].")


class ImageDataModule(SplitDataModule):
    """Reads images and classes in standardised batches, divided among the processes.

    Stored splits are used unchanged: "train", "validation" (valid, val, dev, eval) and "test" (testing). Without a
    stored test, the stored validation is the test, and validation is missing. A missing split is taken from "train" by
    the content of the examples: a set can grow without moving any of them, and duplicates are in the same split.

    With a checkpoint's state, the same data are split as in training, whatever the arguments say, and all examples of
    other data are predicted. Classes are matched by name.

    Args:
        path: "digits" for scikit-learn's, "letters" for A to J in several fonts, a folder of images (in folders by
            split and class, or with a table of labels), a folder for `datasets.load_dataset` or `load_from_disk`, or
            the id of a dataset on the hub.
        image_column: Column of the images; None if it is the only one of its kind.
        label_column: Column of the classes; None if it is the only one of its kind.
        use_labels: Whether to read labels; without them, images of any classes can be predicted.
        leave_out: Names of stored splits to ignore.
        image_size: Height and width in pixels to which images are resized; None keeps their size.
        background: Colour behind transparent pixels, a name or #rrggbb.
        batch_size: Size of a training batch, over all processes.
        eval_batch_size: Size of a batch in validation, test and prediction, over all processes.
        val_fraction: Fraction of the stored "train" for validation, if no split is stored for it.
        test_fraction: Fraction of the stored "train" for the test, if no split is stored for it.
        split_seed: Seed of the split.
        predict_split: The split to predict.
        distortion: Distortion of the images of a test or a prediction, as <kind>:<severity>: rotation (degrees),
            translation or roll (pixels), noise or blur (standard deviation), or contrast (share that is kept).
        shift: Largest random shift of training images along each axis, in pixels.
        rotation: Largest random rotation of training images either way, in degrees.
        cache_gib: Memory in GiB for decoded images; if they do not fit, they are decoded for each batch.
        cache_dir: Folder for the hashes of sets of 10,000 images or more.
        num_workers: Number of worker processes that make batches; 0 makes them in the main process.
        seed: Seed of order and augmentation.
    """

    INDIFFERENT = SplitDataModule.INDIFFERENT | {"cache_gib", "cache_dir", "rotation", "shift"}
    NET_ARGUMENTS = ("input_shape", "num_classes")
    class_names: list[str]  # after setup, or from a checkpoint
    rows: dict[Split, Tensor]  # after setup: rows of the examples in the stored images
    target: dict[Split, Tensor | None]  # after setup: classes; None if the labels are hidden

    def __init__(
        self,
        path: str = "digits",
        image_column: str | None = None,
        label_column: str | None = None,
        use_labels: bool = True,
        leave_out: list[str] | None = None,
        image_size: PositiveInt | None = None,
        background: str = "white",
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt = 1024,
        val_fraction: OpenUnitInterval = 0.1,
        test_fraction: OpenUnitInterval = 0.2,
        split_seed: NonNegativeInt = 0,
        predict_split: Split = "test",
        distortion: str | None = None,
        shift: NonNegativeFloat = 0.0,
        rotation: HalfTurn = 0.0,  # type: ignore[valid-type]
        cache_gib: NonNegativeFloat = 4.0,
        cache_dir: str = "data",
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        # A checkpoint holds int and float, but jsonargparse's numbers are of its own types.
        self.hparams.update(json.loads(json.dumps(self.hparams)))
        if background not in ImageColor.colormap and not re.fullmatch("#[0-9a-fA-F]{6}", background):
            raise ValueError(f"Expected data.background to be the name of a colour or #rrggbb, but got {background!r}")
        self._distortion = Distortion.parse(distortion, IMAGE_KINDS)
        self._trained: dict[str, Any] = {}  # the state of a checkpoint
        self._stored: Stored | None = None
        self._statistics: Statistics | None = None
        self.rows = {}

    def prepare_data(self) -> None:
        """Reads the dataset once, so that only one process computes the hashes of many images."""
        self._read()

    def _read(self) -> Stored:
        """Reads hashes, headers and labels of all stored splits, once; they must fit those of the checkpoint."""
        if self._stored is None:
            self._stored = read_images(self.hparams, self._trained)
            self.class_names = self._stored.class_names
        return self._stored

    def setup(self, stage: str | None = None) -> None:
        """Assigns the examples to splits, once for all stages; images are decoded later."""
        if self.rows:
            return
        stored, before = self._read(), self._trained.get("split")
        parts, assigned, classes = stored.images.parts, stored.assigned, stored.classes
        rows, self._facts = arrange(stored.hashes, classes, parts, assigned, self.hparams, before, fits=stage == "fit")
        hidden = [split for split, of_split in rows.items() if (classes[of_split] == UNKNOWN).any()]
        if self._facts and "val" in hidden:
            raise ValueError("Expected labels for validation, but got none in data.path: use data.leave_out")
        if hidden:
            rank_zero_info(f"Split {', '.join(hidden)} of data.path has no labels: it is predicted without scores")
        self.rows = {split: torch.from_numpy(of_split) for split, of_split in rows.items()}
        self.target = {s: None if s in hidden else torch.from_numpy(classes[rows[s]]) for s in rows}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels C, height H and width W of an image."""
        return self._read().images.shape

    @property
    def input_shape(self) -> list[int]:
        """Shape (C, H, W) as an argument of a net."""
        return list(self.image_shape)

    @property
    def num_classes(self) -> int | None:
        """Number K of classes; None without labels."""
        return len(self._read().class_names) or None

    @property
    def statistics(self) -> Statistics:
        """Statistics of the training split per channel, of intensities in [0, 1] for 8 and 16 bits."""
        if self._statistics is None:  # not computed in setup, which runs before a checkpoint is loaded
            self._statistics = channel_statistics(self._pixels, self.rows["train"])
        return self._statistics

    @property
    def mean(self) -> list[float]:
        """Mean of the training split per channel."""
        return self.statistics.mean

    @property
    def _pixels(self) -> Tensor | StoredImages:
        images = self._read().images
        return images.pixels if images.num_bytes <= self.hparams["cache_gib"] * 2**30 else images

    @property
    def _distorted(self) -> Tensor | StoredImages | DistortedImages:
        if not self._distortion:
            return self._pixels
        limits = self.statistics.limits(self._read().scale, self._read().images.deep)
        return DistortedImages(self._pixels, self._distortion, *limits)

    def raw_images(self, split: Split, indices: Sequence[int] | Tensor) -> Tensor:
        """Returns images of a test before standardisation, uint8 (n, C, H, W), by their `Batch.index`."""
        images = self._distorted[self.rows[split][torch.as_tensor(indices, dtype=torch.int64, device="cpu")]]
        return images if images.dtype == torch.uint8 else self.statistics.to_uint8(images)

    def sources(self, split: Split, indices: Sequence[int] | Tensor) -> list[str]:
        """Returns the origin of images: a file relative to `data.path`, or a stored split and its row."""
        return self._read().images.names(self.rows[split][torch.as_tensor(indices)].tolist())

    def provenance(self, split: Split, limit_batches: float) -> dict[str, Any]:
        split_facts = {key: value for key, value in (self._facts or {}).items() if key != "sketch"}
        return super().provenance(split, limit_batches) | {"class_names": self.class_names, "split": split_facts}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a trained network relies on, as primitives."""
        if not self.rows:
            return self._trained
        stored = self._read()
        channels, *size = stored.images.shape
        return {
            "class_names": stored.class_names,
            "channels": channels,
            "size": size,
            "scale": stored.scale,
            "background": stored.images.background,
            "statistics": vars(self.statistics),
            "split": self._facts,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes classes, statistics, background and split from a checkpoint."""
        self._statistics = Statistics(**state_dict["statistics"])
        if self.rows and self.state_dict() == state_dict:
            return
        is_set_up, self._trained = bool(self.rows), state_dict  # Lightning loads a checkpoint after setup
        self.class_names, self._stored, self.rows = state_dict["class_names"], None, {}
        if is_set_up:
            self.setup()

    def num_examples(self, split: Split) -> int:
        """Returns the number of images in a split, after setup, without decoding any."""
        return len(self.rows[split])

    def batches(self, split: Split, *, training: bool) -> ImageBatches:
        """Returns a split as batches, augmented for training."""
        mean, std = self.statistics.standard(self._read().images.deep)
        rotation, shift = (self.hparams[key] if training else 0.0 for key in ("rotation", "shift"))
        seed = self.hparams["seed"]
        return ImageBatches(self._pixels, self.rows[split], self.target[split], mean, std, rotation, shift, seed)

    def tested(self, split: Split) -> ImageBatches:
        """Returns a split as batches, distorted by `data.distortion`."""
        return replace(self.batches(split, training=False), images=self._distorted)

    def input_of(self, given: Any) -> Tensor:
        """Returns an image (see `image_of`) as input of a trained network, (C, H, W) float32; ValueError if it is none.

        It is resized to `image_size` and standardised.
        """
        return standardised(given, self._trained or self.state_dict(), self.hparams["image_size"])
