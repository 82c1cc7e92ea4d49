"""Speeds by a clock that goes on in training and validation steps alone."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from thinned.tasks import Throughput, throughput

STEP, VALIDATION = 0.25, 100.0  # seconds
B, T = 4, 8


class Clock:
    """Shows the seconds that it was told of."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Timed(LightningModule):
    """Each training batch takes STEP seconds and each validation batch VALIDATION; batch i takes i + 1 times that."""

    def __init__(self, clock: Clock, uneven: bool = False, net: Any = None) -> None:
        super().__init__()
        self.clock, self.uneven, self.net = clock, uneven, net
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += STEP * (batch_idx + 1 if self.uneven else 1)
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += VALIDATION

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Record(Logger):
    """Keeps what is logged."""

    name, version = "record", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **options: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if any(key.startswith("throughput/") for key in metrics):
            self.rows.append((step, metrics))

    def column(self, name: str) -> list[float]:
        return [row[f"throughput/{name}"] for _, row in self.rows]


def texts(count: int) -> DataLoader[Any]:
    tokens = torch.zeros(count * B, T, dtype=torch.int64)
    return DataLoader(TensorDataset(tokens, tokens), B)


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Record]:
    """Fits for an epoch and returns what was logged of its speed."""

    def run(
        train: DataLoader[Any],
        val: DataLoader[Any] | None = None,
        *,
        uneven: bool = False,
        net: Any = None,
        callback: Throughput | None = None,
        **options: Any,
    ) -> Record:
        clock, record = Clock(), Record()
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock))
        options = {"max_epochs": 1, "log_every_n_steps": 1} | options
        trainer = make_trainer(logger=record, callbacks=[callback or Throughput()], **options)
        trainer.fit(Timed(clock, uneven, net), train, val)
        record.progress_bar = trainer.progress_bar_metrics
        return record

    return run


def test_tokens_per_second(fit: Callable[..., Record]) -> None:
    """The first step, which may compile, starts the clock; six are left in three windows of two."""
    record = fit(texts(7), log_every_n_steps=2)
    assert [step for step, _ in record.rows] == [1, 3, 5]
    assert record.column("tokens_per_second") == pytest.approx([B * T / STEP] * 3)
    assert record.column("step_ms") == pytest.approx([1000 * STEP] * 3)
    assert record.progress_bar["tokens/s"] == pytest.approx(B * T / STEP)


def test_each_window_is_by_itself(fit: Callable[..., Record]) -> None:
    """Steps of 1, 2, ..., 7 quarters of a second; the first window has step 2, the others two each."""
    record = fit(texts(7), uneven=True, log_every_n_steps=2)
    assert record.column("step_ms") == pytest.approx([500, 1000 * (0.75 + 1) / 2, 1000 * (1.25 + 1.5) / 2])
    assert record.column("tokens_per_second") == pytest.approx([B * T / 0.5, 2 * B * T / 1.75, 2 * B * T / 2.75])


def test_examples_per_second_of_images(fit: Callable[..., Record]) -> None:
    """The last batch holds one image less."""
    images, labels = torch.zeros(4 * B - 1, 1, 2, 2), torch.zeros(4 * B - 1, dtype=torch.int64)
    record = fit(DataLoader(TensorDataset(images, labels), B))
    assert record.column("examples_per_second") == pytest.approx([B / STEP, B / STEP, (B - 1) / STEP])
    assert record.progress_bar["examples/s"] == pytest.approx((B - 1) / STEP)
    assert not any("tokens" in key for _, row in record.rows for key in row)


def test_validation_takes_no_time(fit: Callable[..., Record]) -> None:
    """In the midst of a window, at its end, and at the end of the epoch."""
    record = fit(texts(9), texts(2), val_check_interval=3, log_every_n_steps=2, max_epochs=2)
    assert len(record.rows) == 9  # of 18 steps; the first window has one of them
    assert record.column("tokens_per_second") == pytest.approx([B * T / STEP] * 9)
    assert record.column("step_ms") == pytest.approx([1000 * STEP] * 9)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_accumulated_batches_are_one_step(every: int, fit: Callable[..., Record]) -> None:
    """Three batches a step; a window begins and ends with steps, wherever the loggers are due."""
    record = fit(texts(24), accumulate_grad_batches=3, log_every_n_steps=every)
    assert record.column("step_ms") == pytest.approx([3000 * STEP] * {1: 7, 2: 4, 3: 2}[every])
    assert record.column("tokens_per_second") == pytest.approx([B * T / STEP] * len(record.rows))


def test_second_fit_starts_anew(make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    clock, record, callback = Clock(), Record(), Throughput()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock))
    for _ in range(2):
        trainer = make_trainer(logger=record, callbacks=[callback], max_epochs=1, log_every_n_steps=1)
        trainer.fit(Timed(clock), texts(3), texts(1))
        clock.now += 1e6
    assert record.column("step_ms") == pytest.approx([1000 * STEP] * 4)


class WithFlops(torch.nn.Module):
    def flops_per_token(self) -> int:
        return 5


class OffCPU(Throughput):
    """Believes that the module is on another device when it looks up the peak."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, SimpleNamespace(device=torch.device("meta")))


@pytest.mark.parametrize(
    ("precision", "dtype", "peak"), [("32-true", torch.float32, 1600.0), ("bf16-mixed", torch.bfloat16, 3200.0)]
)
def test_utilisation_is_the_share_of_the_peak(
    precision: str, dtype: torch.dtype, peak: float, fit: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose peak is known, of the precision in use: 4 x 8 tokens of 5 operations in a quarter second."""
    asked = []

    def get_available_flops(device: torch.device, kind: torch.dtype) -> float:
        asked.append(kind)
        return peak

    monkeypatch.setattr(throughput, "get_available_flops", get_available_flops)
    options = {"callback": OffCPU(), "precision": precision}
    assert fit(texts(3), net=WithFlops(), **options).column("mfu") == pytest.approx([640 / peak] * 2)
    assert asked == [dtype]
    images = DataLoader(TensorDataset(torch.zeros(9, 4), torch.zeros(9)), 3)
    for record in (fit(texts(3), **options), fit(images, net=WithFlops(), **options)):
        assert len(record.rows) == 2
        assert not any("mfu" in key for _, row in record.rows for key in row)


def test_no_utilisation_on_a_cpu(fit: Callable[..., Record]) -> None:
    record = fit(texts(3), net=WithFlops())
    keys = {"throughput/tokens_per_second", "throughput/step_ms", "throughput/peak_memory_mib"}
    assert [{key for key in row if key.startswith("throughput/")} for _, row in record.rows] == [keys] * 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_the_process(fit: Callable[..., Record]) -> None:
    """At least what is resident now, and at most what ever was; in MiB."""
    measured = fit(texts(3)).column("peak_memory_mib")[-1]
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    resident, peak = (int(status[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    assert 0.9 * resident < measured < 1.1 * peak
