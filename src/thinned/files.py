"""Writes files that appear whole or not at all, and opens checkpoints without running code in them."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

# Keys of the config that prediction takes from a checkpoint: not where to run (trainer).
KEPT = ("seed_everything", "experiment", "runs_dir", "model", "data", "mc_dropout")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file replaces `path` if the block ends without an exception; makes the folder.

    Raises:
        OSError: The file cannot be written; the message names it, and the old file is kept.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # some writers take the format from the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # some file systems notice only now that they are full
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"Expected to write {path}, but got {error.strerror or error}") from error
        raise


def checkpoint_file(path: str | Path) -> str:
    """Returns the path of a checkpoint; for the folder of a run, that of its best checkpoint."""
    return str(Path(path, "checkpoints/best.ckpt") if Path(path).is_dir() else path)


def read_checkpoint(path: str, check: bool = True) -> dict[str, Any]:
    """Opens a checkpoint written by the scripts with `weights_only`, so that no pickled code runs.

    `check` compares every byte with its checksum, which torch does not.

    Raises:
        ValueError: The file is missing, truncated, foreign, or holds anything but tensors and primitives.
    """
    expected = "Expected a checkpoint of scripts/train.py, but got"
    if not Path(path).is_file():
        raise ValueError(f"{expected} no file: {path}")
    try:
        if check:
            with zipfile.ZipFile(path) as file:
                if file.testzip():
                    raise zipfile.BadZipFile
        with warnings.catch_warnings(action="ignore"):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{expected} a file with other objects than tensors and primitives: {path}") from error
    except Exception as error:  # torch.load fails in many ways on foreign bytes
        raise ValueError(f"{expected} a truncated or foreign file: {path}") from error
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or "state_dict" not in checkpoint or not set(KEPT) <= config.keys():
        raise ValueError(f"{expected} a file without its config: {path}")
    return checkpoint


def _sync_directory(directory: Path) -> None:
    """Makes a rename survive a crash, if the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
