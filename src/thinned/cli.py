"""Defines the command line: one LightningCLI that parses, and builds trainer, task and data in the run's directory.

runs/<experiment>/<run id>/  config.yaml  checkpoints/{best,last}.ckpt  metrics.{csv,json}  predictions.parquet
                             report.html  wandb/
"""

import sys
from collections.abc import Sequence
from pydoc import locate
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console

# Configs may name these classes without their package.
from thinned.data.module import DataOffers
from thinned.evaluation import MCDropout
from thinned.evaluation.further_ways import evaluation_ways
from thinned.evaluation.html_report import write_html_report
from thinned.evaluation.learning_curves import LearningCurves
from thinned.evaluation.score_tables import print_evaluation
from thinned.evaluation.sets import EvaluationSet, sets_of
from thinned.files import read_checkpoint
from thinned.offers import Offers
from thinned.runs.checkpoint_callback import Checkpoints
from thinned.runs.checkpoint_io import AtomicCheckpointIO
from thinned.runs.directory import Purpose, RunRecord, files_of_run, open_run
from thinned.runs.launch import fill_in_from_launcher
from thinned.runs.logger_settings import put_in_run
from thinned.runs.loggers import ResumableLogger
from thinned.runs.parser import Parser, parse_or_help
from thinned.runs.resuming import OwnCallbacks, ResumedOptimizer, prepare_own_callbacks, refuse_other_settings
from thinned.tasks import DropoutMonitor, FiniteSteps, StepSeed, Throughput
from thinned.tasks.task import Task


class ThinnedCLI(LightningCLI):
    """Parses configs and options, and builds trainer, model and data.

    Args:
        args: Command line arguments; None reads `sys.argv`.
        checkpoints: Checkpoints to predict from, by path; the first one has the config. None trains.
        purpose: What to do with them, predict or evaluate; it ends the name of the run.
    """

    def __init__(
        self,
        args: Sequence[str] | None = None,
        checkpoints: dict[str, dict[str, Any]] | None = None,
        purpose: Purpose = "",
    ) -> None:
        self.checkpoints, self.purpose = checkpoints or {}, purpose
        self.checkpoint = next(iter(self.checkpoints.values()), None)
        super().__init__(
            model_class=Task,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=None,  # `RunRecord` does it
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,
                "callbacks": [Throughput(), DropoutMonitor(), LearningCurves(), ResumedOptimizer(), OwnCallbacks()],
            },
            args=list(sys.argv[1:] if args is None else args),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="default", help="Name of the folder below `runs_dir`.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Where the run directories go.")
        parser.add_argument("--run_id", type=str | None, help="Name of the run's folder; the time of day if null.")
        parser.add_argument("--resume", type=str | None, help="Run to resume: a folder, a checkpoint in it, or latest.")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        defaults = {"filename": "best", "monitor": "val/nll", "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in defaults.items()})
        parser.add_lightning_class_args(StepSeed, "step_seed")
        parser.link_arguments("seed_everything", "step_seed.seed", compute_fn=int)  # of true, refused below
        parser.add_lightning_class_args(FiniteSteps, "finite_steps")
        parser.add_lightning_class_args(MCDropout, "mc_dropout")
        if self.purpose == "evaluate":
            sets = dict[str, dict[str, Any]]
            said = "Further sets: a yaml, see `thinned.evaluation.sets`."
            parser.add_argument("--sets", type=sets, default={}, sub_configs=True, help=said)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parse_or_help(parser, args, {"data": None, "model": None, "mc_dropout": MCDropout})
        seed = self.config.seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ValueError(f"Expected seed_everything in [0, {2**32}), but got {seed}")

    def before_instantiate_classes(self) -> None:
        config = self.config
        entries = {key: entry for key, entry in config.get("sets", {}).items() if key != "__path__"}  # jsonargparse's
        self.sets = sets_of(entries)
        for each in self.sets:  # a wrong setting is known before the test is predicted
            self.data_of(each)
        self.run_dir, self.ckpt_path = open_run(config, self.purpose)
        self._built_data = _fill_in_from_data(config)
        fill_in_from_launcher(config.trainer)
        self.record = RunRecord(self.parser.dump(config, skip_unset=False))  # of the experiment, wherever it runs
        self.trainer_defaults["callbacks"].append(self.record)
        put_in_run(config, self.run_dir, self.purpose, self.checkpoints, self.record.content)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self._built_data is not None:  # it has read the data already
            self.datamodule = self._built_data

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        kwargs["plugins"] = [*(self.config_init.get("trainer.plugins") or []), AtomicCheckpointIO()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError, ValueError, TypeError) as error:
            asked = ", ".join(f"trainer.{k}={self.config.trainer[k]}" for k in ("accelerator", "devices", "strategy"))
            raise ValueError(f"Expected settings that can run here, but got {asked}: {error}") from error
        prepare_own_callbacks(trainer, self.run_dir)
        return trainer

    def after_instantiate_classes(self) -> None:
        step, mc_dropout = 0, self.config_init.mc_dropout
        if self.checkpoint:
            self.restore(self.checkpoint)
            mc_dropout.checkpoint = next(iter(self.checkpoints))
            if self.purpose == "evaluate":
                mc_dropout.ways = evaluation_ways(mc_dropout.ways, self.checkpoints)
        if self.ckpt_path:
            checkpoint = read_checkpoint(str(self.ckpt_path), check=False)  # `open_run` has checked it
            refuse_other_settings(checkpoint, self.record.content, self.trainer)
            self.restore(checkpoint)  # before the run is touched: the weights may not fit
            step = checkpoint["global_step"]
        if self.config.resume:
            for logger in self.trainer.loggers:
                if isinstance(logger, ResumableLogger):
                    logger.resume_from(step)

    def data_of(self, each: EvaluationSet) -> LightningDataModule:
        """Builds the data of a set with the state of the first checkpoint; ValueError if a setting is wrong."""
        assert self.checkpoint is not None
        given, parser = self.config.data, Parser()
        parser.add_subclass_arguments(LightningDataModule, "data")
        settings = {"class_path": given.class_path, "init_args": given.init_args.as_dict() | each.settings}
        try:
            data: LightningDataModule = parser.instantiate_classes(parser.parse_object({"data": settings})).data
            if state := self.checkpoint.get(type(data).__qualname__):
                data.load_state_dict(state)
        except ValueError as error:
            error.add_note(f"(sets.{each.entry})")
            raise
        return data

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Loads weights and data statistics; raises ValueError if the weights do not fit the model."""
        try:
            self.model.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise ValueError(f"Expected a model that fits the checkpoint, but got {error}") from error
        if state := checkpoint.get(type(self.datamodule).__qualname__):
            self.datamodule.load_state_dict(state)

    @property
    def best(self) -> str | None:
        """Path of the best checkpoint of this run; None if it saved none (fast_dev_run)."""
        best: str = self.config_init.checkpoint.best_model_path
        if not best and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("There is no best checkpoint, so the weights of the last step are tested.")
        return best or None

    @rank_zero_only
    def print_results(self) -> None:
        """Prints the scores of each way to predict, what they tell, and the files of the run."""
        if wandb := sys.modules.get("wandb"):
            wandb.finish()  # before the table, which should stand last
        console = Console()
        if evaluation := self.config_init.mc_dropout.evaluation:
            print_evaluation(console, evaluation)
            try:
                write_html_report(self.trainer, self.run_dir, self.config_init.mc_dropout.directory, evaluation)
            except (OSError, ValueError) as error:  # the rest is kept
                console.print(f"No report.html: {error}", soft_wrap=True, highlight=False, markup=False)
        console.print(files_of_run(self.run_dir), soft_wrap=True, highlight=False)


def _fill_in_from_data(config: Any) -> LightningDataModule | None:
    """Sets null arguments of the net, such as the number of classes, from the data; returns the data if it set any."""
    data_class: Any = locate(config.data.class_path)
    net = config.model.get("init_args.net.init_args")
    missing = [] if net is None else [key for key, value in vars(net).items() if value is None]
    if not missing or Offers(data_class, DataOffers).net_arguments is None:
        return None
    data = data_class(**config.data.init_args.as_dict())
    known = Offers(data, DataOffers).net_arguments(missing)
    for key, value in known.items():
        net[key] = value
    return data if known else None
