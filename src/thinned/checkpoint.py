"""Checkpoints that stand alone: weights and the config of their run, opened without running any code in them."""

import argparse
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

# What prediction takes from a checkpoint.
KEPT = ("seed_everything", "experiment", "runs_dir", "model", "data", "mc_dropout")


def checkpoint_arguments(args: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Turns `--ckpt_path X [options]` into the checkpoint and arguments: its config, then the options, which win.

    Model, data and Monte-Carlo dropout come from the checkpoint; where to run (trainer) does not. Its path is added to
    it as `ckpt_path`.
    """
    epilog = "Every option of scripts/train.py may follow, and wins over what the checkpoint holds."
    options = argparse.ArgumentParser(epilog=epilog, allow_abbrev=False)
    options.add_argument("--ckpt_path", help="Checkpoint of a run, which holds its config.")
    found, rest = options.parse_known_args(args)
    if found.ckpt_path is None:
        raise ValueError("Expected --ckpt_path with the path of a checkpoint, but got none")
    checkpoint = read_checkpoint(found.ckpt_path)
    config = checkpoint["config"]
    kept = {key: config[key] for key in KEPT}
    kept["trainer"] = {"logger": False}
    return checkpoint | {"ckpt_path": found.ckpt_path}, ["--config", yaml.safe_dump(kept), *rest]


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint written by the scripts, opened with `weights_only`: no pickled code is run.

    Raises:
        ValueError: missing, truncated, foreign, or holding anything but tensors and primitives.
    """
    expected = "Expected ckpt_path to be a checkpoint of scripts/train.py, but got"
    if not Path(path).is_file():
        raise ValueError(f"{expected} no file: {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{expected} a file with other objects than tensors and primitives: {path}") from error
    except Exception as error:  # torch.load fails in many ways on bytes that are none of its own
        raise ValueError(f"{expected} a truncated or foreign file: {path}") from error
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or "state_dict" not in checkpoint or not set(KEPT) <= config.keys():
        raise ValueError(f"{expected} a file without its config: {path}")
    return checkpoint
