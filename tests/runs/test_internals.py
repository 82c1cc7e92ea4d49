"""What `runs/internals.py` relies on of the private parts of Lightning 2.6.6.

Each test says where upstream does it. If one fails after an upgrade, look there first.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from thinned.runs import internals
from thinned.runs.parser import Parser

BATCHES = 6


class Logging(LightningModule):
    """Logs a number of each batch and its mean over the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("number", float(batch_idx), on_step=True, on_epoch=True, batch_size=1)
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Events(Callback):
    """Keeps what happens in which order, outside the sanity check."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.events.append(f"train {batch_idx}")

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self.events.append(f"validate {batch_idx}")


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Trains for two epochs of six batches, with validations of two batches."""

    def run(*callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Trainer:
        trainer = make_trainer(callbacks=list(callbacks), enable_checkpointing=True, max_epochs=2, **options)
        train, val = (DataLoader(torch.zeros(size), batch_size=1) for size in (BATCHES, 2))
        trainer.fit(Logging(), train, val, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({}, 2),
        ({"val_check_interval": 2}, 6),
        ({"val_check_interval": 0.5, "accumulate_grad_batches": 3}, 4),
        ({"check_val_every_n_epoch": 2}, 1),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, 2),
        ({"limit_val_batches": 0}, 0),
        ({"limit_train_batches": 4}, 2),
    ],
)
def test_validation_follows(options: dict[str, Any], validations: int, fit: Callable[..., Trainer]) -> None:
    """lightning/pytorch/loops/training_epoch_loop.py:390 asks `_should_check_val_fx` (:529) after the batch's hooks."""

    class Asking(Events):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.events.append(internals.validation_follows(trainer))

    asking = Asking()
    fit(asking, ModelCheckpoint(save_top_k=0), **options)
    answers = [
        (event, then == "validate 0") for event, then in pairwise([*asking.events, ""]) if event in (True, False)
    ]
    assert len(answers) == 2 * options.get("limit_train_batches", BATCHES)
    assert [answer for answer, _ in answers] == [followed for _, followed in answers]
    assert sum(answer for answer, _ in answers) == validations


@pytest.mark.parametrize(
    ("options", "at_epoch_end"),
    [
        ({}, True),
        ({"limit_val_batches": 0}, True),
        ({"val_check_interval": 0.5}, False),
        ({"check_val_every_n_epoch": 2}, False),
    ],
)
def test_saves_best_at_epoch_end(
    options: dict[str, Any], at_epoch_end: bool, fit: Callable[..., Trainer], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """lightning/pytorch/callbacks/model_checkpoint.py:490 and :503 ask `_should_save_on_train_epoch_end` (:642)."""
    validating: set[bool] = set()
    save = Trainer.save_checkpoint

    def spy(trainer: Trainer, *args: Any) -> None:
        validating.add(trainer.validating)
        save(trainer, *args)

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    checkpoints = ModelCheckpoint(tmp_path)
    trainer = fit(checkpoints, **options)
    assert internals.saves_best_at_epoch_end(checkpoints, trainer) == at_epoch_end
    assert validating == {not at_epoch_end}


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **options: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {key: value for key, value in metrics.items() if key != "epoch"}))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_numbers_of_step_and_epoch(every: int, fit: Callable[..., Trainer]) -> None:
    """lightning/pytorch/trainer/connectors/logger_connector/logger_connector.py:173 and :178 log `metrics["log"]`.

    Lightning calls both after the hooks, with the step that has just been taken; see `log_metrics` (:97) there.
    """
    expected: list[tuple[int, dict[str, float]]] = []

    class Asking(Callback):
        def keep(self, trainer: Trainer, numbers: dict[str, float]) -> None:
            if numbers:
                expected.append((trainer.global_step - 1, numbers))

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.keep(trainer, internals.numbers_of_step(trainer))

        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            self.keep(trainer, internals.numbers_of_epoch(trainer))

    rows = Rows()
    fit(Asking(), ModelCheckpoint(save_top_k=0), logger=rows, log_every_n_steps=every)
    assert rows.rows == expected
    assert len(expected) == 2 * BATCHES // every + 2


@pytest.mark.parametrize(
    ("repeats", "events"),
    [(True, ["validate 0", "validate 1", "train 2"]), (False, ["train 2", "train 3", "validate 0"])],
    ids=["repeated", "as Lightning does"],
)
def test_repeat_unbegun_validation(
    repeats: bool, events: list[str], fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    """lightning/pytorch/loops/evaluation_loop.py:464 sets `_has_run`, :215 reads the counts of a checkpoint.

    By training_epoch_loop.py:282, Lightning skips a validation that has not begun. If it no longer does, delete
    `repeat_unbegun_validation`.
    """

    class Ending(Callback):
        def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "begun.ckpt")
                raise ZeroDivisionError

        def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
            if repeats:
                internals.repeat_unbegun_validation(trainer, checkpoint)

    options = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    with pytest.raises(ZeroDivisionError):
        fit(Ending(), ModelCheckpoint(save_top_k=0), **options)
    resumed = Events()
    with pytest.warns(UserWarning, match="You're resuming from a checkpoint that ended before the epoch ended"):
        fit(resumed, ModelCheckpoint(save_top_k=0), ckpt_path=tmp_path / "begun.ckpt", **options)
    assert resumed.events[:3] == events


@pytest.mark.parametrize("at", ["train 3", "validate 0", "validate 1"])
def test_run_sanity_check(at: str, fit: Callable[..., Trainer], tmp_path: Path) -> None:
    """lightning/pytorch/trainer/trainer.py:1127 leaves it out of a run that resumes, and resets the counts."""

    class Saving(Events):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.save(trainer)

        def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.save(trainer)

        def save(self, trainer: Trainer) -> None:
            if self.events[-1:] == [at] and not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "broken.ckpt")
                raise ZeroDivisionError

    class Checking(Events):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            before, state = trainer.fit_loop.state_dict(), torch.get_rng_state()
            internals.run_sanity_check(trainer)
            assert (trainer.fit_loop.state_dict(), trainer.training, module.training) == (before, True, True)
            assert torch.get_rng_state().equal(state)

        def on_sanity_check_end(self, *_: Any) -> None:
            self.events.append("checked")

    with pytest.raises(ZeroDivisionError):
        fit(Saving(), ModelCheckpoint(save_top_k=0), val_check_interval=4)
    checked, unchecked = Checking(), Events()
    for events in (checked, unchecked):
        with pytest.warns(UserWarning, match="You're resuming from a checkpoint that ended before the epoch ended"):
            fit(events, ModelCheckpoint(save_top_k=0), ckpt_path=tmp_path / "broken.ckpt", val_check_interval=4)
    assert checked.events == ["checked", *unchecked.events]


@pytest.mark.parametrize("interval", [1, 1.0])
def test_save_best_after_validation(interval: float, fit: Callable[..., Trainer], tmp_path: Path) -> None:
    """lightning/pytorch/callbacks/model_checkpoint.py:651 compares with 1.0, which 1 is equal to."""
    checkpoints = ModelCheckpoint(tmp_path)
    trainer = fit(checkpoints, val_check_interval=interval)
    assert internals.saves_best_at_epoch_end(checkpoints, trainer)
    internals.save_best_after_validation(checkpoints, trainer)
    assert internals.saves_best_at_epoch_end(checkpoints, trainer) == isinstance(interval, float)


@pytest.mark.parametrize("given", [None, True, False])
def test_checks_at_epoch_end(given: bool | None, fit: Callable[..., Trainer]) -> None:
    """lightning/pytorch/callbacks/early_stopping.py:157 chooses the moment if it is None."""
    stopping = EarlyStopping("number", check_on_train_epoch_end=given)
    fit(stopping, ModelCheckpoint(save_top_k=0))
    assert internals.checks_at_epoch_end(stopping) == (given is not False)


def test_forget_average(fit: Callable[..., Trainer]) -> None:
    """lightning/pytorch/callbacks/weight_averaging.py:345 loads the weights of training if there is an average."""
    averaging = WeightAveraging()
    trainer = fit(averaging, ModelCheckpoint(save_top_k=0))
    checkpoint: dict[str, Any] = {"current_model_state": {}, "averaging_state": {}, "state_dict": {}}
    with pytest.raises(RuntimeError, match="Missing key"):
        averaging.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
    internals.forget_average(averaging)
    with pytest.warns(UserWarning, match="but loading a checkpoint outside the 'fit' stage"):
        averaging.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)


class Parsed(LightningModule):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.AdamW) -> None:
        super().__init__()


def parsed(*args: str) -> Any:
    parser = Parser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(Parsed, "model")
    return parser.parse_args(list(args)).model.optimizer


SGD, ADAMW = "torch.optim.SGD", "torch.optim.AdamW"


def spec(class_path: str, **settings: float) -> str:
    return f"{{model: {{optimizer: {{class_path: {class_path}, init_args: {settings}}}}}}}".replace("'", "")


@pytest.mark.parametrize(
    ("args", "class_path", "changed", "said"),
    [
        (("--config", spec(SGD, lr=0.3)), SGD, {"lr": 0.3}, None),
        (("--config", spec(ADAMW, lr=0.3)), ADAMW, {"lr": 0.3}, None),
        (
            ("--config", spec(ADAMW, lr=0.3, weight_decay=0.2), "--model.optimizer", SGD),
            SGD,
            {},
            "lr 0.3, weight_decay 0.2",
        ),
        (("--config", spec(ADAMW, lr=0.4), "--model.optimizer.class_path", SGD), SGD, {}, "lr 0.4"),
        (("--config", spec(ADAMW, lr=0.5), "--config", spec(SGD, momentum=0.1)), SGD, {"momentum": 0.1}, "lr 0.5"),
        (
            ("--config", spec(SGD, lr=0.6), "--model.optimizer", ADAMW, "--model.optimizer.lr", "0.7"),
            ADAMW,
            {"lr": 0.7},
            "lr 0.6",
        ),
        (("--config", spec(ADAMW, lr=0.8), "--config", spec(ADAMW, eps=0.1)), ADAMW, {"lr": 0.8, "eps": 0.1}, None),
    ],
)
def test_drop_settings_of_another_optimiser(
    args: tuple[str, ...],
    class_path: str,
    changed: dict[str, float],
    said: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """jsonargparse/_typehints.py:2450 keeps what the new class takes too, such as a weight decay."""
    with caplog.at_level("INFO"):
        got = parsed(*args)
    defaults = inspect.signature(locate(class_path)).parameters  # type: ignore[arg-type]
    expected = {key: defaults[key].default for key in vars(got.init_args)} | changed
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(got.init_args).items()}
    assert (got.class_path, given) == (class_path, expected)
    told = [message.rpartition(": ")[2] for message in caplog.messages if "whose settings are left out" in message]
    assert told == ([f"{said}."] if said else [])


def test_refuse_double_keys_in_yaml() -> None:
    """jsonargparse/_loaders_dumpers.py:134 looks the loader up by its name."""
    with pytest.raises(ValueError, match="Expected each key once in the yaml, but got lr in line 1 and in line 1"):
        parsed("--model.optimizer", f"{{class_path: {SGD}, init_args: {{lr: 1, lr: 2}}}}")
