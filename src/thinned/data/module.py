"""What data modules may offer, and what ours share: three splits as loaders of whole batches in a computed order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from thinned.data.order import EpochBatchSampler, Split
from thinned.offers import Offers


class DataOffers(Protocol):
    """Attributes of a data module that others look for. All are optional: these are the defaults.

    Those that come from the data are there after `setup`.
    """

    path: str | None = None  # named in messages
    # Of images and of text: compared with the net before training.
    image_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    # Arguments of the net that only the data knows: the command line gives them to a net that leaves them null.
    net_arguments: Callable[[], dict[str, Any]] | None = None
    class_names: list[str] | None = None
    # `raw_images(split, indices)`: uint8 (n, C, H, W), for pictures.
    raw_images: Callable[[Split, Sequence[int]], Tensor] | None = None
    # What ways to predict learn from.
    val_dataloader: Callable[[], Iterable[Any]] | None = None
    # Text to tokens and back; `token_bytes` (V,) gives bits per byte.
    tokenizer: Any = None
    # The split that is predicted, and from which example on: those before it have been predicted already. Without it,
    # an interrupted prediction begins again.
    predict_split: Split = "test"
    predict_start: int | None = None
    # `provenance(split, limit_batches)`: what decides which examples are evaluated, as JSON.
    provenance: Callable[[Split, float], dict[str, Any]] | None = None


def data_offers(trainer: Trainer) -> DataOffers:
    """The optional attributes of a trainer's data module, if it has one, with the defaults for those that it lacks."""
    return cast(DataOffers, Offers(getattr(trainer, "datamodule", None), DataOffers))


def batch_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    num_workers: int,
    trainer: Trainer | None,
    start: int = 0,
    stop: int | None = None,
) -> DataLoader[Any]:
    """Returns a loader for a dataset that makes a whole batch at once, as ``dataset[epoch, indices]``.

    Args:
        dataset: The dataset; it has a length, in examples.
        batch_size: Size of the global batch.
        shuffle: Whether this is for training, where what does not fill a last optimiser step is dropped.
        seed: Seed of the order.
        num_workers: Number of worker processes; 0 makes the batches in this one.
        trainer: Says which rank, of how many, at which batch of which epoch; None is rank 0 of 1 at the start.
        start: First example of an evaluation.
        stop: Where the examples of an evaluation end; None for all.
    """

    def position() -> tuple[int | None, int]:
        """Where a resumed run goes on: Lightning restores its counters, but reads the loader from the start."""
        if trainer is None or not shuffle:
            return None, 0
        loop = trainer.fit_loop
        if loop.epoch_loop.batch_progress.is_last_batch:  # workers ask before Lightning turns to the next epoch
            return loop.epoch_progress.current.ready, 0
        return None, loop.epoch_loop.batch_progress.current.ready

    sampler = EpochBatchSampler(
        len(dataset) if stop is None else stop,  # type: ignore[arg-type]
        batch_size,
        shuffle=shuffle,
        start=start,
        seed=seed,
        rank=trainer.global_rank if trainer else 0,
        world_size=trainer.world_size if trainer else 1,
        drop_last=shuffle,
        batches_per_step=trainer.accumulate_grad_batches if trainer else 1,
        position=position,
    )
    order: Sampler[Any] | None = sampler
    if trainer and trainer.overfit_batches:  # type: ignore[attr-defined]
        # Lightning would replace any sampler by SequentialSampler(dataset), which knows nothing of batches.
        dataset, order = Subset(dataset, list(sampler)), None  # type: ignore[arg-type]
    elif trainer:
        # A resumed run's workers fetch their first batches before Lightning calls set_epoch.
        sampler.set_epoch(trainer.current_epoch)
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class SplitDataModule(LightningDataModule, ABC):
    """Batches of three splits; a subclass has ``hparams`` and says what the dataset of a split is."""

    # Hyperparameters on which the rows of a prediction do not depend.
    INDIFFERENT: ClassVar[frozenset[str]] = frozenset({"batch_size", "eval_batch_size", "num_workers"})
    predict_start = 0  # the first example to predict: those before it have been predicted already

    @property
    def path(self) -> str:
        """Where the data come from, as it was given."""
        return self.hparams["path"]

    @property
    def predict_split(self) -> Split:
        """The split to predict."""
        return self.hparams["predict_split"]

    @abstractmethod
    def batches(self, split: Split, *, training: bool) -> Dataset[Any]:
        """Returns a split as ``dataset[epoch, indices]``, for training or as it is."""

    @abstractmethod
    def num_examples(self, split: Split) -> int:
        """Returns the number of examples in a split, after setup."""

    def provenance(self, split: Split, limit_batches: float) -> dict[str, Any]:
        """Returns what decides which examples are evaluated, and how many they are.

        Args:
            split: That is evaluated.
            limit_batches: As in the Trainer: a number of batches, or a float for a part of them.
        """
        settings = {k: v for k, v in self.hparams.items() if k not in self.INDIFFERENT and not k.startswith("_")}
        return settings | {"predict_split": split, "examples": self._evaluated(split, limit_batches)}

    def _evaluated(self, split: Split, limit_batches: float) -> int:
        world_size = self.trainer.world_size if self.trainer else 1
        edges = EpochBatchSampler(
            self.num_examples(split), self.hparams["eval_batch_size"], shuffle=False, world_size=world_size
        ).edges
        last = len(edges) - 1
        return edges[min(limit_batches, last) if isinstance(limit_batches, int) else int(last * limit_batches)]

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns shuffled batches for training."""
        return self._dataloader("train", training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation split in order."""
        return self._dataloader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the test split in order."""
        return self._dataloader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the split `data.predict_split` in order, from `predict_start` on."""
        if not self.predict_start:
            return self._dataloader(self.predict_split)
        # Lightning would count its limit from the first batch that is left.
        assert self.trainer is not None
        stop = self._evaluated(self.predict_split, self.trainer.limit_predict_batches)
        return self._dataloader(self.predict_split, start=self.predict_start, stop=stop)

    def _dataloader(self, split: Split, *, training: bool = False, **part: int) -> DataLoader[Any]:
        return batch_loader(
            self.batches(split, training=training),
            self.hparams["batch_size" if training else "eval_batch_size"],
            shuffle=training,
            seed=self.hparams["seed"],
            num_workers=self.hparams["num_workers"],
            trainer=self.trainer,
            **part,
        )
