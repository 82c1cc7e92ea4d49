"""The command line: one LightningCLI that gives each run its own directory and turns errors into one message.

runs/<experiment>/<run id>/  config.yaml  checkpoints/{best,last}.ckpt  metrics.{csv,json}  predictions.parquet  wandb/
"""

import os
import secrets
import sys
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from pydoc import locate
from typing import Any, cast

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console

# Configs may name the classes of what is imported here, such as data and tasks, without their package.
from thinned.data.module import DataOffers
from thinned.evaluation import MCDropout
from thinned.evaluation.ensembles import evaluation_ways
from thinned.evaluation.learning_curves import LearningCurves
from thinned.evaluation.score_tables import missed_classes, score_tables, set_table, verdicts
from thinned.evaluation.set_tables import set_tables
from thinned.evaluation.sets import EvaluationSet, sets_of
from thinned.files import read_checkpoint
from thinned.offers import Offers
from thinned.runs.checkpoint_callback import Checkpoints
from thinned.runs.checkpoint_io import AtomicCheckpointIO, checkpoint_arguments
from thinned.runs.cpu_precision import SLOW, bf16_slowdown
from thinned.runs.directory import (
    Purpose,
    checkpoint_to_resume,
    enter_folder,
    enter_run,
    files_of_run,
    find_run,
    run_of_checkpoint,
)
from thinned.runs.launch import fill_in_from_launcher
from thinned.runs.logger_settings import fill_in_loggers
from thinned.runs.loggers import ResumableLogger
from thinned.runs.lost_ranks import LostRanks
from thinned.runs.own_callbacks import OwnCallbacks, prepare_own_callbacks
from thinned.runs.parser import Parser, settings_with_values
from thinned.runs.record import RunRecord
from thinned.tasks import DropoutMonitor, FiniteSteps, StepSeed, Throughput
from thinned.tasks.task import Task

__all__ = ["ThinnedCLI", "checkpoint_arguments", "read_checkpoint"]

# The sampler leaves out the batches already seen, but Lightning knows only loaders with a state.
warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
# The model summary gives sizes in fp32, whatever the precision.
warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
# Nothing changes in place what a sharded net returns.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# A run that resumes with max_steps first ends its last epoch again, without the metrics of it.
warnings.filterwarnings("ignore", message=r"`ModelCheckpoint\(monitor=.*\)` could not find the monitored key")
# A test takes the average from the checkpoint, which is what is wanted.
warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback, but loading a checkpoint")
# Each process has the whole net unless it is sharded.
warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")
# Lightning 2.6.6 asks isinstance(treespec, LeafSpec) in each stage: Lightning-AI/pytorch-lightning#21326
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)


PLACES = {"trainer.default_root_dir": ".", "checkpoint.dirpath": "checkpoints"}  # in the run's directory

OF_TRAINING = {  # settings that change nothing of a prediction
    "data": ("shift", "rotation"),
    "model": ("optimizer", "warmup_steps", "final_lr_fraction", "label_smoothing"),
}


class ThinnedCLI(LightningCLI):
    """Parses configs and options, and builds trainer, model and data.

    Args:
        args: Command line arguments; None reads `sys.argv`.
        checkpoints: Contents of what to predict from, by their paths; the first has the config. None trains.
        purpose: What is done with them, predict or evaluate; it ends the names of such runs.
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
            save_config_callback=RunRecord,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,
                "callbacks": [Throughput(), DropoutMonitor(), LostRanks(), OwnCallbacks(), LearningCurves()],
            },
            args=list(sys.argv[1:] if args is None else args),
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        asked = {"-h", "--help", "--help_all"} & set(args)
        if "--help_all" in asked:
            parser.parse_args(["--help"])
        self.config = parser.parse_args([arg for arg in args if arg not in asked])
        if asked:
            print(settings_with_values(self.config, {"data": None, "model": None, "mc_dropout": MCDropout}))
            parser.exit()
        if isinstance(given := self.config.seed_everything, bool):
            self.config.seed_everything = self._drawn_seed
            why = "" if given else ", since dropout masks in training need one"
            rank_zero_info(f"Drew seed_everything {self._drawn_seed} for {str(given).lower()}{why}.")
        elif not 0 <= given < 2**32:
            raise ValueError(f"Expected seed_everything in [0, {2**32}), but got {given}")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="default", help="Name of the folder below `runs_dir`.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Where the run directories go.")
        parser.add_argument("--run_id", type=str | None, help="Name of the run's folder; the time of day if null.")
        parser.add_argument("--resume", type=str | None, help="Run to resume: a folder, a checkpoint in it, or latest.")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        defaults = {"filename": "best", "monitor": "val/nll", "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in defaults.items()})
        parser.add_lightning_class_args(StepSeed, "step_seed")
        parser.link_arguments("seed_everything", "step_seed.seed", compute_fn=self._seed)
        parser.add_lightning_class_args(FiniteSteps, "finite_steps")
        parser.add_lightning_class_args(MCDropout, "mc_dropout")
        if self.purpose == "evaluate":
            sets = dict[str, dict[str, Any]]
            said = "Further sets: a yaml, see `thinned.evaluation.sets`."
            parser.add_argument("--sets", type=sets, default={}, sub_configs=True, help=said)

    def _seed(self, given: bool | int) -> int:
        return self._drawn_seed if isinstance(given, bool) else given

    @cached_property
    def _drawn_seed(self) -> int:
        """The seed of a run that is given none: a number that is drawn once for all its processes."""
        if "LOCAL_RANK" in os.environ and "PL_GLOBAL_SEED" in os.environ:  # drawn by the process that started this one
            return int(os.environ["PL_GLOBAL_SEED"])
        if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
            raise ValueError("Expected seed_everything to be a number if a launcher starts the processes, but got none")
        return secrets.randbelow(2**32)

    def _keep_drawn_seed(self, checkpoint: Path) -> None:
        """Takes the seed that a run which resumes has drawn when it began."""
        seed = read_checkpoint(str(checkpoint), check=False)["config"]["seed_everything"]
        self.config.seed_everything = self.config.step_seed.seed = seed_everything(seed, workers=True)

    def before_instantiate_classes(self) -> None:
        config = self.config
        entries = {key: entry for key, entry in config.get("sets", {}).items() if key != "__path__"}  # jsonargparse's
        self.sets = sets_of(entries)
        for each in self.sets:  # a wrong setting is known before the test is predicted
            self.data_of(each)
        if self.checkpoint:
            _refuse_settings_of_training(self.checkpoint["config"], yaml.safe_load(self.parser.dump(config)))
        runs = Path(config.runs_dir, config.experiment)
        self.run_dir, self.ckpt_path = find_run(runs, config.run_id, config.resume, self.purpose)
        enter_run(self.run_dir, new=config.resume is None)
        if config.mc_dropout.dirpath:
            enter_folder(Path(config.mc_dropout.dirpath), "mc_dropout.dirpath")
        if config.resume:
            if not (self.checkpoint or self.ckpt_path):
                self.ckpt_path = checkpoint_to_resume(self.run_dir)
            if self.ckpt_path and "_drawn_seed" in vars(self):
                self._keep_drawn_seed(self.ckpt_path)
            # Lightning 2.6.6 warns of every directory with checkpoints: Lightning-AI/pytorch-lightning#5209
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        self._built_data = _fill_in_from_data(config)
        fill_in_from_launcher(config.trainer)
        self._given_places = {key: config[key] for key in ("trainer.logger", *PLACES)}
        trained = [run_of_checkpoint(path) for path in self.checkpoints]
        content = yaml.safe_load(self.parser.dump(config, skip_unset=False))
        config.trainer.logger = fill_in_loggers(
            config.trainer.logger, self.run_dir, config.experiment, self.purpose, trained, content
        )
        for key, part in PLACES.items():
            if config[key] is not None:
                raise ValueError(f"Expected {key} to be left to runs_dir, experiment and run_id, but got {config[key]}")
            config[key] = str(self.run_dir / part)

    def after_instantiate_classes(self) -> None:
        step = 0
        if self.checkpoint:
            self.restore(self.checkpoint)
            self.config_init.mc_dropout.checkpoint = next(iter(self.checkpoints))
            if self.purpose == "evaluate":
                self.config_init.mc_dropout.ways = evaluation_ways(self.config_init.mc_dropout.ways, self.checkpoints)
        if self.ckpt_path:
            checkpoint = read_checkpoint(str(self.ckpt_path), check=False)  # `find_run` has checked it
            _compare_data(checkpoint["config"]["data"], self.config.data)
            self._refuse_change_without_steps(checkpoint)
            self.restore(checkpoint)  # now, so that one that does not fit leaves the run untouched
            step = checkpoint["global_step"]
        if self.config.resume:
            for logger in self.trainer.loggers:
                if isinstance(logger, ResumableLogger):
                    logger.resume_from(step)
        for key, value in self._given_places.items():  # the record is of the experiment, wherever it runs
            self.config[key] = value

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
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if on_cpu and "bf16" in str(trainer.precision) and (slowdown := bf16_slowdown()) > SLOW:
            rank_zero_info(f"A matrix product in bf16 takes {slowdown:.1f} times as long as in fp32 on this CPU.")
        return trainer

    def data_of(self, each: EvaluationSet) -> LightningDataModule:
        """Builds the data of a set, as the first checkpoint knows them; ValueError if a setting is wrong."""
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

    def _refuse_change_without_steps(self, checkpoint: dict[str, Any]) -> None:
        """Raises a ValueError if a run that has ended resumes with another model, which no step would train."""
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        if 0 <= (self.trainer.max_epochs or 0) <= epochs or 0 <= self.trainer.max_steps <= checkpoint["global_step"]:
            now, before = self.parser.dump(self.config, skip_unset=False), checkpoint["config"]["model"]
            if changed := _differences(before, yaml.safe_load(now)["model"], "model"):
                raise ValueError(
                    f"Expected steps left for another {', '.join(changed)}, but got a run that has ended after epoch "
                    f"{epochs} and step {checkpoint['global_step']}: raise trainer.max_epochs or trainer.max_steps"
                )

    @property
    def best(self) -> str | None:
        """Path of the best checkpoint of this run; None if it saved none (fast_dev_run)."""
        best: str = self.config_init.checkpoint.best_model_path
        if not best and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("There is no best checkpoint, so the weights of the last step are tested.")
        return best or None

    @rank_zero_only
    def print_results(self) -> None:
        """Prints the scores, with a column for each way to predict, what they tell, and the files of the run."""
        if wandb := sys.modules.get("wandb"):
            wandb.finish()  # before the table, which should stand last
        console = Console()
        if evaluation := self.config_init.mc_dropout.evaluation:
            console.print(*score_tables(evaluation, console.width), sep="\n")
            console.print(*verdicts(evaluation), sep="\n", highlight=False, markup=False)
            if table := set_table(evaluation):
                console.print(table, *missed_classes(evaluation), sep="\n", highlight=False, markup=False)
            console.print(*set_tables(evaluation, console.width), sep="\n")
        console.print(files_of_run(self.run_dir), soft_wrap=True, highlight=False)


def _fill_in_from_data(config: Any) -> LightningDataModule | None:
    """Sets what the net leaves to the data (null), such as the number of classes; returns the data that knew it."""
    data_class = cast(type[LightningDataModule], locate(config.data.class_path))
    net = config.model.get("init_args.net.init_args")
    missing = [] if net is None else [key for key, value in vars(net).items() if value is None]
    if not missing or Offers(data_class, DataOffers).net_arguments is None:
        return None
    data = data_class(**config.data.init_args.as_dict())
    known = cast(DataOffers, Offers(data, DataOffers)).net_arguments(missing)  # type: ignore[misc]
    for key, value in known.items():
        net[key] = value
    return data if known else None


def _compare_data(before: dict[str, Any], now: Any) -> None:
    """Raises a ValueError if a run that resumes would see its examples in another order or split."""
    for key in ("batch_size", "seed", "split_seed", "val_fraction", "test_fraction", "leave_out"):
        then, given = before.get("init_args", {}).get(key), now.get(f"init_args.{key}")
        if then != given:
            raise ValueError(f"Expected data.{key} {then}, as in the run that resumes, but got {given}")


def _refuse_settings_of_training(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a ValueError if a setting that acts in training alone is given for a prediction."""
    for part, keys in OF_TRAINING.items():
        settings = {key: value for key, value in before[part].get("init_args", {}).items() if key in keys}
        given = {key: now[part]["init_args"].get(key) for key in settings}
        if changed := _differences(settings, given, part):
            raise ValueError(
                f"Expected {', '.join(changed)} as in the checkpoint, since it acts in training alone, but got another"
            )


def _differences(before: Any, now: Any, key: str) -> list[str]:
    """Names the settings that differ, as options of the command line."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [key.replace(".init_args", "")]
    return [name for k in before | now for name in _differences(before.get(k), now.get(k), f"{key}.{k}")]
