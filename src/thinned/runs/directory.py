"""Finds and claims the directory of a new or resumed run, runs/<experiment>/<run id>, and records its config there.

At most one process at a time writes to a folder: the one that holds its claim, a lock on the file `.claim` in it. The
system releases it when the process ends, however that ends.
"""

import atexit
import os
import secrets
import shlex
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from thinned.files import read_checkpoint, whole_file
from thinned.runs.checkpoint_io import checkpoint_to_resume
from thinned.runs.loggers import ResumableLogger

CLAIM = ".claim"
Purpose = Literal["", "predict", "evaluate"]  # empty for training
_held: dict[Path, FileLock] = {}  # claims of this process


def open_run(config: Namespace, purpose: Purpose) -> tuple[Path, Path | None]:
    """Finds and claims the directory of a run, and returns it and the checkpoint from which to resume training."""
    directory = Path(config.runs_dir, config.experiment)
    run, checkpoint = find_run(directory, config.run_id, config.resume, purpose)
    enter_run(run, new=config.resume is None)
    if config.resume and not (purpose or checkpoint):
        checkpoint = checkpoint_to_resume(run)
    return run, checkpoint


def find_run(directory: Path, run_id: str | None, resume: str | None, purpose: Purpose) -> tuple[Path, Path | None]:
    """Returns the directory of a run, and the checkpoint to resume from, if one is named.

    Args:
        directory: Folder of the experiment, runs/<experiment>.
        run_id: Name of the run below it; None for the time of day.
        resume: None for a new run; latest for the run that `run_id` names, or else the newest one; else a run or one
            of its checkpoints. ValueError if there is none.
        purpose: Last part of the run's name; empty for training.
    """
    name = "-".join(filter(None, [run_id or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}", purpose]))
    if run_id is not None and Path(name).name != name:
        raise ValueError(f"Expected run_id to be the name of a directory, but got {run_id!r}")
    run = directory.absolute() / name
    if resume is None:
        return run, None
    if resume == "latest":
        run = _latest(directory.absolute(), purpose) if run_id is None else run
    else:
        run = Path(resume).absolute()
        if run.is_file() or run.suffix == ".ckpt":
            if purpose or run.parent.name != "checkpoints":
                raise ValueError(f"Expected resume to be latest, a run, or a checkpoint in it, but got {resume}")
            read_checkpoint(str(run))
            return run.parents[1], run
        if not any((run / part).exists() for part in ("config.yaml", "checkpoints")):
            raise ValueError(f"Expected resume to be latest, a run, or a checkpoint of one, but got {resume}")
    return run, None


def _latest(directory: Path, purpose: Purpose) -> Path:
    def last_change(run: Path) -> tuple[int, str]:  # all files are written under a new name
        return max(path.stat().st_mtime_ns for path in (run, *run.glob("checkpoints/"))), run.name

    others = tuple(f"-{other}" for other in get_args(Purpose) if other != purpose and other)
    runs = [path for path in directory.glob(f"*-{purpose}/" if purpose else "*/") if not path.name.endswith(others)]
    if not runs:
        raise ValueError(f"Expected a run to resume, but got none in {directory}")
    return max(runs, key=last_change)


@rank_zero_only  # callbacks broadcast this rank's directory
def enter_run(run: Path, new: bool) -> None:
    """Claims the directory of a run until the process ends. A new run makes it, so no other one of its name begins.

    A directory that this process has made is deleted again at exit if the run has not started by then.

    Raises:
        ValueError: It cannot be written, another process is in it, or a new one is there already.
    """
    parents = [folder for folder in (run.parent, *run.parent.parents) if not folder.exists()]
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        makes = new or not run.exists()
        run.mkdir(exist_ok=not new)  # atomic, on network file systems too
        claim(run)
    except FileExistsError:
        raise ValueError(f"Expected a new run_id, but got that of {run}: resume it by --resume latest") from None
    except OSError as error:
        raise ValueError(f"Expected runs_dir to be writable, but got {error.strerror}: {run}") from error
    atexit.register(_leave, run, makes, parents)
    for left_by_a_killed_process in run.glob("checkpoints/.*.tmp.ckpt"):
        left_by_a_killed_process.unlink()


def _leave(run: Path, made: bool, parents: list[Path]) -> None:
    if made and not (run / "config.yaml").exists():
        shutil.rmtree(run, ignore_errors=True)
        with suppress(OSError):  # other runs may be there by now
            for folder in parents:
                folder.rmdir()
    release(run)


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


def link_for_leet(run: Path) -> None:
    """Links the newest W&B files of a run in `runs/wandb`, so that `wandb leet runs/wandb` shows each run once."""
    latest, links = run / "wandb/latest-run", run.parents[1] / "wandb"
    with suppress(OSError):  # no W&B, no links on this file system, or another run is at it
        target = Path("..", run.parent.name, run.name, "wandb", os.readlink(latest))
        links.mkdir(exist_ok=True)
        for link in links.glob("*run-*"):
            if Path(os.readlink(link)).parent == target.parent or not link.exists():
                link.unlink()
        (links / target.name).symlink_to(target)


def files_of_run(run: Path) -> str:
    """Lists what lies in a run, and the command that shows what W&B has logged."""
    lines = [f"Run: {run}"]
    for path in sorted(run.iterdir()):
        if path.name not in ("wandb", CLAIM):
            files = f"/ ({sum(below.is_file() for below in path.rglob('*'))} files)" if path.is_dir() else ""
            lines.append(f"  {path.name}{files}")
    if (run / "wandb").exists():
        ours, all_runs = (shlex.quote(str(folder / "wandb")) for folder in (run, run.parents[1]))
        lines += [f"Dashboard: wandb leet {ours}", f"All runs: wandb leet {all_runs}"]
    return "\n".join(lines)


def claim(folder: Path) -> None:
    """Claims a folder until it is released or the process ends, unless this process holds the claim already.

    Raises:
        ValueError: Another process holds the claim.
        OSError: The folder is missing or cannot be written to.
    """
    folder = folder.resolve(strict=True)
    if folder in _held:
        return
    lock = FileLock(folder / CLAIM, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"Expected a folder that no other process writes to, but got {folder}") from None
    _held[folder] = lock


def release(folder: Path) -> None:
    """Releases the claim of this process on a folder, if it holds one."""
    if lock := _held.pop(folder.resolve(), None):
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
