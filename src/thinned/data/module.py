"""Lists what data modules may offer, and defines what ours share: loaders of whole batches in a computed order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from thinned.data.order import EpochBatchSampler, Split
from thinned.offers import Offers


class DataOffers(Protocol):
    """Lists the optional attributes of a data module that others read, with their defaults.

    Those that come from the data exist after `setup`. Its batches are (inputs, targets, index). Unknown targets may be
    None. `index` (B,) int64, the place of each example in its split, names the row of a prediction; without it,
    examples are numbered in the order of Lightning's own samplers.
    """

    path: str | None = None  # named in messages
    # Compared with the net before training.
    image_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    # `net_arguments(names)`: those arguments of a net that only the data know. The command line passes null ones.
    net_arguments: Callable[[Collection[str]], dict[str, Any]] | None = None
    class_names: list[str] | None = None
    # `raw_images(split, indices)`: uint8 (n, C, H, W), for pictures.
    raw_images: Callable[[Split, Sequence[int]], Tensor] | None = None
    # `input_of(example)`: an image or a text as input of the net, without a batch dimension; with a checkpoint's state,
    # also before `setup`. `thinned.evaluation.Predictor` needs it.
    input_of: Callable[[Any], Tensor] | None = None
    # Ways to predict are fitted on it.
    val_dataloader: Callable[[], Iterable[Any]] | None = None
    # The same training examples each time, without augmentation, which tasks score at each validation (`fit/*`): at
    # most as many batches as the validation split has.
    fit_dataloader: Callable[[], Iterable[Any]] | None = None
    # Turns text to tokens and back; its `token_bytes` (V,) gives bits per byte.
    tokenizer: Any = None
    # `sources(split, indices)`: the file of each example, or its stored split and row.
    sources: Callable[[Split, Sequence[int]], list[str]] | None = None
    # The split to predict, and the first example that is not yet predicted. If None, an interrupted prediction begins
    # again.
    predict_split: Split = "test"
    predict_start: int | None = None
    # `provenance(split, limit_batches)`: settings that decide which examples are evaluated, as JSON.
    provenance: Callable[[Split, float], dict[str, Any]] | None = None


def data_offers(trainer: Trainer) -> DataOffers:
    """Returns the optional attributes of a trainer's data module, with defaults for those that it lacks."""
    return cast(DataOffers, Offers(getattr(trainer, "datamodule", None), DataOffers))


class SplitDataModule(LightningDataModule, ABC):
    """Loads batches of three splits; a subclass has `hparams` and defines the dataset of a split."""

    # Hyperparameters that do not change the rows of a prediction.
    INDIFFERENT: ClassVar[frozenset[str]] = frozenset({"batch_size", "eval_batch_size", "num_workers"})
    # Attributes that are arguments of a net, by name; they may read the data.
    NET_ARGUMENTS: ClassVar[tuple[str, ...]] = ()
    predict_start = 0  # the first example that is not yet predicted

    @property
    def path(self) -> str:
        return self.hparams["path"]

    @property
    def predict_split(self) -> Split:
        return self.hparams["predict_split"]

    def net_arguments(self, names: Collection[str]) -> dict[str, Any]:
        """Returns those arguments of a net that only the data know, if `names` ask for them."""
        return {name: getattr(self, name) for name in self.NET_ARGUMENTS if name in names}

    @abstractmethod
    def batches(self, split: Split, *, training: bool) -> Dataset[Any]:
        """Returns a split as `dataset[epoch, indices]`; augments it only for training."""

    def tested(self, split: Split) -> Dataset[Any]:
        """Returns a split for a test or a prediction; a subclass may distort it."""
        return self.batches(split, training=False)

    def num_examples(self, split: Split) -> int:
        """Returns the number of examples in the evaluation of a split, after setup."""
        return len(self.tested(split))  # type: ignore[arg-type]

    def provenance(self, split: Split, limit_batches: float) -> dict[str, Any]:
        """Returns the settings that decide which examples are evaluated, and the number of examples.

        `limit_batches` is a number of batches, or a float for a fraction of them, as in the Trainer.
        """
        settings = {k: v for k, v in self.hparams.items() if k not in self.INDIFFERENT and not k.startswith("_")}
        return settings | {"predict_split": split, "examples": self._evaluated(split, limit_batches)}

    def _evaluated(self, split: Split, limit_batches: float) -> int:
        edges = self._sampler(self.num_examples(split)).edges
        last = len(edges) - 1
        return edges[min(limit_batches, last) if isinstance(limit_batches, int) else int(last * limit_batches)]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._dataloader(self.batches("train", training=True), training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._dataloader(self.batches("val", training=False))

    def test_dataloader(self) -> DataLoader[Any]:
        return self._dataloader(self.tested("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the split `data.predict_split` in order, from `predict_start` on."""
        split, stop = self.predict_split, None
        if self.predict_start:  # Lightning would count its limit from the first batch that remains
            assert self.trainer is not None
            stop = self._evaluated(split, self.trainer.limit_predict_batches)
        return self._dataloader(self.tested(split), start=self.predict_start, stop=stop)

    def fit_dataloader(self) -> DataLoader[Any]:
        """Returns as many training examples as the validation has, without augmentation; `seed` chooses them."""
        total, count = self.num_examples("train"), self.num_examples("val")
        generator = np.random.default_rng((self.hparams["seed"], 0, 2))  # the order is (seed, epoch)
        chosen = np.sort(generator.choice(total, min(total, count), replace=False, shuffle=False))
        batches = [(epoch, chosen[places].tolist()) for epoch, places in self._sampler(len(chosen))]
        return self._loader(Subset(self.batches("train", training=False), batches))  # type: ignore[arg-type]

    def _dataloader(
        self, dataset: Dataset[Any], *, training: bool = False, start: int = 0, stop: int | None = None
    ) -> DataLoader[Any]:
        """Returns a loader of whole batches, for training or for the examples from start to stop."""
        stop = len(dataset) if stop is None else stop  # type: ignore[arg-type]
        sampler = self._sampler(stop, training=training, start=start)
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            # Lightning would replace any sampler by SequentialSampler(dataset), which yields no batches.
            return self._loader(Subset(dataset, list(sampler)))  # type: ignore[arg-type]
        if self.trainer:
            # A resumed run's workers fetch their first batches before Lightning calls set_epoch.
            sampler.set_epoch(self.trainer.current_epoch)
        return self._loader(dataset, sampler)

    def _loader(self, dataset: Dataset[Any], order: Sampler[Any] | None = None) -> DataLoader[Any]:
        """Returns a loader of whole batches, which draws nothing from the global generator."""
        num_workers = self.hparams["num_workers"]
        return DataLoader(
            dataset,
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def _sampler(self, num_examples: int, *, training: bool = False, start: int = 0) -> EpochBatchSampler:
        trainer = self.trainer
        return EpochBatchSampler(
            num_examples,
            self.hparams["batch_size" if training else "eval_batch_size"],
            shuffle=training,
            start=start,
            seed=self.hparams["seed"],
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            batches_per_step=trainer.accumulate_grad_batches if trainer else 1,
            position=self._position if training and trainer else None,
        )

    def _position(self) -> tuple[int | None, int]:
        """Returns where training resumes: Lightning restores its counters, but reads the loader from the start."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        if loop.epoch_loop.batch_progress.is_last_batch:  # workers ask before Lightning begins the next epoch
            return loop.epoch_progress.current.ready, 0
        return None, loop.epoch_loop.batch_progress.current.ready
