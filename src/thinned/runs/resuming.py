"""Makes the user's own callbacks and settings resume exactly, or refuses them before training."""

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
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from thinned.runs import internals
from thinned.runs.checkpoint_callback import Checkpoints

REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "its average is in no checkpoint: WeightAveraging and EMAWeightAveraging keep theirs",
    LearningRateFinder: "the rate that it finds is not the one in config.yaml: set model.optimizer.lr",
    BatchSizeFinder: "the size that it finds is not the one in config.yaml: set data.batch_size",
    OnExceptionCheckpoint: "a new run would begin with what another one left there",
}
# Settings of the data that decide which examples come when.
OF_THE_ORDER = ("batch_size", "seed", "split_seed", "val_fraction", "test_fraction", "leave_out")


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
                expected = f"{_key(callback)}.monitor to be logged, as are {', '.join(logged)} and train/loss"
                raise ValueError(f"Expected {expected}, but got {monitor!r}")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        averages = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.state.fn == "fit" and "averaging_state" in checkpoint and not averages:
            expected = "trainer.callbacks with the WeightAveraging of the run that resumes"
            raise ValueError(f"Expected {expected}, but got none: the weights in its checkpoints are averages")

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
    """Gives each callback its own files in the directory of the run, before `OnExceptionCheckpoint` could write any.

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


class ResumedOptimizer(Callback):
    """Gives the optimiser of a run that resumes the settings of its config, and says which have changed.

    Lightning takes those of the checkpoint in silence, as runs do here that lack one optimiser and one `LambdaLR`.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the settings before Lightning loads the checkpoint."""
        optimizers, schedulers = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
        self._ours = len(optimizers) == 1 and len(schedulers) == 1 and isinstance(schedulers[0], LambdaLR)
        if self._ours:
            given = [group | {"lr": group["initial_lr"]} for group in optimizers[0].param_groups]
            self._given = [{k: v for k, v in group.items() if k not in ("params", "initial_lr")} for group in given]
            optimizers[0].register_load_state_dict_pre_hook(_refuse_state_of_another_class)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._ours and trainer.ckpt_path):
            return
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        changes: dict[str, str] = {}
        groups = trainer.optimizers[0].param_groups
        for group, given, fraction in zip(groups, self._given, scheduler.lr_lambdas, strict=True):
            rate = given["lr"] * fraction(scheduler.last_epoch)
            before = group | {"lr": group["initial_lr"], "learning rate of the next step": group["lr"]}
            for key, now in (given | {"learning rate of the next step": rate}).items():
                if _as_lists(before[key]) != _as_lists(now):
                    changes.setdefault(key, f"{key} {now} (was {before[key]})")
            group.update(given, lr=rate, initial_lr=given["lr"])
        scheduler.base_lrs = [given["lr"] for given in self._given]
        if changes:
            rank_zero_info(f"The optimiser resumes with other settings: {', '.join(changes.values())}.")


def _as_lists(setting: Any) -> Any:
    return list(setting) if isinstance(setting, tuple) else setting  # a sharded optimiser keeps no tuples


def _refuse_state_of_another_class(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    if optimizer.param_groups[0].keys() ^ state_dict["param_groups"][0].keys():
        expected = "model.optimizer of the class that the checkpoint was trained with"
        raise ValueError(f"Expected {expected}, but got {type(optimizer).__name__}")


def refuse_other_settings(checkpoint: dict[str, Any], config: dict[str, Any], trainer: Trainer) -> None:
    """Raises a ValueError if a resumed run would see its examples in another order or split.

    It also raises one if the run has ended and resumes with another model: no step would train it.
    """
    before = checkpoint["config"]
    for key in OF_THE_ORDER:
        then, now = (content["data"].get("init_args", {}).get(key) for content in (before, config))
        if then != now:
            raise ValueError(f"Expected data.{key} {then}, as in the run that resumes, but got {now}")
    epochs, steps = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], checkpoint["global_step"]
    has_ended = 0 <= (trainer.max_epochs or 0) <= epochs or 0 <= trainer.max_steps <= steps
    if has_ended and (changed := _differences(before["model"], config["model"], "model")):
        expected, ended = f"steps left for another {', '.join(changed)}", f"epoch {epochs} and step {steps}"
        raised = "raise trainer.max_epochs or trainer.max_steps"
        raise ValueError(f"Expected {expected}, but got a run that has ended after {ended}: {raised}")


def _differences(before: Any, now: Any, key: str) -> list[str]:
    """Names the settings that differ, as options of the command line."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [key.replace(".init_args", "")]
    return [name for k in before | now for name in _differences(before.get(k), now.get(k), f"{key}.{k}")]
