"""Reads the checkpoints given to the scripts, and writes those from which a run resumes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from thinned.files import KEPT, checkpoint_file, read_checkpoint, whole_file


def checkpoint_arguments(
    args: Sequence[str] | None = None, with_logger: bool = False
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Turns `--ckpt_path X [Y ...] [options]` into checkpoints by path, and into arguments: later ones win.

    The arguments are the config of the first checkpoint, then the options; `with_logger` keeps its logger.
    """
    epilog = "Every option of scripts/train.py may follow, and wins over what the checkpoint holds."
    options = argparse.ArgumentParser(epilog=epilog, allow_abbrev=False)
    options.add_argument("--ckpt_path", nargs="+", help="Checkpoint of a run, or its folder for the best one.")
    found, rest = options.parse_known_args(args)
    if found.ckpt_path is None:
        raise ValueError("Expected --ckpt_path with the path of a checkpoint, but got none")
    paths = [checkpoint_file(path) for path in found.ckpt_path]
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError(f"Expected --ckpt_path with each checkpoint once, but got {', '.join(paths)}")
    checkpoints = {path: read_checkpoint(path) for path in paths}
    given = checkpoints[paths[0]]["config"]
    logger = given["trainer"].get("logger", False) if with_logger else False
    config = {key: given[key] for key in KEPT} | {"trainer": {"logger": logger}}
    return checkpoints, ["--config", yaml.safe_dump(config), *rest]


def checkpoint_to_resume(run: Path) -> Path | None:
    """Returns the intact checkpoint of a run with the most steps, `last.ckpt` if two tie; None if it has none yet.

    Raises:
        ValueError: All checkpoints are damaged; a warning names each damaged one.
    """
    steps, damaged = {}, False
    for path in run.glob("checkpoints/[!.]*.ckpt"):
        try:
            steps[path] = read_checkpoint(str(path))["global_step"]
        except ValueError as error:
            damaged = True
            rank_zero_warn(f"Passed over a damaged checkpoint: {error}")
    if damaged and not steps:
        raise ValueError(f"Expected a checkpoint to resume from, but got damaged ones alone: {run / 'checkpoints'}")
    if not steps:
        rank_zero_info(f"No checkpoint yet, so the run begins again: {run}")
    return max(steps, key=lambda path: (steps[path], path.name == "last.ckpt"), default=None)


def last_checkpoint(trainer: Trainer) -> str | Path | None:
    """Returns the path of this run's newest checkpoint, or else of the one that it resumed from."""
    # ModelCheckpoint does not know it: a test loads its state from the tested checkpoint.
    ours = cast(ModelCheckpoint, trainer.checkpoint_callbacks[-1])  # the user's own come first
    paths = Path(str(ours.dirpath)).glob("[!.]*.ckpt")
    return max(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), default=trainer.ckpt_path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that appear whole or not at all.

    Lightning writes to /tmp first, from which a file is copied, not renamed, to another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with whole_file(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError if the disk is full
            kept = "the one before is kept" if path.exists() else "there was none yet"
            said = error if isinstance(error, OSError) else f"Expected to write {path}, but got {error}"
            raise OSError(f"{str(said).splitlines()[0]} ({kept})") from error
