"""Which checkpoint is the best and which the last, wherever the run is now, and which one an error names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from thinned.files import KEPT
from thinned.runs.checkpoint_callback import Checkpoints


class Failing(LightningModule):
    """Raises an error at the given batch, or before the first one."""

    def __init__(self, error: Exception, batch: int | None) -> None:
        super().__init__()
        self.error, self.batch = error, batch
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def on_train_start(self) -> None:
        if self.batch is None:
            raise self.error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == self.batch:
            raise self.error
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def notes_after(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., list[str]]:
    """Trains until the error, with a checkpoint after every two of six batches, and returns the error's notes."""

    def run(error: Exception, batch: int | None) -> list[str]:
        checkpoints = Checkpoints(dirpath=tmp_path, every_n_train_steps=2)
        trainer = make_trainer(callbacks=[checkpoints], enable_checkpointing=True, max_epochs=1)
        with pytest.raises(type(error)):
            trainer.fit(Failing(error, batch), DataLoader(torch.zeros(6), batch_size=1))
        return getattr(error, "__notes__", [])

    return run


def test_run_resumed_with_other_settings_finds_its_best_score() -> None:
    given: list[dict[str, Any]] = [{}, {"every_n_train_steps": 2}, {"every_n_epochs": 3}]
    assert len({Checkpoints(**settings).state_key for settings in given}) == 1


def remembered(folder: Path) -> dict[str, Any]:
    """What is remembered of the best three of a run in that folder."""
    folder.mkdir()
    checkpoints = Checkpoints(dirpath=folder, monitor="val/loss", save_top_k=3)
    paths = [str(folder / f"best-{i}.ckpt") for i in range(3)]
    for path in paths:
        Path(path).touch()
    checkpoints.best_k_models = {path: torch.tensor(float(i)) for i, path in enumerate(paths)}
    checkpoints.best_model_path, checkpoints.best_model_score = paths[0], torch.tensor(0.0)
    checkpoints.kth_best_model_path, checkpoints.kth_value = paths[2], torch.tensor(2.0)
    return checkpoints.state_dict()


def test_folder_that_was_moved_holds_the_same_best(tmp_path: Path) -> None:
    state = remembered(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = Checkpoints(dirpath=tmp_path / "after", monitor="val/loss", save_top_k=3)
    moved.load_state_dict(state)
    paths = [str(tmp_path / f"after/best-{i}.ckpt") for i in range(3)]
    assert (moved.best_model_path, moved.kth_best_model_path) == (paths[0], paths[2])
    assert {path: float(score) for path, score in moved.best_k_models.items()} == {p: i for i, p in enumerate(paths)}
    assert (float(moved.best_model_score), float(moved.kth_value)) == (0, 2)  # type: ignore[arg-type]


def test_best_that_is_gone_is_not_the_best(tmp_path: Path) -> None:
    state = remembered(tmp_path / "run")
    (tmp_path / "run/best-0.ckpt").unlink()
    checkpoints = Checkpoints(dirpath=tmp_path / "run", monitor="val/loss", save_top_k=3)
    checkpoints.load_state_dict(state)
    assert checkpoints.best_model_path == str(tmp_path / "run/best-1.ckpt")
    assert float(checkpoints.best_model_score) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "value"), [("monitor", "val/accuracy"), ("mode", "max")])
def test_best_by_another_measure_is_refused(key: str, value: str, tmp_path: Path) -> None:
    state = remembered(tmp_path / "run")
    checkpoints = Checkpoints(dirpath=tmp_path / "run", **{"monitor": "val/loss", key: value})
    with pytest.raises(ValueError, match=rf"Expected checkpoint\.{key} (val/loss|min), .* but got {value}"):
        checkpoints.load_state_dict(state)


def score_after_resuming(folder: Path, in_best: float, before: float) -> float:
    """The score to beat in a run that resumes from a checkpoint which knows of another one than `best.ckpt` holds."""
    checkpoints = Checkpoints(dirpath=folder, monitor="val/loss", filename="best")
    best, states = str(folder / "best.ckpt"), {}
    for score in (in_best, before):
        checkpoints.best_k_models, checkpoints.best_model_path = {best: torch.tensor(score)}, best
        checkpoints.kth_best_model_path, checkpoints.current_score = best, torch.tensor(score)
        checkpoints.best_model_score = checkpoints.kth_value = torch.tensor(score)
        states[score] = checkpoints.state_dict()
    config = dict.fromkeys(KEPT)
    torch.save({"config": config, "state_dict": {}, "callbacks": {checkpoints.state_key: states[in_best]}}, best)
    resumed = Checkpoints(dirpath=folder, monitor="val/loss", filename="best")
    resumed.load_state_dict(states[before])
    scores = {resumed.best_model_score, resumed.kth_value, resumed.current_score, *resumed.best_k_models.values()}
    (score,) = {float(score) for score in scores}  # type: ignore[arg-type]
    return score


@pytest.mark.parametrize("in_best", [0.25, 0.75], ids=["better", "worse"])
def test_score_to_beat_is_that_of_the_file(in_best: float, tmp_path: Path) -> None:
    assert score_after_resuming(tmp_path, in_best=in_best, before=0.5) == in_best


def test_damaged_best_has_no_score(tmp_path: Path) -> None:
    state = remembered(tmp_path / "run") | {"best_k_models": {}, "best_model_path": ""}
    (tmp_path / "run/best.ckpt").write_bytes(b"PK")
    checkpoints = Checkpoints(dirpath=tmp_path / "run", monitor="val/loss", filename="best")
    checkpoints.load_state_dict(state)
    assert (checkpoints.best_k_models, checkpoints.best_model_path) == ({}, "")


class Stopping(Callback):
    """Asks for the end within an epoch."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 8


class Validated(Failing):
    """Never fails, and logs the loss of a validation."""

    def __init__(self) -> None:
        super().__init__(ValueError(), -1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0, batch_size=1)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"max_epochs": 3}, 18),
        ({"max_epochs": -1, "max_steps": 8}, 8),
        ({"max_epochs": 3, "callbacks": [Stopping()]}, 8),
        ({"max_epochs": 3, "limit_val_batches": 0}, 18),
    ],
    ids=["epochs", "steps", "stopped", "no validation"],
)
def test_last_checkpoint_is_of_the_last_step_however_rare_validation_is(
    options: dict[str, Any], step: int, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """Of six batches an epoch, with a validation after each tenth epoch."""
    callbacks = [*options.pop("callbacks", ()), Checkpoints(dirpath=tmp_path, monitor="val/loss")]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, check_val_every_n_epoch=10, **options)
    data = [DataLoader(torch.zeros(6), batch_size=1) for _ in range(2)]
    trainer.fit(Validated(), *data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == trainer.global_step == step


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")


@pytest.mark.parametrize(
    ("error", "batch", "expected"),
    [
        (ValueError("bad"), None, []),
        (ValueError("bad"), 1, ["(last checkpoint: none yet)"]),
        (ValueError("bad"), 5, ["(last checkpoint: {folder}/last.ckpt)"]),
        (RuntimeError("a bug"), 5, []),
        (LOST, 1, []),
        (LOST, 5, ["resume from {folder}/last.ckpt"]),
    ],
    ids=["before training", "no checkpoint", "checkpoint", "bug", "lost rank, no checkpoint", "lost rank"],
)
def test_error_names_the_last_checkpoint(
    error: Exception, batch: int | None, expected: list[str], notes_after: Callable[..., list[str]], tmp_path: Path
) -> None:
    fresh = type(error)(*error.args)
    assert notes_after(fresh, batch) == [note.format(folder=tmp_path) for note in expected]
