"""A prediction that is interrupted goes on where it broke off: the same rows, and none of them predicted twice over."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from thinned.data.module import SplitDataModule
from thinned.data.order import Split
from thinned.evaluation import MCDropout, prediction_store
from thinned.messages import ended_by_sigterm
from thinned.models import (
    GPT,  # gpt only
    MLP,
    DropoutRates,
)

KINDS = [
    "examples",
    "text",  # gpt only
]
SIZE = 40
BATCH = 4


class Batches(Dataset[tuple[Tensor, ...]]):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, item: tuple[int, list[int]]) -> tuple[Tensor, ...]:
        index = torch.tensor(item[1])
        return self.inputs[index], self.targets[index], index


class Data(SplitDataModule):
    """The same examples in every split."""

    def __init__(
        self, kind: str = "examples", path: str = "here", eval_batch_size: int = BATCH, predict_split: Split = "test",
        seed: int = 0, num_workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        draws = torch.Generator().manual_seed(0)
        if kind == "text":
            self.content = Batches(*torch.randint(11, (2, SIZE, 6), generator=draws))
        else:
            self.content = Batches(torch.randn(SIZE, 4, generator=draws), torch.randint(3, (SIZE,), generator=draws))

    def num_examples(self, split: Split) -> int:
        return SIZE

    def batches(self, split: Split, *, training: bool) -> Batches:
        return self.content


class Interrupts(Callback):
    """After some batches, in one way or another; counts the examples."""

    def __init__(self, after: int | None, how: Callable[[], object] | None = None) -> None:
        self.after, self.how, self.examples = after, how, 0

    def on_predict_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.after and self.how is not None:
            self.how()
        self.examples += len(batch[0])


class Broken(RuntimeError):
    pass


def fail() -> None:
    raise Broken


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def net(kind: str) -> torch.nn.Module:
    rates = DropoutRates(embedding=0.2, mlp=0.5)
    net: torch.nn.Module = MLP((4,), 3, (16,), dropout=rates)
    if kind == "text":  # gpt only
        net = GPT(11, 6, 1, 2, 16, dropout=rates)  # gpt only
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net


@pytest.fixture
def predict(
    make_trainer: Callable[..., Trainer], plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Predicts in a directory, until it is interrupted if it is; returns the number of examples that this took."""
    monkeypatch.setattr(prediction_store, "CHUNK_ROWS", 2 * BATCH)
    monkeypatch.setattr("thinned.evaluation.figures.figures", lambda *args: {})

    def run(
        directory: str, kind: str = "examples", after: int | None = None, how: Callable[[], object] = fail,
        data: LightningDataModule | None = None, weights: float = 0.0, limit: float | None = None, **settings: Any,
    ) -> int:  # fmt: skip
        module = plain(net(kind))
        with torch.no_grad():
            next(module.parameters()).add_(weights)
        counter = Interrupts(after, how)
        callback = MCDropout(**{"num_samples": 4, "seed": 3, "dirpath": str(tmp_path / directory)} | settings)
        trainer = make_trainer(callbacks=[counter, callback], limit_predict_batches=limit)
        try:
            with ended_by_sigterm():  # as the scripts are
                trainer.predict(module, data or Data(kind), return_predictions=False)
        except (Broken, SystemExit):
            assert after is not None
        return counter.examples

    return run


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    assert not list(folder.glob("*.parts"))
    return {path.stem: pq.read_table(path).to_pydict() for path in folder.glob("*.parquet")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [fail, interrupt, terminate])
def test_going_on_gives_the_rows_of_one_that_is_never_interrupted(
    how: Callable[[], object], kind: str, predict: Callable[..., int], tmp_path: Path
) -> None:
    assert predict("whole", kind) == SIZE
    assert predict("broken", kind, after=5, how=how) == 5 * BATCH
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["predictions.parts"]
    assert predict("broken", kind) == SIZE - 5 * BATCH  # what it held was written on the way out
    for name in ("predictions", "sequences")[: 1 + (kind == "text")]:
        ours, theirs = ((tmp_path / folder / f"{name}.parquet").read_bytes() for folder in ("broken", "whole"))
        assert ours == theirs
    assert rows(tmp_path / "broken").keys() == {"predictions", *(["sequences"] if kind == "text" else [])}
    assert (tmp_path / "broken/metrics.json").read_bytes() == (tmp_path / "whole/metrics.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_process_loses_what_was_not_yet_on_the_disk(
    kind: str, predict: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is two batches of examples, and each batch of windows has a chunk's tokens."""
    predict("whole", kind)
    with monkeypatch.context() as patched:
        patched.setattr(MCDropout, "on_exception", lambda *args: None)
        predict("broken", kind, after=5)
    assert predict("broken", kind) == SIZE - (5 if kind == "text" else 4) * BATCH
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_interrupted_again_and_again(predict: Callable[..., int], tmp_path: Path) -> None:
    predict("whole")
    taken = [predict("broken", after=3) for _ in range(3)] + [predict("broken")]
    assert taken == [3 * BATCH] * 3 + [BATCH]
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_batches_of_another_size(predict: Callable[..., int], tmp_path: Path) -> None:
    """20 rows are there; the next batch of 16 begins with the 16th, and its first 4 rows stay as they are."""
    predict("whole")
    predict("broken", after=5)
    assert predict("broken", data=Data(eval_batch_size=16)) == SIZE - 16
    got, expected = rows(tmp_path / "broken")["predictions"], rows(tmp_path / "whole")["predictions"]
    assert got["index"] == list(range(SIZE))
    for name, column in expected.items():
        torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(column), rtol=1e-5, atol=1e-6)
        assert got[name][:20] == column[:20]


def test_interrupted_between_the_last_row_and_the_merge(
    predict: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict("whole")
    with monkeypatch.context() as patched:
        patched.setattr("thinned.evaluation.prediction_store.merge", lambda *args: fail())
        predict("broken", after=-1)
    assert predict("broken") == BATCH  # the last batch again, as a Trainer without any calls no hook
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_limit_counts_from_the_first_batch_of_all(predict: Callable[..., int], tmp_path: Path) -> None:
    predict("whole", limit=7)
    predict("broken", after=5, limit=7)
    assert predict("broken", limit=7) == 2 * BATCH
    assert len(rows(tmp_path / "broken")["predictions"]["index"]) == 7 * BATCH
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_part_of_a_split_is_predicted_anew(predict: Callable[..., int], tmp_path: Path) -> None:
    predict("broken", after=5, limit=0.7)
    assert predict("broken", limit=0.7) == 7 * BATCH
    assert len(rows(tmp_path / "broken")["predictions"]["index"]) == 7 * BATCH


def test_chosen_sites_are_not_chosen_again(
    predict: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict("whole", sites="auto")
    predict("broken", sites="auto", after=5)
    monkeypatch.setattr("thinned.evaluation.ways.select_sites", lambda *args: fail())
    predict("broken", sites="auto")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert (tmp_path / "broken/metrics.json").read_bytes() == (tmp_path / "whole/metrics.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_samples": 5}, r"mc_dropout\.num_samples = 5 instead of 4"),
        ({"num_samples": None}, r"mc_dropout = None instead of "),
        ({"seed": 4}, r"mc_dropout\.seed = 4 instead of 3"),
        ({"masks": "independent"}, r"mc_dropout\.masks = independent instead of shared"),
        ({"sites": ["mlp"]}, r"mc_dropout\.sites = \['mlp'\] instead of \['embedding', 'mlp'\]"),
        ({"weights": 1e-3}, r"weights = \w{64} instead of \w{64}"),
        ({"data": Data(path="there")}, r"data\.path = there instead of here"),
        ({"data": Data(predict_split="val")}, r"data\.predict_split = val instead of test"),
        ({"limit": 7}, r"data\.examples = 28 instead of 40"),
        ({"data": Data(path="there"), "seed": 4}, r"mc_dropout\.seed = 4 instead of 3, data\.path = there instead"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], named: str, predict: Callable[..., int], tmp_path: Path
) -> None:
    predict("broken", after=5)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"Expected the settings of the interrupted prediction, but got {named}"):
        predict("broken", **change)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert predict("broken") == SIZE - 5 * BATCH  # nothing is lost


def test_automatic_sites_do_not_go_on_with_given_ones(predict: Callable[..., int]) -> None:
    predict("broken", after=5, sites=["mlp"])
    with pytest.raises(ValueError, match=r"but got mc_dropout\.sites = .* instead of \['mlp'\]"):
        predict("broken", sites="auto")


@pytest.mark.parametrize("change", [{"num_workers": 1}, {"eval_batch_size": 8}])
def test_settings_that_decide_no_row_are_no_obstacle(change: dict[str, int], predict: Callable[..., int]) -> None:
    predict("broken", after=4)
    assert predict("broken", data=Data(**change)) == SIZE - 4 * BATCH


class Foreign(LightningDataModule):
    """Anyone's, which begins where it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.predict_dataloader = Data().predict_dataloader


def test_data_that_cannot_begin_elsewhere_are_predicted_anew(predict: Callable[..., int], tmp_path: Path) -> None:
    predict("broken", after=5, data=Foreign())
    assert list((tmp_path / "broken/predictions.parts").glob("*.parquet"))
    assert predict("broken", data=Foreign(), weights=1e-3) == SIZE
    predict("whole", data=Foreign(), weights=1e-3)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_another_prediction_with_the_same_data_begins_at_the_beginning(predict: Callable[..., int]) -> None:
    data = Data()
    predict("broken", after=5, data=data)
    assert sum(len(batch[0]) for batch in data.predict_dataloader()) == SIZE
    assert predict("broken", data=data) == SIZE - 5 * BATCH
    assert predict("broken", data=data) == SIZE
    assert predict("elsewhere", data=data) == SIZE
