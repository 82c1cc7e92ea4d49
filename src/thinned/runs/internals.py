"""The one file that relies on private names of Lightning.

Each function has a test in `tests/runs/test_internals.py` that fails if a release changes what it relies on.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after the training batch that ends."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def saves_best_at_epoch_end(checkpoints: ModelCheckpoint, trainer: Trainer) -> bool:
    """Whether `ModelCheckpoint` saves the best model after an epoch, not after a validation."""
    return checkpoints._should_save_on_train_epoch_end(trainer)


def save_best_after_validation(checkpoints: ModelCheckpoint, trainer: Trainer) -> None:
    """Mends that `ModelCheckpoint` takes a validation after each batch (1) for one after each epoch (1.0)."""
    if type(trainer.val_check_interval) is int and checkpoints._save_on_train_epoch_end is None:
        checkpoints._save_on_train_epoch_end = False if trainer.enable_validation else None


def numbers_of_step(trainer: Trainer) -> dict[str, float]:
    """Returns what Lightning is about to log after the batch that ends; empty if it logs nothing at this step."""
    return numbers_of_epoch(trainer) if trainer._logger_connector.should_update_logs else {}


def numbers_of_epoch(trainer: Trainer) -> dict[str, float]:
    """Returns what Lightning is about to log after the training epoch that ends."""
    return {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}


def repeat_unbegun_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Makes a run that resumes from this checkpoint repeat a validation that has not ended its first batch."""
    if trainer.validating and not trainer.fit_loop.epoch_loop.val_loop._has_run:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for counts in ("total", "current"):  # as if the validation had been cut off in its first batch
            progress[counts] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def check_after_validation(stopping: EarlyStopping) -> None:
    """Makes `EarlyStopping` check after validations, unless it has been told otherwise."""
    if stopping._check_on_train_epoch_end is None:
        stopping._check_on_train_epoch_end = False


def checks_at_epoch_end(stopping: EarlyStopping) -> bool:
    """Whether `EarlyStopping` checks after training epochs, when the checkpoint of the validation has been written."""
    return bool(stopping._check_on_train_epoch_end)


def forget_average(averaging: WeightAveraging) -> None:
    """Makes a test load the average from a checkpoint, not the weights that were trained on."""
    averaging._average_model = None
