"""Records the config of a run in its files and loggers."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from thinned.files import whole_file
from thinned.runs.directory import link_for_leet
from thinned.runs.loggers import ResumableLogger


class RunRecord(Callback):
    """Writes the whole config to the run directory, to every checkpoint, and once to the loggers.

    It does so when the first stage starts, since the data may not fit the net; not with `fast_dev_run`.
    """

    def __init__(self, text: str) -> None:
        self.text, self.content = text, yaml.safe_load(text)
        self._is_written = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_written or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._is_written = True
        with whole_file(Path(trainer.default_root_dir, "config.yaml")) as temporary:
            temporary.write_text(self.text, encoding="utf-8")
        parameters = sum(p.numel() for p in pl_module.parameters())
        for logger in trainer.loggers:
            logger.log_hyperparams(self.content | {"params": parameters})
        link_for_leet(Path(trainer.default_root_dir))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)
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
