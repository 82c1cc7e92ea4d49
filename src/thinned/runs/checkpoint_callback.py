"""Writes `best.ckpt` and `last.ckpt` at moments from which a run resumes exactly.

Lightning 2.6.6 resumes exactly from the end of a step, a validation or an epoch, with three exceptions: it skips a
validation due after the step, loses the row logged after the checkpoint, and drops accumulated gradients.
"""

import time
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any
from weakref import proxy

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from thinned.files import read_checkpoint
from thinned.messages import is_lost_rank
from thinned.runs import internals
from thinned.runs.checkpoint_io import last_checkpoint
from thinned.runs.interruption import Interruption
from thinned.runs.loggers import ResumableLogger


class Checkpoints(ModelCheckpoint):
    """Writes checkpoints from which a run resumes exactly, without gap or repetition in its logs.

    Each validation writes `last.ckpt`, and `best.ckpt` if its score is the best. `last.ckpt` is also written after
    some steps or some time, after the last step, and on SIGTERM or Ctrl-C, which then end the run, even within an epoch
    or a validation. A second Ctrl-C ends it at once. Nothing is written while gradients are being accumulated.

    Args:
        every_n_train_steps: Number of optimiser steps after which to write `last.ckpt` again.
        train_time_interval: Time after which to write `last.ckpt` again.
        kwargs: Arguments of `ModelCheckpoint`, for `best.ckpt`.
    """

    _due = False  # stays True until the validation or epoch that follows has ended
    _step_of_last: int | None = None  # None if this process has not written `last.ckpt`

    def __init__(
        self,
        every_n_train_steps: NonNegativeInt | None = None,
        train_time_interval: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_last=False, **kwargs)
        self.every_n_train_steps, self.train_time_interval = every_n_train_steps, train_time_interval

    @property
    def state_key(self) -> str:
        """Returns a constant, so that a run which resumes with other settings finds its best score."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what an earlier process knew of the best checkpoints, in the folder where they are now.

        The score to beat is the one stored in `best.ckpt`, which may be newer than the checkpoint to resume from.
        """
        best_path = Path(self.format_checkpoint_name({}))  # if the name holds numbers, there is no such file
        with suppress(ValueError):  # it is missing or damaged
            callbacks = read_checkpoint(str(best_path), check=False).get("callbacks", {})
            of_best = deepcopy(callbacks.get(self.state_key, state_dict))  # its tensors are mapped from the file
            state_dict = of_best | {"last_model_path": state_dict["last_model_path"]}
        for key in ("monitor", "mode"):
            if (chosen := state_dict[key]) != (given := getattr(self, key)):
                expected = f"checkpoint.{key} {chosen}, by which the run that resumes has chosen its best checkpoint"
                raise ValueError(f"Expected {expected}, but got {given}")

        def here(path: str) -> str:
            moved = path.replace(state_dict["dirpath"], str(self.dirpath), 1)
            return moved if Path(moved).is_file() else ""

        best = {here(path): score for path, score in state_dict["best_k_models"].items() if here(path)}
        state = state_dict | {"dirpath": self.dirpath, "best_k_models": best}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = here(state_dict[key])
        if self.monitor is not None and not state["best_model_path"]:
            choose = min if self.mode == "min" else max
            state["best_model_path"] = choose(best, key=best.__getitem__, default="")
            state["best_model_score"] = best.get(state["best_model_path"])
        super().load_state_dict(state)
        self.current_score = state["current_score"]  # Lightning 2.6.6 forgets it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            internals.save_best_after_validation(self, trainer)
            if self.save_top_k not in (0, 1) and "{" not in str(self.filename):  # each would replace the one before
                expected = "checkpoint.filename to hold a number, as in best-{step}"
                raise ValueError(f"Expected {expected}, but got {self.filename}")
            if (ckpt_path := trainer.strategy.broadcast(trainer.ckpt_path)) != trainer.ckpt_path:
                raise ValueError(f"Expected all ranks to resume from {ckpt_path}, but got {trainer.ckpt_path}")
        self.interruption = Interruption(trainer, graceful=stage == "fit" and not trainer.fast_dev_run)  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.listen()

    on_test_start = on_predict_start = on_sanity_check_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.listen()
        super().on_train_start(trainer, pl_module)
        self._step, self._written_at = trainer.global_step, time.monotonic()
        _refuse_validation_within_a_step(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        self._due |= self._is_due(trainer)
        if _is_epoch_complete(trainer) or internals.validation_follows(trainer):
            return
        is_last_step = trainer.should_stop or -1 < trainer.max_steps <= trainer.global_step
        if self._due or is_last_step:  # a run with more steps can resume within the epoch
            self._write_last(trainer)
        if not is_last_step:
            self._end_if_told(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _in_training(trainer):
            batches = sum(trainer.num_val_batches)
            is_equal = batches == trainer.strategy.broadcast(batches) and batches < inf
            self._equal_validation = trainer.strategy.reduce_boolean_decision(is_equal)  # all ranks have to ask
            self._end_if_told(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if _in_training(trainer) and self._equal_validation:
            self._end_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if _in_training(trainer) and not internals.saves_best_at_epoch_end(self, trainer):
            self._write_last(trainer)
            self._end_if_told(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if any(isinstance(c, EarlyStopping) and internals.checks_at_epoch_end(c) for c in trainer.callbacks):  # type: ignore[attr-defined]
            self._step_of_last = None  # the validation's checkpoint lacks what was just counted
        due = self._due or internals.saves_best_at_epoch_end(self, trainer) or _is_last_epoch(trainer)
        if due and _is_epoch_complete(trainer):
            self._write_last(trainer)
        self._end_if_told(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        internals.repeat_unbegun_validation(trainer, checkpoint)
        _log_what_follows(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        path = last_checkpoint(trainer)
        has_trained = trainer.state.fn == "fit" and trainer.fit_loop.epoch_loop.batch_progress.total.ready > 0
        if is_lost_rank(exception) and path:
            exception.add_note(f"resume from {path}")
        elif isinstance(exception, ValueError) and has_trained:  # else the settings are wrong
            exception.add_note(f"(last checkpoint: {path or 'none yet'})")

    def _is_due(self, trainer: Trainer) -> bool:
        """Returns whether a checkpoint is due after these steps or this time; the same on all ranks."""
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            return True
        if self.train_time_interval is None:
            return False
        passed = time.monotonic() - self._written_at
        return trainer.strategy.broadcast(passed >= self.train_time_interval.total_seconds())

    def _write_last(self, trainer: Trainer) -> None:
        self._due, self._written_at = False, time.monotonic()
        if trainer.fast_dev_run or self._step_of_last == trainer.global_step:  # type: ignore[attr-defined]
            return
        self.last_model_path = f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
        self._step_of_last = trainer.global_step
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))

    def _end_if_told(self, trainer: Trainer) -> None:
        if signal := self.interruption.told(trainer):
            self.interruption.hold()
            self._write_last(trainer)
            rank_zero_info(f"{signal.name} at step {trainer.global_step}: wrote {self.last_model_path}, for --resume.")
            self.interruption.end(trainer, signal)


def _is_epoch_complete(trainer: Trainer) -> bool:
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return batches == trainer.num_training_batches or trainer.is_last_batch


def _is_last_epoch(trainer: Trainer) -> bool:
    epochs = vars(trainer.fit_loop.epoch_progress.current)["processed"]
    return trainer.should_stop or 0 < (trainer.max_epochs or 0) <= epochs


def _in_training(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _refuse_validation_within_a_step(trainer: Trainer) -> None:
    """Raises ValueError: a checkpoint of such a validation would lack the accumulated gradients."""
    every, of, batches = trainer.val_check_batch, trainer.accumulate_grad_batches, trainer.num_training_batches
    if not trainer.enable_validation or not isinstance(every, int) or every % batches == 0:
        return
    if every % of or (trainer.check_val_every_n_epoch is None and batches % of):  # None counts batches across epochs
        expected = f"trainer.val_check_interval to come to a multiple of trainer.accumulate_grad_batches={of}"
        raise ValueError(f"Expected {expected}, but got {every} batches (an epoch has {batches})")


def _log_what_follows(trainer: Trainer) -> None:
    """Logs the row that Lightning would log after the checkpoint is written, if any; it is logged once."""
    loop = trainer.fit_loop
    epoch, batch = (vars(progress.current) for progress in (loop.epoch_progress, loop.epoch_loop.batch_progress))
    metrics: dict[str, float] = {}
    if epoch["processed"] > epoch["completed"]:
        metrics = internals.numbers_of_epoch(trainer)
    elif batch["processed"] > batch["completed"]:
        metrics = internals.numbers_of_step(trainer)
    for logger in trainer.loggers:
        if metrics and isinstance(logger, ResumableLogger):  # others would log it twice
            logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, step=trainer.global_step - 1)
            logger.save()
