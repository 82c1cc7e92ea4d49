"""The command line: one LightningCLI that gives each run its own directory and turns errors into one message.

runs/<experiment>/<run id>/  config.yaml  checkpoints/{best,last}.ckpt  metrics.{csv,json}  predictions.parquet  wandb/
"""

import atexit
import difflib
import inspect
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn, cast

import wandb
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console

import thinned.data
import thinned.tasks  # noqa: F401  (imported so that configs may name the classes without their package)
from thinned.evaluation import MCDropout
from thinned.files import whole_file
from thinned.models import SITES
from thinned.runs.checkpoint_callback import Checkpoints
from thinned.runs.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from thinned.runs.directory import find_run
from thinned.runs.launch import fill_in_from_launcher
from thinned.runs.lost_ranks import LostRanks
from thinned.runs.messages import plain
from thinned.runs.wandb_server import wandb_offline_reason
from thinned.tasks import FiniteSteps, StepSeed, Throughput
from thinned.tasks.task import Task

# Batches already seen are left out by the sampler; Lightning knows of loaders with a state alone.
warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
# The model summary gives sizes in fp32, whatever the precision.
warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
# Nothing is done in place to what a sharded net returns.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# Lightning 2.6.6 asks isinstance(treespec, LeafSpec) in each stage: Lightning-AI/pytorch-lightning#21326
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)


class Parser(LightningArgumentParser):
    """Raises ValueError with one line for input that does not parse, and names the key nearest to an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an inner parser, whose error the outer one reports
            super().error(message, ex)
        message = plain(message)
        unknown = re.search(r"(?:unrecognized arguments: --|[Oo]ption '|Key ')([\w.]+)", message)
        if unknown:
            known = {name for action in self._actions for name in action.dest.split(".")} | set(SITES)
            for class_path in re.findall(r"class_path '([\w.]+)'", message):
                known |= set(inspect.signature(cast(type, locate(class_path))).parameters)
            nearest = [difflib.get_close_matches(name, known, n=1) for name in unknown[1].split(".")]
            message += "".join(f" (did you mean {n[0]}?)" for n in nearest if n and n[0] not in unknown[1].split("."))
        raise ValueError(message) from ex


class RunRecord(SaveConfigCallback):
    """Keeps the whole config: in the run directory, in every checkpoint, and once in the logger."""

    @cached_property
    def text(self) -> str:
        text: str = self.parser.dump(self.config, skip_unset=False)
        return text

    @cached_property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load(self.text)
        return content

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the data may still turn out not to fit."""

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        with whole_file(Path(trainer.default_root_dir, "config.yaml")) as temporary:
            temporary.write_text(self.text)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.content)

    on_fit_start = on_test_start = on_predict_start = _record

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.content

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, OSError) and exception.errno and not exception.filename:  # such as a full disk
            exception.add_note(f"in {trainer.default_root_dir}")


class ThinnedCLI(LightningCLI):
    """Parses configs and options and builds trainer, model and data; the script then says what happens.

    Args:
        args: command line arguments; `sys.argv` when None.
        purpose: last part of the run id, to tell kinds of runs apart; none for training.
    """

    def __init__(self, args: Sequence[str] | None = None, purpose: str = "") -> None:
        self.purpose = purpose
        super().__init__(
            model_class=Task,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=RunRecord,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},
            args=None if args is None else list(args),
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="default", help="Name of the folder below `runs_dir`.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Where the run directories go.")
        parser.add_argument("--run_id", type=str | None, help="Name of the run's folder; the time of day if null.")
        parser.add_argument(
            "--resume", type=str | None, help="The run that goes on: its folder, a checkpoint in it, or latest."
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/loss",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(StepSeed, "step_seed")
        parser.link_arguments("seed_everything", "step_seed.seed")
        parser.add_lightning_class_args(FiniteSteps, "finite_steps")
        parser.add_lightning_class_args(MCDropout, "mc_dropout")

    def before_instantiate_classes(self) -> None:
        config = self.config
        runs = Path(config.runs_dir, config.experiment)
        self.run_dir, self.ckpt_path = find_run(runs, config.run_id, config.resume, self.purpose)
        if config.resume:
            # Lightning 2.6.6 warns of every directory with checkpoints: Lightning-AI/pytorch-lightning#5209
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        _fill_in_from_data(config)
        fill_in_from_launcher(config.trainer)
        config.trainer.default_root_dir = str(self.run_dir)
        config.checkpoint.dirpath = str(self.run_dir / "checkpoints")
        self._configure_logger(config.trainer.logger)

    def after_instantiate_classes(self) -> None:
        step = 0
        if self.ckpt_path:
            checkpoint = read_checkpoint(str(self.ckpt_path), check=False)  # it has been
            self.restore(checkpoint)  # says at once whether they fit
            step = checkpoint["global_step"]
        if self.config.resume:
            for logger in self.trainer.loggers:
                if hasattr(logger, "go_on_from"):
                    logger.go_on_from(step)
        if self.offline:  # of this machine, not of the experiment
            del self.config.trainer.logger.dict_kwargs["mode"]
        self._make_run_dir()

    @rank_zero_only  # the directory of the other ranks is never made: callbacks broadcast this one
    def _make_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.run_dir).close()
        except OSError as error:
            raise ValueError(f"Expected runs_dir to be writable, but got {error.strerror}: {self.run_dir}") from error
        for left in self.run_dir.glob("checkpoints/.*.tmp.ckpt"):  # by a process that was killed
            left.unlink()
        if not self.config.resume:
            atexit.register(_discard_unless_started, self.run_dir)

    def _configure_logger(self, logger: Any) -> None:
        """Fills in what depends on the run: its directory, its id, and whether W&B can be reached."""
        self.offline = False
        if not hasattr(logger, "class_path"):
            return
        options = logger.init_args
        options.save_dir = str(self.run_dir)
        if logger.class_path.endswith("CSVLogger"):
            options.name, options.version = "", ""
        if logger.class_path.endswith("WandbLogger"):
            options.id = self.run_dir.name  # resuming continues this run
            options.name = f"{self.config.experiment} {self.run_dir.name}"
            chosen = options.offline or "WANDB_MODE" in os.environ or "mode" in logger.get("dict_kwargs", {})
            if not chosen and getattr(rank_zero_only, "rank", 0) == 0 and (reason := wandb_offline_reason()):
                self.offline = True
                logger.dict_kwargs = {**logger.get("dict_kwargs", {}), "mode": "offline"}
                directory = shlex.quote(str(self.run_dir / "wandb"))
                rank_zero_info(
                    f"W&B: {reason}, so this run is logged offline. Look at it with "
                    f"`wandb leet {directory}`, send it with `wandb sync {directory}/offline-run-*`."
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        callbacks: list[Callback] = [Throughput(), LostRanks()]
        if self._get(self.config, "trainer.enable_progress_bar") is not False:
            callbacks.append(RichProgressBar())
        if self.config_init.trainer.logger is not False:
            callbacks.append(LearningRateMonitor("step"))
        self.trainer_defaults["callbacks"] = callbacks
        kwargs["plugins"] = [*(self._get(self.config_init, "trainer.plugins") or []), AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError) as error:
            asked = ", ".join(f"trainer.{k}={self.config.trainer[k]}" for k in ("accelerator", "devices", "strategy"))
            raise ValueError(f"Expected settings that can run here, but got {asked}: {error}") from error

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Loads weights and data statistics; ValueError where they do not fit."""
        try:
            self.model.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise ValueError(f"Expected a model that fits the checkpoint, but got {error}") from error
        if state := checkpoint.get(type(self.datamodule).__qualname__):
            self.datamodule.load_state_dict(state)

    @property
    def best(self) -> str | None:
        """Path of the best checkpoint of this run; None when it saved none (fast_dev_run)."""
        path: str = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        return path or None

    @rank_zero_only
    def print_results(self) -> None:
        """The table of scores, deterministic against MC dropout, and where everything lies."""
        wandb.finish()  # before the table, which should stand last
        console = Console()
        scored = next(c for c in self.trainer.callbacks if isinstance(c, MCDropout))  # type: ignore[attr-defined]
        if table := scored.table():
            console.print(table)
        paths = [path.relative_to(self.run_dir) for path in sorted(self.run_dir.rglob("*")) if path.is_file()]
        lines = [f"Run: {self.run_dir}", *(f"  {path}" for path in paths if path.parts[0] != "wandb")]
        if any(path.parts[0] == "wandb" for path in paths):
            lines.append(f"Dashboard: wandb leet {shlex.quote(str(self.run_dir / 'wandb'))}")
        console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _fill_in_from_data(config: Any) -> None:
    """Gives the net what it leaves to the data (null): the size of a vocabulary, the length of a context."""
    data_class = cast(type, locate(config.data.class_path))
    net = config.model.get("init_args.net.init_args")
    if hasattr(data_class, "net_arguments") and net is not None and None in vars(net).values():
        for key, value in data_class(**config.data.init_args.as_dict()).net_arguments().items():
            if net.get(key, value) is None:
                net[key] = value


def _discard_unless_started(directory: Path) -> None:
    """Leaves nothing behind of a run that ended before its first step."""
    if not (directory / "config.yaml").exists():
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):
            directory.parent.rmdir()
