"""Holds what a way to predict is given: batches to predict, and held-out ones to learn from.

Shapes: B examples or sequences, T tokens of a sequence, N targets (B, or the tokens that count), K classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from thinned.data.content_split import content_hash, uniform
from thinned.data.module import data_offers
from thinned.models.net import Logits, logits_of, net_offers
from thinned.offers import task_offers
from thinned.ranks import of_all_ranks
from thinned.uncertainty.kept_networks import rows_at_once
from thinned.uncertainty.statistics import MCStatistics, TokenStatistics

Half = Literal["fit", "calibrate"]
HALVES_SEED = 0
PROBABILITIES_AT_ONCE = 2**27  # of the mean distributions of all ways over a vocabulary: 512 MiB in fp32


def trained_net(task: LightningModule) -> nn.Module:
    """Returns the net of a LightningModule if it can be thinned, else the module itself: both map inputs to logits."""
    net = task_offers(task).net
    thinnable = net is not None and net_offers(net).thin is not None and task.device_mesh is None
    return net if net is not None and thinnable else task


def in_half(inputs: Tensor, half: Half) -> Tensor:
    """Returns whether examples belong to a half of the validation split, (B,) bool: a function of their content.

    One half chooses sites and temperatures, the other calibrates prediction sets. So what is calibrated has not been
    seen by what is chosen, and is exchangeable with the test.
    """
    hashes = [content_hash(example.numpy().tobytes()) for example in inputs.cpu().contiguous()]
    return torch.from_numpy((uniform(np.array(hashes, dtype=np.uint64), HALVES_SEED) < 0.5) == (half == "fit"))


class Batch:
    """Holds examples with a target each, or sequences with a target for each token, and what ways say of them.

    Args:
        inputs: Nets are called with them.
        index: Place of each example in its split, (B,).
        targets: (B,), or (B, T) for text, with -100 for a token that does not count; None if they are not known.
        known: The trained net, and what it says of the inputs, if it has been asked already.
    """

    def __init__(
        self, inputs: Any, index: Tensor, targets: Tensor | None, known: tuple[nn.Module, Logits] | None = None
    ) -> None:
        self.inputs, self.index, self.targets = inputs, index, targets
        self.counted = targets >= 0 if targets is not None and targets.dim() == 2 else None  # of text, (B, T)
        self.is_void = False  # True if its targets count for nothing
        self._known = known
        self._statistics: dict[int, MCStatistics | TokenStatistics] = {}  # by the id of a `Way`

    @property
    def target(self) -> Tensor:
        """(N,), the class or token of each target."""
        assert self.targets is not None
        return self.targets if self.counted is None else self.targets[self.counted]

    def logits(self, net: nn.Module, inputs: Any = None) -> Logits:
        """Returns what a net says of the N targets, given the batch's inputs or others of the same shape."""
        return self._of_targets(logits_of(net, self.inputs if inputs is None else inputs))

    def output(self, net: nn.Module) -> Logits:
        """Returns what a net without dropout says of the N targets, from the test step if that has asked it."""
        if self._known is not None and net is self._known[0]:
            return self._of_targets(self._known[1])
        return self.logits(net)

    def _of_targets(self, logits: Logits) -> Logits:
        return logits if self.counted is None else logits.select(self.counted)

    def statistics(self, way: Any) -> MCStatistics | TokenStatistics:
        """Returns the statistics of all distributions of a `Way`. The first call computes them."""
        if id(way) not in self._statistics:
            self._statistics[id(way)] = way.statistics_of(self)
        return self._statistics[id(way)]

    def sum_up(self, stream: Iterator[Logits]) -> MCStatistics | TokenStatistics:
        """Returns the statistics of distributions of the N targets."""
        if self.counted is None:
            at_once = max(1, rows_at_once(self.index.device) // max(1, len(self.index)))
            examples = MCStatistics(self.targets)
            while samples := list(islice(stream, at_once)):
                examples.update_all(torch.softmax(torch.stack([logits[:] for logits in samples]), dim=-1))
            return examples
        tokens = TokenStatistics(self.target, self.counted.nonzero()[:, 0], len(self.index))
        for logits in stream:
            tokens.update(logits)
        return tokens

    def mean(self, way: Any) -> Tensor:
        """Returns the prediction of a `Way`: the mean of its distributions, (N, K)."""
        return self.statistics(way).mean

    def parts(self, trained: nn.Module, num_ways: int) -> Iterator["Batch"]:
        """Yields the batch itself; of text, as many sequences at a time as the means of all ways leave room for."""
        at_once = len(self.index)
        if self.counted is not None:
            V = net_offers(trained).vocab_size or logits_of(trained, self.inputs[:1, :1]).num_classes
            at_once = max(1, PROBABILITIES_AT_ONCE // (V * self.counted.shape[1] * num_ways))
        if at_once >= len(self.index):
            yield self
            return
        for start in range(0, len(self.index), at_once):
            rows = slice(start, start + at_once)
            known = None if self._known is None else (self._known[0], self._known[1].select(rows))
            yield Batch(self.inputs[rows], self.index[rows], self.targets[rows], known)  # type: ignore[index]


class Validation:
    """Gives a way held-out examples to learn from, the same on all processes.

    `batches` yields the parts of each batch, whenever it is called. All processes have as many batches, but maybe not
    as many parts. `total` adds up a tensor over all processes.
    """

    def __init__(self, batches: Callable[[], Iterable[Iterable[Batch]]], total: Callable[[Tensor], Tensor]) -> None:
        self._batches, self._total = batches, total

    @classmethod
    def of(cls, trainer: Trainer, task: LightningModule, num_ways: int, half: Half) -> "Validation":
        """Returns one half of the validation split of a trainer's data module."""

        def batches() -> Iterator[Iterable[Batch]]:
            loader = data_offers(trainer).val_dataloader
            if loader is None:
                raise ValueError("Expected a data module, from whose validation split to learn, but got none")
            seen = 0
            for inputs, targets, *rest in loader():
                if targets is None:
                    raise ValueError("Expected a validation split with known targets to learn from, but got none")
                index = rest[0] if rest else torch.arange(seen, seen + len(targets))  # seeds independent masks
                seen += len(targets)
                chosen = in_half(inputs, half).nonzero()[:, 0]
                rows = chosen if len(chosen) else slice(1)  # processes with a sharded net run it equally often
                moved = trainer.strategy.batch_to_device((inputs[rows], index[rows], targets[rows]), task.device)
                with trainer.precision_plugin.forward_context():
                    batch = Batch(*moved)
                    batch.is_void = not len(chosen)
                    yield [batch] if batch.is_void else batch.parts(trained_net(task), num_ways)

        return cls(batches, lambda x: trainer.strategy.reduce(x.clone(), reduce_op="sum"))

    @torch.no_grad()
    def mean(self, values: Callable[[Batch], Tensor], enough: float = math.inf) -> Tensor:
        """Returns the mean over all targets of what `values` gives, (N, ...) for the N targets of a part.

        `enough` targets of all processes suffice; the last batch counts as a whole. ValueError if there are none.
        """
        total, count = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for parts in self._batches():
            for part in parts:
                of_part = values(part).float()[: 0 if part.is_void else None]  # half precision cannot count
                total, count = total.to(of_part.device) + of_part.sum(0), count.to(of_part.device) + len(of_part)
            if enough < math.inf and self._total(count) >= enough:
                break
        total, count = self._total(total), self._total(count)
        if not count:
            raise ValueError("Expected a validation split of two examples or more to learn from, but got fewer")
        return total / count

    @torch.no_grad()
    def gather(self, values: Callable[[Batch], Tensor]) -> Tensor:
        """Returns what `values` gives for the N targets of each part, (N, ...), of all processes in any order."""
        own = [values(part)[: 0 if part.is_void else None].cpu() for parts in self._batches() for part in parts]
        return torch.cat(of_all_ranks(torch.cat(own)))
