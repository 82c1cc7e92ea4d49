"""Decides which examples come when: batches of indices computed from (seed, epoch, rank).

Nothing depends on a global generator or an earlier epoch. So a resumed epoch has the same batches, and a training step
sees the same examples for any number of processes.
"""

from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Literal

import numpy as np
from torch.utils.data.distributed import DistributedSampler

Split = Literal["train", "val", "test"]


class EpochBatchSampler(DistributedSampler[tuple[int, list[int]]]):
    """Yields (epoch, indices) for this rank, a function of (seed, epoch, rank).

    Global batch i is examples i * B to (i + 1) * B in the order of the epoch. Of its examples, rank r of R takes every
    R-th, beginning with the r-th. The epoch comes with the indices, because `set_epoch` does not reach persistent
    workers.

    - Training: all ranks take the same number of steps, with the same number of examples in each. Examples that do not
      fill a last batch are left out of the epoch.
    - Evaluation: dataset order, every example exactly once. If there are R examples or more, all ranks take the
      same number of steps; for this, a last batch of fewer than R examples joins the one before.

    It is a `DistributedSampler` because Lightning would wrap any other sampler in one and shard the data twice.

    Args:
        num_examples: Size of the dataset.
        batch_size: Size B of the global batch, or less if there are fewer training examples.
        shuffle: Whether this is for training, in a new order every epoch.
        seed: Seed of the orders, at least 0.
        rank: This process, in [0, world_size).
        world_size: Number R of processes.
        start: First example to evaluate: whole global batches before it are left out, except the last one.
        batches_per_step: Number of batches whose gradients an optimiser step accumulates. Batches that do not fill a
            last step are left out, unless there are no others.
        position: Called when iteration begins; returns the epoch (None for that of `set_epoch`) and how many of its
            batches an interrupted run has trained on.

    Raises:
        ValueError: If training batches or examples cannot be divided among the ranks.
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
        start: int = 0,
        batches_per_step: int = 1,
        position: Callable[[], tuple[int | None, int]] | None = None,
    ) -> None:
        super().__init__(range(num_examples), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        if batch_size < 1:
            raise ValueError(f"Expected data.batch_size to be at least 1, but got {batch_size}")
        if num_examples < world_size:
            raise ValueError(f"Expected {world_size} examples, one a process, in data.path, but got {num_examples}")
        if shuffle:
            if batch_size % world_size:
                of = f"a multiple of the {world_size} processes"
                raise ValueError(f"Expected data.batch_size to be {of}, but got {batch_size}")
            end = num_examples // world_size * world_size
            batch_size = min(batch_size, end)
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
        epoch, done = self.position() if self.position else (None, 0)
        epoch = self.epoch if epoch is None else epoch
        order = np.arange(self.num_examples)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for start, end in islice(pairwise(self.edges), done, None):
            if start + self.rank < end:
                yield epoch, order[start + self.rank : end : self.num_replicas].tolist()

    def __len__(self) -> int:
        return sum(start + self.rank < end for start, end in pairwise(self.edges))
