"""Configures checkpoints and the loggers that the user chose, so that all their files are in the run's directory."""

import inspect
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from pydoc import locate
from typing import Any, cast

import wandb
from jsonargparse import Namespace
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from thinned.runs.loggers import CSVLogger, WandbLogger

# Seconds between writes to W&B's file, 15 by default: a process that is killed loses the rest, first of all its config.
WRITTEN_AT_ONCE = {"x_transaction_log_flush_interval": 1.0}
FINISH_SECONDS = 120  # for uploads at the end of a run; `wandb sync --no-skip-online` sends the rest
PLACES = ("save_dir", "dir", "root_dir", "id", "version", "name")  # what a logger takes from its run


def put_in_run(
    config: Namespace, run: Path, purpose: str, checkpoints: Iterable[str], recorded: Mapping[str, Any]
) -> None:
    """Puts what a trainer, its checkpoints and its loggers write into the directory of a run: see `fill_in_loggers`."""
    given = config.trainer.logger
    config.trainer.logger = fill_in_loggers(given, run, config.experiment, purpose, checkpoints, recorded)
    for key, part in (("trainer.default_root_dir", "."), ("checkpoint.dirpath", "checkpoints")):
        if config[key] is not None:
            raise ValueError(f"Expected {key} to be left to runs_dir, experiment and run_id, but got {config[key]}")
        config[key] = str(run / part)


def fill_in_loggers(
    given: Any,
    run: Path,
    experiment: str,
    purpose: str = "",
    checkpoints: Iterable[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Any:
    """Fills in what loggers take from their run: the directory, W&B's name, id and group, and offline if need be.

    Args:
        given: `trainer.logger` of the config, which is not changed; true and null stand for a `CSVLogger`.
        run: Directory of the run.
        experiment: Its experiment.
        purpose: W&B's `job_type`; empty for train.
        checkpoints: Paths of those that the run reads.
        config: Config of the run as it is recorded, for the first record of W&B's file.

    Raises:
        ValueError: A logger is given a place of its own, or two would write the same files.
    """
    if given is False:
        return False
    if given in (None, True):
        given = Namespace(class_path="thinned.runs.CSVLogger")  # type: ignore[no-untyped-call]
    filled = [_placed(deepcopy(logger), run, experiment) for logger in (given if isinstance(given, list) else [given])]
    by_class = {cast(type, locate(logger.class_path)): logger for logger in filled}
    if len(by_class) < len(filled):
        raise ValueError(f"Expected trainer.logger with one logger of a class, but got {[*by_class]}")
    wandb_loggers = [logger for logger_class, logger in by_class.items() if issubclass(logger_class, WandbLogger)]
    if wandb_loggers and by_class.pop(cast(type, CSVLogger), None) is not None:
        rank_zero_info("WandbLogger writes metrics.csv too, so CSVLogger is left out.")
    for logger in wandb_loggers:
        page: dict[str, Any] = {"group": experiment, "job_type": purpose or "train", "config": {}}
        if config:
            compared = compared_by(config)
            page["config"] = {**config, **compared}
            page["tags"] = [compared[key] for key in ("net", "dataset") if key in compared]
        if purpose:
            folders = [Path(path).absolute().parent for path in checkpoints]
            ids = [wandb_id(f.parents[1].name, f.parent.name) for f in folders if f.name == "checkpoints"]
            page["config"]["trained"] = ids
            page["notes"] = f"{purpose} {', '.join(ids)}"
        logger.dict_kwargs = page | logger.get("dict_kwargs", {})
        logger.dict_kwargs["settings"] = WRITTEN_AT_ONCE | logger.dict_kwargs.get("settings", {})
        _set_offline_if_need_be(logger, run)
    return list(by_class.values()) if isinstance(given, list) else filled[0]


def compared_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a config by which runs are compared, under short keys.

    >>> net = {"class_path": "torch.nn.Sequential", "init_args": {"dropout": {"mlp": 0.2}}}
    >>> data = {"init_args": {"path": "owner/pictures"}}
    >>> compared_by({"seed_everything": 1, "data": data, "model": {"init_args": {"net": net}}})
    {'seed': 1, 'net': 'Sequential', 'dataset': 'pictures', 'dropout/mlp': 0.2}
    """
    net, path = config["model"].get("init_args", {}).get("net"), config["data"].get("init_args", {}).get("path")
    names = {"net": net and net["class_path"], "dataset": path}
    short = {key: re.split(r"[./]", name.rstrip("/"))[-1][:64] for key, name in names.items() if name}
    rates = net and net.get("init_args", {}).get("dropout")
    dropout = {f"dropout/{site}": p for site, p in rates.items()} if isinstance(rates, dict) else {}
    return {"seed": config["seed_everything"]} | short | dropout


def _placed(logger: Namespace, run: Path, experiment: str) -> Namespace:
    """Returns the config of one logger with the places of its run."""
    logger_class = cast(type, locate(logger.class_path))
    for ours in (CSVLogger, WandbLogger):
        if logger_class is getattr(lightning_loggers, ours.__name__):  # Lightning's begins again when a run resumes
            logger_class, logger.class_path = ours, f"thinned.runs.{ours.__name__}"
    parameters = inspect.signature(logger_class).parameters
    is_wandb = issubclass(logger_class, WandbLogger)
    logger.init_args = logger.get("init_args") or Namespace()  # type: ignore[no-untyped-call]
    given: Mapping[str, Any] = {**vars(logger.init_args), **logger.get("dict_kwargs", {})}
    for key in PLACES:
        default = parameters[key].default if key in parameters else None
        if given.get(key) not in (None, "", ".", default) and not (is_wandb and key == "name"):
            expected = f"trainer.logger.{key} to be left to runs_dir, experiment and run_id"
            raise ValueError(f"Expected {expected}, but got {given[key]!r}")
    if "save_dir" in parameters:
        logger.init_args.save_dir = str(run)
    if is_wandb:
        logger.init_args.id = wandb_id(experiment, run.name)  # makes a resumed run the same one
        logger.init_args.name = given.get("name") or f"{experiment} {run.name}"
    elif {"name", "version"} <= parameters.keys():
        logger.init_args.name = logger.init_args.version = ""
    return logger


def wandb_id(experiment: str, run: str) -> str:
    """Returns an id that is unique in the project, in characters that W&B accepts.

    >>> wandb_id("digits", "20260101-120000-ab12"), wandb_id("a.b", "c"), wandb_id("a", "b.c")
    ('digits.20260101-120000-ab12', 'a=2e=b.c', 'a.b=2e=c')
    """
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", lambda c: f"={ord(c[0]):x}=", part) for part in (experiment, run))


def wandb_offline_reason() -> str | None:
    """Returns, after 10 seconds at most, why to log offline; None if the server accepts the API key."""
    # wandb reads this when its service starts; the default is to wait for ever.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
    try:
        return None if wandb.login(prompt=False) else "no API key is configured"
    except wandb.errors.AuthenticationError as error:
        cause = str(error).rpartition(": ")[2].rstrip(".")
        return f"{wandb.setup().settings.base_url} does not confirm the API key ({cause})"


def _set_offline_if_need_be(logger: Namespace, run: Path) -> None:
    """Sets a W&B logger to offline if its server cannot be reached, and says so."""
    chosen = logger.init_args.get("offline") or "WANDB_MODE" in os.environ or "mode" in logger.dict_kwargs
    if chosen or getattr(rank_zero_only, "rank", 0) != 0 or not (reason := wandb_offline_reason()):
        return
    logger.dict_kwargs["mode"] = "offline"
    folder = shlex.quote(str(run / "wandb"))
    ways = f"Look at it with `wandb leet {folder}`, send it with `wandb sync {folder}/offline-run-*`."
    rank_zero_info(f"W&B: {reason}, so this run is logged offline. {ways}")
