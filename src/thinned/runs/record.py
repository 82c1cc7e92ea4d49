"""Records the config of a run in files and loggers, and compares it when the run resumes."""

from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from thinned.files import whole_file
from thinned.runs.directory import link_for_leet
from thinned.runs.loggers import ResumableLogger


class RunRecord(SaveConfigCallback):
    """Writes the whole config to the run directory, to every checkpoint, and once to the loggers."""

    @cached_property
    def text(self) -> str:
        return self.parser.dump(self.config, skip_unset=False)

    @cached_property
    def content(self) -> dict[str, Any]:
        return yaml.safe_load(self.text)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes nothing yet, since the data may not fit the net."""

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        with whole_file(Path(trainer.default_root_dir, "config.yaml")) as temporary:
            temporary.write_text(self.text, encoding="utf-8")
        parameters = sum(p.numel() for p in pl_module.parameters())
        for logger in trainer.loggers:
            logger.log_hyperparams(self.content | {"params": parameters})
        link_for_leet(Path(trainer.default_root_dir))

    on_train_start = _record

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, ResumableLogger):
                logger.has_curves = False

    on_predict_start = on_test_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.content
        # The config describes what a task cannot: a net without `init_args`, or a function.
        checkpoint["hyper_parameters"] |= self.content["model"].get("init_args", {})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, OSError) and exception.errno and not exception.filename:  # such as a full disk
            exception.add_note(f"in {trainer.default_root_dir}")


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
