"""Makes the user's own callbacks resume exactly, or refuses them before training."""

from pathlib import Path
from typing import Any

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
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info

from thinned.runs import internals
from thinned.runs.checkpoint_callback import Checkpoints

REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "its average is in no checkpoint: WeightAveraging and EMAWeightAveraging keep theirs",
    LearningRateFinder: "the rate that it finds is not the one in config.yaml: set model.optimizer.lr",
    BatchSizeFinder: "the size that it finds is not the one in config.yaml: set data.batch_size",
    OnExceptionCheckpoint: "a new run would begin with what another one left there",
}


class OwnCallbacks(Callback):
    """Makes callbacks of Lightning resume exactly, and refuses a monitor that nothing logs.

    Only a validation shows what is logged, so each run, new or resumed, begins with a sanity check of at least one
    batch. A run that `EarlyStopping` stopped stays stopped on resume, until that is left out or has more patience.
    """

    def __init__(self) -> None:
        self._patience: dict[EarlyStopping, int] = {}
        self._strict: dict[EarlyStopping, bool] = {}
        self._sanity_checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and stage != "fit":
                internals.forget_average(callback)
            if isinstance(callback, EarlyStopping) and stage == "fit":
                self._patience[callback] = callback.patience
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.num_sanity_val_steps = max(1, trainer.num_sanity_val_steps)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises a ValueError for a monitor that neither validation nor training logs."""
        self._sanity_checked = True
        logged = sorted(trainer.callback_metrics)
        foreign = not type(pl_module).__module__.startswith("thinned.")  # may log anything in training
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = str(getattr(callback, "monitor", None) or "")
            if not monitor or monitor in logged or monitor.startswith("train"):
                continue
            if not foreign or monitor.startswith(("val", "test")):
                raise ValueError(
                    f"Expected {_key(callback)}.monitor to be logged, as are {', '.join(logged)} and train/loss, but "
                    f"got {monitor!r}"
                )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        averages = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.state.fn == "fit" and "averaging_state" in checkpoint and not averages:
            raise ValueError(
                "Expected trainer.callbacks with the WeightAveraging of the run that resumes, but got none: the "
                "weights in its checkpoints are averages"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sanity_checked:
            internals.run_sanity_check(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):  # Lightning 2.6.6 forgets it within an epoch
                trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
            if isinstance(callback, EarlyStopping):
                self._resume(callback, trainer)
                if trainer.ckpt_path:  # with max_steps, Lightning 2.6.6 ends the last epoch again, without its metrics
                    self._strict[callback], callback.strict = callback.strict, False

    def on_train_batch_start(self, *_: Any) -> None:
        for stopping, strict in self._strict.items():
            stopping.strict = strict
        self._strict.clear()

    def _resume(self, stopping: EarlyStopping, trainer: Trainer) -> None:
        stopping.patience = self._patience[stopping]  # not that of the checkpoint
        exhausted = stopping.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED
        if exhausted and stopping.wait_count < stopping.patience:
            stopping.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        if stopping.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            rank_zero_info(
                f"EarlyStopping ({stopping.monitor}, patience {stopping.patience}) has stopped this run after epoch "
                f"{stopping.stopped_epoch}, so it stays stopped. To train on, leave it out or raise its patience."
            )


def _key(callback: Callback) -> str:
    return "checkpoint" if isinstance(callback, Checkpoints) else f"trainer.callbacks.{type(callback).__name__}"


def prepare_own_callbacks(trainer: Trainer, run: Path) -> None:
    """Gives each callback its own files in the directory of the run.

    Raises:
        ValueError: The effect of a callback would be lost, or a mode does not fit what it monitors.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for refused, why in REFUSED.items():
            if isinstance(callback, refused):
                raise ValueError(f"Expected trainer.callbacks without {type(callback).__name__}, but got one: {why}")
        monitor = str(getattr(callback, "monitor", ""))
        if getattr(callback, "mode", None) == "min" and monitor.endswith("accuracy"):
            raise ValueError(f"Expected {_key(callback)}.mode max for {monitor}, but got min")
        if type(callback) is ModelCheckpoint and not callback.dirpath:  # else both may write last.ckpt
            callback.dirpath = str(run / "model_checkpoint")
