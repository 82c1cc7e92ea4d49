"""Splits, order and sharding of the examples."""

from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from thinned.data.module import SplitDataModule
from thinned.data.order import EpochBatchSampler, Split

WORLD_SIZES = [1, 2, 3]
SIZES = [(12, 6), (13, 6), (17, 6), (7, 12), (5, 6), (3, 6), (100, 12)]  # (examples, batch size)


def batches(
    num_examples: int, batch_size: int, world_size: int, epoch: int = 0, **kwargs: Any
) -> list[list[list[int]]]:
    """The indices of every rank, step by step."""
    ranks = []
    for rank in range(world_size):
        sampler = EpochBatchSampler(num_examples, batch_size, rank=rank, world_size=world_size, **kwargs)
        sampler.set_epoch(epoch)
        steps = list(sampler)
        assert all(step[0] == epoch for step in steps)
        assert len(sampler) == len(steps)
        ranks.append([indices for _, indices in steps])
    return ranks


def global_batches(ranks: list[list[list[int]]]) -> list[list[int]]:
    """What all ranks see together at each step: their strides put back into order."""
    return [
        [index for stride in zip_longest(*step) for index in stride if index is not None]
        for step in zip_longest(*ranks, fillvalue=[])
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("num_examples", "batch_size"), [*SIZES, (13, 2), (3, 1), (3, 4)])
def test_evaluation_is_in_order_and_has_each_example_once(num_examples: int, batch_size: int, world_size: int) -> None:
    ranks = batches(num_examples, batch_size, world_size, shuffle=False)
    assert [i for batch in global_batches(ranks) for i in batch] == list(range(num_examples))
    assert all(batch for rank in ranks for batch in rank)
    assert len({len(rank) for rank in ranks}) == 1


def test_a_tail_too_small_for_all_ranks_joins_the_batch_before() -> None:
    assert batches(7, 3, world_size=3, shuffle=False) == [[[0], [3, 6]], [[1], [4]], [[2], [5]]]
    assert batches(7, 3, world_size=1, shuffle=False) == [[[0, 1, 2], [3, 4, 5], [6]]]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_training_gives_every_rank_as_many_examples_at_every_step(
    num_examples: int, batch_size: int, world_size: int
) -> None:
    ranks = batches(num_examples, batch_size, world_size, shuffle=True)
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1
    seen = [index for batch in global_batches(ranks) for index in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(num_examples))
    shared = num_examples // world_size * world_size
    batch_size = min(batch_size, shared)
    assert len(seen) == shared // batch_size * batch_size


@pytest.mark.parametrize(("num_examples", "left"), [(100, 96), (96, 96), (95, 72), (24, 24), (23, 18), (7, 6)])
def test_an_epoch_has_whole_optimiser_steps_unless_it_has_not_one(num_examples: int, left: int) -> None:
    """Of 4 batches of 6: the examples of 24 at once."""
    options: dict[str, Any] = {"shuffle": True}
    accumulated = global_batches(batches(num_examples, 6, 2, epoch=1, batches_per_step=4, **options))
    assert [len(batch) for batch in accumulated] == [6] * (left // 6)
    if num_examples >= 24:
        at_once = global_batches(batches(num_examples, 24, 1, epoch=1, **options))
        assert [i for batch in accumulated for i in batch] == [i for batch in at_once for i in batch]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_processes_together_see_the_global_batches_of_one(world_size: int) -> None:
    one = global_batches(batches(100, 12, 1, epoch=4, shuffle=True))
    several = global_batches(batches(100, 12, world_size, epoch=4, shuffle=True))
    assert several == one
    assert [len(batch) for batch in one] == [12] * 8


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return batches(50, 50, 1, epoch, shuffle=True, seed=seed)[0][0]

    assert order(3, 5) == order(3, 5)
    # Not seed + epoch, under which the next seed would see the same orders an epoch earlier.
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # A resumed run has to find the order that it left, whatever version it resumes with.
    assert batches(6, 6, 1, epoch=7, shuffle=True, seed=3) == [[[4, 0, 1, 2, 3, 5]]]


def test_global_generators_are_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = batches(50, 10, 1, shuffle=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(2)
    assert batches(50, 10, 1, shuffle=True) == first


def test_what_cannot_be_shared_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected data\.batch_size to be a multiple of the 3 processes, but got 8"):
        EpochBatchSampler(100, 8, shuffle=True, world_size=3)
    with pytest.raises(ValueError, match=r"Expected 4 examples, one a process, in data\.path, but got 3"):
        EpochBatchSampler(3, 8, shuffle=True, world_size=4)
    with pytest.raises(ValueError, match=r"Expected 4 examples, one a process"):
        EpochBatchSampler(3, 8, shuffle=False, world_size=4)
    with pytest.raises(ValueError, match=r"Expected data\.batch_size to be at least 1, but got 0"):
        EpochBatchSampler(3, 0, shuffle=True)


@pytest.mark.parametrize("done", [0, 1, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_that_a_resumed_run_has_behind_it_are_left_out(world_size: int, done: int) -> None:
    options = {"shuffle": True, "seed": 3, "world_size": world_size}
    for rank in range(world_size):
        whole, rest = (
            EpochBatchSampler(22, 4, rank=rank, position=lambda n=n: (None, n), **options) for n in (0, done)
        )
        whole.set_epoch(2)
        rest.set_epoch(2)
        assert list(rest) == list(whole)[done:]
        assert len(rest) == len(whole) == 5  # of the epoch, as Lightning goes on counting


def test_what_is_done_is_asked_at_each_beginning() -> None:
    behind = iter([3, 0])
    sampler = EpochBatchSampler(20, 4, shuffle=True, position=lambda: (None, next(behind)))
    first, second = list(sampler), list(sampler)
    assert (first, len(second)) == (second[3:], 5)


class Echo(Dataset[Any]):
    """Returns the epoch and indices that it is asked for."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, item: tuple[int, list[int]]) -> Tensor:
        epoch, indices = item
        return torch.tensor([epoch, *indices])


class Echoes(SplitDataModule):
    """Is asked for loaders without being given to its trainer."""

    def __init__(self, trainer: Any, batch_size: int, num_workers: int) -> None:
        super().__init__()
        settings = {"batch_size": batch_size, "eval_batch_size": batch_size, "num_workers": num_workers, "seed": 0}
        self.save_hyperparameters(settings)
        self.trainer = trainer

    def batches(self, split: Split, *, training: bool) -> Echo:
        return Echo()

    def num_examples(self, split: Split) -> int:
        return len(Echo())


FIT = [3, 5, 7, 9, 10, 13, 19]  # of 20 examples, recorded: a resumed run has to find them again


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_processes_share_the_fit_examples(world_size: int) -> None:
    """Of which there are as many as for validation; reading them draws nothing from the global generator."""

    class Split(Echoes):
        def num_examples(self, split: Any) -> int:
            return {"train": len(Echo()), "val": 7}[split]

    def fit(rank: int) -> list[list[int]]:
        trainer = SimpleNamespace(global_rank=rank, world_size=world_size, accumulate_grad_batches=1)
        return [batch.tolist()[1:] for batch in Split(trainer, 3, 0).fit_dataloader()]

    generator = torch.get_rng_state()
    shares = [fit(rank) for rank in range(world_size)]
    assert torch.get_rng_state().equal(generator)
    assert sorted(index for share in shares for batch in share for index in batch) == FIT
    assert len({len(share) for share in shares}) == 1  # as many batches for each


class Late(LightningDataModule):
    """Makes its loader when it is asked to, as by then a trainer knows where it resumes."""

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        super().__init__()
        self.loader = partial(loader, trainer, shuffle=True, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader()


class Recorder(LightningModule):
    """Writes down every batch, [epoch, indices]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen.append(batch.tolist())
        return self.weight * 1.0

    def predict_step(self, batch: Tensor) -> Tensor:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False} | quiet | options)


@pytest.fixture
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return make_trainer(**getattr(request, "param", {}))


def fake_trainer(rank: int = 0, world_size: int = 1, epoch: int = 0, done: int = 0) -> Any:
    """What the loader asks of a trainer."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=done), is_last_batch=False)
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        overfit_batches=0.0,
        accumulate_grad_batches=1,
        current_epoch=epoch,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def loader(trainer: Any, *, shuffle: bool, num_workers: int = 0, batch_size: int = 8) -> DataLoader[Any]:
    data = Echoes(trainer, batch_size, num_workers)
    return data.train_dataloader() if shuffle else data.val_dataloader()


def expected(epoch: int, batch_size: int = 8) -> list[list[int]]:
    (rank,) = batches(20, batch_size, 1, epoch, shuffle=True)
    return [[epoch, *indices] for indices in rank]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
class TestLightning:
    def test_fit_has_a_new_order_every_epoch(self, trainer: Trainer) -> None:
        model = Recorder()
        trainer.fit(model, loader(trainer, shuffle=True))
        assert model.seen == expected(0) + expected(1)

    def test_predict_leaves_the_sampler_alone(self, trainer: Trainer) -> None:
        predictions = trainer.predict(Recorder(), loader(trainer, shuffle=False))
        assert torch.cat([batch[1:] for batch in predictions]).tolist() == list(range(20))
        assert [len(batch) - 1 for batch in predictions] == [8, 8, 4]

    @pytest.mark.parametrize("trainer", [{"overfit_batches": 2}], indirect=True)
    def test_overfit_batches_repeats_the_same_batches(self, trainer: Trainer) -> None:
        model = Recorder()
        trainer.fit(model, loader(trainer, shuffle=True))
        assert model.seen == expected(0) * 2

    # Of loaders without a state of their own, which ours does not need.
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.parametrize(
        ("steps", "num_workers"),  # of five steps in an epoch
        [(steps, workers) for steps in (1, 3, 5, 7, 10) for workers in (0, 1)],
    )
    def test_resumed_fit_sees_each_batch_once(self, steps: int, num_workers: int, tmp_path: Path) -> None:
        path = tmp_path / "broken.ckpt"
        save = LambdaCallback(on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(path))
        seen = []
        for ckpt_path, options in (
            (None, {"max_steps": steps, "max_epochs": -1, "callbacks": [save]}),
            (path, {"max_epochs": 3}),
        ):
            trainer, model = make_trainer(**options), Recorder()
            data = Late(trainer, num_workers=num_workers, batch_size=4)
            trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
            seen.append(model.seen)
        whole = [batch for epoch in range(3) for batch in expected(epoch, 4)]
        assert seen == [whole[:steps], whole[steps:]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_that_fetch_ahead_do_so_for_the_epoch_at_hand(num_workers: int) -> None:
    for done in (0, 1):
        resumed = fake_trainer(epoch=6, done=done)
        got = [batch.tolist() for batch in loader(resumed, shuffle=True, num_workers=num_workers)]
        assert got == expected(6)[done:]


def test_evaluation_begins_at_the_beginning_in_the_middle_of_an_epoch() -> None:
    got = [batch.tolist() for batch in loader(fake_trainer(done=2), shuffle=False)]
    assert [len(batch) - 1 for batch in got] == [8, 8, 4]


def test_rank_and_world_size_are_the_trainers() -> None:
    second = fake_trainer(rank=1, world_size=2)
    assert [batch.tolist() for batch in loader(second, shuffle=False)] == [
        [0, 1, 3, 5, 7],
        [0, 9, 11, 13, 15],
        [0, 17, 19],
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_evaluation_begins_with_the_batch_of_an_example(num_examples: int, batch_size: int, world_size: int) -> None:
    """The batches that are left are those of the whole evaluation; of one that is done, the last."""
    whole = global_batches(batches(num_examples, batch_size, world_size, shuffle=False))
    for start in range(num_examples + 1):
        rest = global_batches(batches(num_examples, batch_size, world_size, shuffle=False, start=start))
        assert rest == whole[-len(rest) :]
        assert start in rest[0] or (start == num_examples and len(rest) == 1)
