"""Which examples come when: splits, batches of indices computed from (seed, epoch, rank), and their loaders.

Nothing is drawn from a global generator or carried over from an earlier epoch, so a resumed epoch has the
batches it would have had, and a training step sees the same examples however many processes share them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torch.utils.data.distributed import DistributedSampler

Split = Literal["train", "val", "test"]


def stratified_split(labels: Tensor, rows: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits rows in two parts with the same proportions of classes.

    Args:
        labels: Class of every example, shape (N,).
        rows: The examples to split, shape (M,).
        size: Number of rows in the second part.
        seed: Seed of the draw.

    Returns:
        Two ascending tensors of rows, shapes (M - size,) and (size,).

    Raises:
        ValueError: If a part is too small to hold every class, or a class has a single example.
    """
    parts = train_test_split(rows.numpy(), test_size=size, stratify=labels[rows].numpy(), random_state=seed)
    first, second = (torch.from_numpy(np.sort(part)) for part in parts)
    return first, second


class EpochBatchSampler(DistributedSampler[tuple[int, list[int]]]):
    """Yields (epoch, indices) for this rank; a pure function of (seed, epoch, rank).

    Global batch i is examples i * B to (i + 1) * B in the order of the epoch; of these, rank r of R takes
    every R-th, beginning with the r-th. The epoch goes with the indices, as ``set_epoch`` does not reach
    persistent workers.

    - Training (``shuffle``): at each step all ranks have the same number of examples, and they take the same
      number of steps. What cannot be shared out evenly is left out of the epoch.
    - Evaluation: dataset order, every example exactly once. If there is an example for each rank, all ranks
      take the same number of steps, for which a last batch of less than R examples joins the one before.

    It is a ``DistributedSampler`` because Lightning would wrap any other sampler in one and shard the data
    twice.

    Args:
        num_examples: Size of the dataset.
        batch_size: Size B of the global batch. Where there are fewer training examples than that, it is the
            largest size that all ranks can share.
        shuffle: Whether this is for training, in a new order every epoch.
        seed: Seed of the orders, at least 0.
        rank: This process, in [0, world_size).
        world_size: Number R of processes.
        drop_last: Whether a last training batch of less than B examples is left out.
        start: First example of an evaluation that is wanted: whole global batches before it are left out, though never
            the last one.
        batches_per_step: Number of batches whose gradients an optimiser step accumulates. With ``drop_last`` the
            batches that do not fill a last step are left out too, unless there is no other.
        position: Says, when iteration begins, the epoch (None for that of ``set_epoch``) and how many of its batches
            an interrupted run has behind it.

    Raises:
        ValueError: If training batches or examples cannot be shared out among the ranks.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        start: int = 0,
        batches_per_step: int = 1,
        position: Callable[[], tuple[int | None, int]] = lambda: (None, 0),
    ) -> None:
        examples = range(num_examples)
        super().__init__(examples, world_size, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        if batch_size < 1:
            raise ValueError(f"Expected data.batch_size to be at least 1, but got {batch_size}")
        if num_examples < world_size:
            which = "training example" if shuffle else "example to evaluate or predict"
            raise ValueError(
                f"Expected at least one {which} for each of {world_size} processes, but got {num_examples} (data.path)"
            )
        if shuffle:
            if batch_size % world_size:
                raise ValueError(
                    f"Expected data.batch_size to be a multiple of the number of processes, {world_size}, "
                    f"but got {batch_size}"
                )
            end = num_examples // world_size * world_size
            batch_size = min(batch_size, end)
            if drop_last:
                step = batch_size * batches_per_step
                end = end // step * step or end // batch_size * batch_size
        else:
            end = num_examples
            batch_size = max(batch_size, world_size)
        self.num_examples = num_examples
        self.position = position
        self.edges = [*range(0, end, batch_size), end]  # global batch i is order[edges[i] : edges[i + 1]]
        if len(self.edges) > 2 and self.edges[-1] - self.edges[-2] < world_size:
            del self.edges[-2]
        del self.edges[: min(start // batch_size, len(self.edges) - 2)]

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, done = self.position()
        epoch = self.epoch if epoch is None else epoch
        order = np.arange(self.num_examples)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for start, end in islice(pairwise(self.edges), done, None):
            if start + self.rank < end:
                yield epoch, order[start + self.rank : end : self.num_replicas].tolist()

    def __len__(self) -> int:
        return sum(start + self.rank < end for start, end in pairwise(self.edges))


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
    # Says, when prediction is about to begin, with which example: an interrupted one goes on.
    predict_start: Callable[[], int] | None = None

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
        """Returns the split ``data.predict_split`` in order, what an interrupted prediction has of it left out."""
        split = self.hparams["predict_split"]
        start = self.predict_start() if self.predict_start else 0
        if not start:
            return self._dataloader(split)
        # Lightning would count its limit from the first batch that is left.
        assert self.trainer is not None
        return self._dataloader(split, start=start, stop=self._evaluated(split, self.trainer.limit_predict_batches))

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
