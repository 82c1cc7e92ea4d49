"""When a run writes `best.ckpt` and `last.ckpt`: where it can go on as if nothing had happened, and when told to end.

Lightning 2.6.6 goes on exactly from a checkpoint that was written at the end of a step, of a validation or of an epoch,
but for three things: a validation that should follow the step is left out, a row that is logged after the checkpoint is
missing from the log, and of an accumulated gradient nothing is kept.
"""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from thinned.runs.checkpoint_io import last_checkpoint
from thinned.runs.interruption import Interruption
from thinned.runs.loggers import ResumableLogger
from thinned.runs.lost_ranks import is_lost_rank

NOT_BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}  # a validation whose first batch was cut off


class Checkpoints(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, from whose files a run goes on exactly, with logs without gap or repetition.

    `best.ckpt` is chosen at validations. `last.ckpt` is written there too, better or not; in between as often as
    `every_n_train_steps` or `train_time_interval` says; and on SIGTERM or Ctrl-C, which then end the run: in the middle
    of an epoch or of a validation too. A second Ctrl-C ends it at once. Nothing is written while gradients are being
    accumulated.
    """

    _due = False  # put off until the validation or epoch ends
    _pending: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self.save_top_k not in (0, 1) and "{" not in str(self.filename):
                raise ValueError(
                    f"Expected checkpoint.filename to hold a number, as in best-{{step}}, for checkpoint.save_top_k="
                    f"{self.save_top_k}, but got {self.filename}"
                )
            self._every_n_epochs = self._every_n_epochs or 1  # Lightning's 0 beside steps or a time
            if (ckpt_path := trainer.strategy.broadcast(trainer.ckpt_path)) != trainer.ckpt_path:
                raise ValueError(f"Expected all ranks to go on from {ckpt_path}, but got {trainer.ckpt_path}")
        self.interruption = Interruption(trainer, graceful=stage == "fit" and not trainer.fast_dev_run)  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.listen()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.listen()
        super().on_train_start(trainer, pl_module)
        _refuse_validation_within_a_step(trainer)
        if self._pending is not None:
            row, self._pending = self._pending, None
            for logger in trainer.loggers:
                if isinstance(logger, ResumableLogger):  # another one may have the row already
                    logger.log_metrics(row["metrics"], step=row["step"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        self._due |= self._is_due(trainer)
        if loop._num_ready_batches_reached() or loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            return
        if self._due or loop._is_training_done:  # within an epoch, which a run with more steps can go on with
            self._write_last(trainer)
        if not loop._is_training_done:
            self._end_if_told(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _in_training(trainer):
            batches = int(sum(trainer.num_val_batches))
            self._equal_validation = self.interruption.equal_on_all_ranks(trainer, batches)
            self._end_if_told(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if _in_training(trainer) and self._equal_validation:
            self._end_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if _in_training(trainer) and not self._should_save_on_train_epoch_end(trainer):
            self._write_last(trainer)
            self._end_if_told(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        is_planned = self._due or self._should_save_on_train_epoch_end(trainer)
        if is_planned and trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._write_last(trainer)
        self._end_if_told(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        if trainer.validating and not trainer.fit_loop.epoch_loop.val_loop._has_run:
            for counts in ("total", "current"):  # then Lightning begins it anew
                loops["epoch_loop.val_loop.batch_progress"][counts] |= NOT_BEGUN
        checkpoint["pending_log"] = _pending_row(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pending = checkpoint.get("pending_log")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        path = last_checkpoint(trainer)
        if is_lost_rank(exception):
            if path:
                exception.add_note(f"resume from {path}")
        elif isinstance(exception, ValueError) and _has_trained(trainer):  # else the settings are wrong
            exception.add_note(f"(last checkpoint: {path or 'none yet'})")

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether `every_n_train_steps` or `train_time_interval` asks for a checkpoint; on all ranks alike."""
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            return True
        if self._train_time_interval is None:
            return False
        passed = time.monotonic() - (self._last_time_checked or 0.0)
        return trainer.strategy.broadcast(passed >= self._train_time_interval.total_seconds())

    def _write_last(self, trainer: Trainer) -> None:
        self._due, self._last_time_checked = False, time.monotonic()
        if not (trainer.fast_dev_run or self._last_is_saved(trainer)):  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _last_is_saved(self, trainer: Trainer) -> bool:
        at_this_step = self._last_global_step_saved == trainer.global_step
        return at_this_step and self._last_checkpoint_saved == self.last_model_path

    def _end_if_told(self, trainer: Trainer) -> None:
        signal = self.interruption.told(trainer)
        if signal is None:
            return
        if not self._last_is_saved(trainer):
            self.last_model_path = f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            self.interruption.hold()
            trainer.save_checkpoint(self.last_model_path, weights_only=False)
        rank_zero_info(f"{signal.name} at step {trainer.global_step}: wrote {self.last_model_path}; --resume goes on.")
        self.interruption.end(trainer, signal)


def _has_trained(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and trainer.fit_loop.epoch_loop.batch_progress.total.ready > 0


def _in_training(trainer: Trainer) -> bool:
    """Whether a validation is one between steps."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _refuse_validation_within_a_step(trainer: Trainer) -> None:
    """No checkpoint can be written there, as it does not hold the gradients that have been accumulated."""
    every, of, batches = trainer.val_check_batch, trainer.accumulate_grad_batches, trainer.num_training_batches
    if not trainer.enable_validation or not isinstance(every, int) or every % batches == 0:
        return
    if every % of or (trainer.check_val_every_n_epoch is None and batches % of):  # which counts on through epochs
        raise ValueError(
            f"Expected trainer.val_check_interval to come to a multiple of trainer.accumulate_grad_batches={of}, "
            f"but got {every} batches (an epoch has {batches})"
        )


def _pending_row(trainer: Trainer) -> dict[str, Any] | None:
    """What Lightning logs after the hook in which a checkpoint is being written."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    epoch, batch = (vars(progress.current) for progress in (trainer.fit_loop.epoch_progress, loop.batch_progress))
    step = loop._batches_that_stepped
    if epoch["processed"] > epoch["completed"]:
        step -= 1  # the epoch's metrics belong to its last step
    elif batch["processed"] == batch["completed"] or not connector.should_update_logs:
        return None
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"step": step, "metrics": {**metrics, "epoch": trainer.current_epoch}} if metrics else None
