"""Callbacks that a person adds change nothing of what is tested and resumed, or are refused before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor
from torch.utils.data import DataLoader

from thinned.runs.checkpoint_callback import Checkpoints
from thinned.runs.resuming import OwnCallbacks, prepare_own_callbacks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as cli.py does
    pytest.mark.filterwarnings("ignore:`ModelCheckpoint.* could not find the monitored key"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
BEST_AT = 2  # epoch with the lowest val/loss


class Counting(LightningModule):
    """Its weight is the number of steps, and val/loss is lowest after the epoch `BEST_AT`."""

    __module__ = "thinned.of_a_test"  # as the project's own, whose names are known

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tested: float | None = None
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.log("train/loss", 1.0, batch_size=1)
        return -self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", abs(self.current_epoch - BEST_AT) + 1.0, batch_size=1)
        self.log("val/accuracy", 0.5, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.tested = self.weight.item()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., tuple[Trainer, Counting]]:
    """Trains epochs of two steps with the given callbacks, and tests the best checkpoint."""

    def run(*own: Callback, resume: bool = False, batches: int = 2, **options: Any) -> tuple[Trainer, Counting]:
        checkpoints = Checkpoints(dirpath=tmp_path / "checkpoints", monitor="val/loss", filename="best",
                                  enable_version_counter=False)  # fmt: skip
        options = {"max_epochs": 6} | options
        trainer = make_trainer(callbacks=[*own, checkpoints, OwnCallbacks()], enable_checkpointing=True, **options)
        prepare_own_callbacks(trainer, tmp_path)
        module, data = Counting(), [DataLoader(torch.zeros(batches), batch_size=1) for _ in range(3)]
        last = tmp_path / "checkpoints/last.ckpt" if resume else None
        trainer.fit(module, *data[:2], ckpt_path=last, weights_only=True)
        trainer.test(module, data[2], ckpt_path=checkpoints.best_model_path or None, verbose=False)
        return trainer, module

    return run


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (StochasticWeightAveraging(swa_lrs=0.1), "its average is in no checkpoint"),
        (LearningRateFinder(), "set model.optimizer.lr"),
        (BatchSizeFinder(), "set data.batch_size"),
        (OnExceptionCheckpoint("."), "a new run would begin with what another one left there"),
        (EarlyStopping("val_loss"), "val/accuracy, val/loss and train/loss, but got 'val_loss'"),
        (EarlyStopping("los"), "trainer.callbacks.EarlyStopping.monitor to be logged, as are val/accuracy, val/loss"),
        (ModelCheckpoint(monitor="val/los"), "trainer.callbacks.ModelCheckpoint.monitor to be logged"),
        (EarlyStopping("val/accuracy"), "trainer.callbacks.EarlyStopping.mode max for val/accuracy, but got min"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Callback) else "",
)
def test_callback_that_cannot_work_is_refused_before_the_first_step(
    callback: Callback, reason: str, fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Counting, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="Expected") as error:
        fit(callback)
    assert reason in str(error.value)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("resume_at", [None, 2, 3], ids=["new", "resumed", "resumed within an epoch"])
def test_misnamed_monitor_is_refused_before_the_first_step(
    resume_at: int | None, steps: int, fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Lightning makes no sanity check too: told to make none, or in a run that resumes within an epoch."""
    if resume_at:
        fit(max_steps=resume_at)
    monkeypatch.setattr(Counting, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=r"as are val/accuracy, val/loss and train/loss, but got 'val/los'"):
        fit(EarlyStopping("val/los"), resume=resume_at is not None, num_sanity_val_steps=steps)


@pytest.mark.parametrize("resume_at", [None, 2, 3])
def test_one_sanity_check_before_the_first_step(
    resume_at: int | None, fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if resume_at:
        fit(max_steps=resume_at)
    checked: list[int] = []
    monkeypatch.setattr(
        OwnCallbacks, "on_sanity_check_start", lambda _, trainer, __: checked.append(trainer.global_step)
    )
    fit(max_epochs=3, resume=resume_at is not None)
    assert checked == [resume_at or 0]


@pytest.mark.parametrize(
    "own",
    [
        lambda: [ModelCheckpoint(save_last=True)],
        lambda: [ModelCheckpoint(monitor="val/loss", mode="max", filename="best"), EarlyStopping("val/loss")],
        lambda: [ModelCheckpoint(every_n_train_steps=1, save_weights_only=True), GradientAccumulationScheduler({9: 2})],
    ],
    ids=["last", "worst", "weights alone"],
)  # fmt: skip
@pytest.mark.parametrize("order", [1, -1])
def test_own_checkpoints_change_nothing_of_what_is_tested(
    order: int, own: Callable[[], list[Callback]], fit: Callable[..., Any], tmp_path: Path
) -> None:
    _, module = fit(*own()[::order])
    assert module.tested == 2 * (BEST_AT + 1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list(tmp_path.glob("model_checkpoint/*.ckpt"))


def test_average_of_the_weights_is_what_is_tested(fit: Callable[..., Any]) -> None:
    """The weights after steps 1 to 6 are 1 to 6."""
    _, module = fit(WeightAveraging(), max_epochs=BEST_AT + 1)
    assert module.tested == pytest.approx(3.5)


def test_average_resumes_where_it_was(fit: Callable[..., Any]) -> None:
    fit(WeightAveraging(), max_epochs=2)
    _, module = fit(WeightAveraging(), max_epochs=BEST_AT + 1, resume=True)
    assert (module.steps, module.tested) == (2, pytest.approx(3.5))
    with pytest.raises(
        ValueError, match=r"Expected trainer\.callbacks with the WeightAveraging of the run that resumes"
    ):
        fit(max_epochs=5, resume=True)


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 1}], ids=str)
def test_run_that_was_stopped_early_stays_stopped_unless_told(
    options: dict[str, Any], fit: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    options |= {"max_epochs": 40}
    first, _ = fit(EarlyStopping("val/loss", patience=2), **options)
    assert first.should_stop
    with caplog.at_level("INFO"):
        again, module = fit(EarlyStopping("val/loss", patience=2), resume=True, **options)
    assert (again.global_step, module.steps) == (first.global_step, 0)
    assert any("so it stays stopped. To train on, leave it out or raise its patience" in m for m in caplog.messages)
    further, _ = fit(EarlyStopping("val/loss", patience=3), resume=True, **options)
    assert further.global_step > first.global_step
    assert further.should_stop
    _, module = fit(resume=True, max_steps=further.global_step + 2, **options)
    assert module.steps == 2


def test_early_stopping_by_the_training_loss_counts_on_when_it_resumes(fit: Callable[..., Any]) -> None:
    first, _ = fit(EarlyStopping("train/loss", patience=2), max_epochs=40)
    assert first.current_epoch == 3
    for limits in ({"max_epochs": 40}, {"max_epochs": -1, "max_steps": 80}):
        again, module = fit(EarlyStopping("train/loss", patience=2), **limits, resume=True)
        assert (again.global_step, module.steps) == (first.global_step, 0)
    more, _ = fit(EarlyStopping("train/loss", patience=4), max_epochs=-1, max_steps=80, resume=True)
    assert more.global_step == first.global_step + 4
    assert more.early_stopping_callback.strict


def test_accumulation_of_the_epoch_at_hand_resumes(fit: Callable[..., Any]) -> None:
    """Of four batches: four steps in the first epoch and two in the second, within which it is broken off."""
    for limits in ({"max_steps": 5}, {"max_epochs": 2, "resume": True}):
        trainer, module = fit(GradientAccumulationScheduler({0: 1, 1: 2}), batches=4, **limits)
    assert (module.steps, trainer.global_step) == (2, 6)
