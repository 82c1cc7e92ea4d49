"""Gives a run that resumes its new settings, or refuses them. Lightning takes those of the checkpoint in silence."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class ResumedOptimizer(Callback):
    """Gives the optimiser of a run that resumes the settings of its config, and says which have changed.

    It needs one optimiser and one `LambdaLR`, as a `Task` has; others resume with the settings of the checkpoint.
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


def refuse_other_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a ValueError if a resumed run would see its examples in another order or split."""
    for key in ("batch_size", "seed", "split_seed", "val_fraction", "test_fraction", "leave_out"):
        then, given = (data.get("init_args", {}).get(key) for data in (before, now))
        if then != given:
            raise ValueError(f"Expected data.{key} {then}, as in the run that resumes, but got {given}")


def refuse_change_without_steps(checkpoint: dict[str, Any], model: dict[str, Any], trainer: Trainer) -> None:
    """Raises a ValueError if a finished run resumes with another model: no step would train it."""
    epochs, steps = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], checkpoint["global_step"]
    has_ended = 0 <= (trainer.max_epochs or 0) <= epochs or 0 <= trainer.max_steps <= steps
    if has_ended and (changed := _differences(checkpoint["config"]["model"], model, "model")):
        raise ValueError(
            f"Expected steps left for another {', '.join(changed)}, but got a run that has ended after epoch {epochs} "
            f"and step {steps}: raise trainer.max_epochs or trainer.max_steps"
        )


def _differences(before: Any, now: Any, key: str) -> list[str]:
    """Names the settings that differ, as options of the command line."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [key.replace(".init_args", "")]
    return [name for k in before | now for name in _differences(before.get(k), now.get(k), f"{key}.{k}")]
