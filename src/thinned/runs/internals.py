"""Contains everything that relies on private names of Lightning and jsonargparse.

Each function has a test in `tests/runs/test_internals.py` that fails if a release changes what it relies on.
"""

import inspect
from pydoc import locate
from typing import Any

from jsonargparse import _loaders_dumpers, _typehints
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from thinned.arguments import refuse_double_keys

_load_yaml = _loaders_dumpers.yaml_load
_discard = _typehints.discard_init_args_on_class_path_change


def validation_follows(trainer: Trainer) -> bool:
    """Returns whether Lightning validates after the current training batch."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def saves_best_at_epoch_end(checkpoints: ModelCheckpoint, trainer: Trainer) -> bool:
    """Returns whether `ModelCheckpoint` saves the best model after an epoch, not after a validation."""
    return checkpoints._should_save_on_train_epoch_end(trainer)


def save_best_after_validation(checkpoints: ModelCheckpoint, trainer: Trainer) -> None:
    """Corrects `ModelCheckpoint`, which takes a validation after each batch (1) for one after each epoch (1.0)."""
    if type(trainer.val_check_interval) is int and checkpoints._save_on_train_epoch_end is None:
        checkpoints._save_on_train_epoch_end = False if trainer.enable_validation else None


def numbers_of_step(trainer: Trainer) -> dict[str, float]:
    """Returns what Lightning will log after the current batch; empty if it logs nothing at this step."""
    return numbers_of_epoch(trainer) if trainer._logger_connector.should_update_logs else {}


def numbers_of_epoch(trainer: Trainer) -> dict[str, float]:
    """Returns what Lightning will log after the current training epoch."""
    return {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}


def repeat_unbegun_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Makes a run that resumes from this checkpoint repeat a validation that has not ended its first batch."""
    if trainer.validating and not trainer.fit_loop.epoch_loop.val_loop._has_run:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for counts in ("total", "current"):  # as if the validation had been interrupted in its first batch
            progress[counts] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def run_sanity_check(trainer: Trainer) -> None:
    """Runs the sanity check that Lightning skips when training resumes within an epoch."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    before = dict(vars(loop))  # where an interrupted validation resumes
    loop.batch_progress, loop.restarting = type(loop.batch_progress)(), False
    with isolate_rng():
        trainer._run_sanity_check()
    vars(loop).update(before)


def checks_at_epoch_end(stopping: EarlyStopping) -> bool:
    """Returns whether `EarlyStopping` checks after a training epoch, which is after the validation's checkpoint."""
    return bool(stopping._check_on_train_epoch_end)


def forget_average(averaging: WeightAveraging) -> None:
    """Makes a test load the average from a checkpoint, not the weights of the last step."""
    averaging._average_model = None


def refuse_double_keys_in_yaml() -> None:
    """Makes jsonargparse raise a ValueError for a value in yaml that has a key twice."""

    def load(text: str) -> Any:
        refuse_double_keys(text)
        return _load_yaml(text)  # type: ignore[no-untyped-call]

    _loaders_dumpers.loaders["yaml"] = load


def drop_settings_of_another_optimiser() -> None:
    """Makes jsonargparse drop all settings of an optimiser if a later config or option replaces its class."""
    said: set[str] = set()

    def discard(parser_or_action: Any, before: Any, now: Any) -> None:
        if not before or "init_args" not in before or before["class_path"] == now["class_path"]:
            return
        old, new = locate(before["class_path"]), locate(now["class_path"])
        if not (isinstance(old, type) and isinstance(new, type) and issubclass(old, Optimizer)):
            _discard(parser_or_action, before, now)  # type: ignore[no-untyped-call]
            return
        parameters = inspect.signature(old).parameters
        dropped = {k: before["init_args"].pop(k) for k in [*before["init_args"].keys()]}
        given = [f"{k} {v}" for k, v in dropped.items() if k not in parameters or v != parameters[k].default]
        message = f"{new.__name__} replaces {old.__name__}, whose settings are left out: {', '.join(given)}."
        if given and message not in said:
            rank_zero_info(message)
        said.add(message)

    _typehints.discard_init_args_on_class_path_change = discard
