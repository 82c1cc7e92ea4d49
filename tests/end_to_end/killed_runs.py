"""Runs of scripts/train.py as processes that can be killed, and what must be equal of two runs, bit by bit."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from wandb_file import GLOBAL_STEP, newest, wandb_history

ROOT = Path(__file__).parents[2]


def start(*args: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts scripts/train.py in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/train.py", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{Path(__file__).parent}", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what the process said."""
    try:
        err = process.communicate(timeout=200)[1]
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, err


def in_csv(run: Path) -> list[dict[str, Any]]:
    with (run / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def in_wandb(run: Path) -> list[dict[str, Any]]:
    """What W&B has of the run in its newest file; nothing where it is logged to a file alone."""
    logged = wandb_history(newest(run)) if (run / "wandb").exists() else ()
    return [{"step": row[GLOBAL_STEP], **row} for row in logged]


def by_step(rows: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """The logged numbers that no clock has measured, by step and key; each step holds a key once."""
    values: dict[tuple[int, str], float] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and not key.startswith(("throughput/", "step", "epoch", "_", "trainer/")):
                assert (int(row["step"]), key) not in values, f"{key} twice at step {row['step']}"
                values[int(row["step"]), key] = value
    return values


def assert_equal(run: Path, whole: Path) -> None:
    """The same weights, optimiser state, best score, log, metrics and predictions, bit by bit."""
    for name in ("last", "best"):
        ended, unbroken = (torch.load(r / f"checkpoints/{name}.ckpt", weights_only=True) for r in (run, whole))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert_same(ended[key], unbroken[key], f"{name}: {key}")
        assert_same(best_of(ended), best_of(unbroken), f"{name}: best")
    assert by_step(in_csv(run)) == by_step(in_csv(whole)) != {}
    assert by_step(in_wandb(run)) == by_step(in_wandb(whole))
    assert (run / "wandb").exists() == bool(in_wandb(run))
    assert (run / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    predictions = [pq.read_table(r / "predictions.parquet").replace_schema_metadata() for r in (run, whole)]
    assert predictions[0].equals(predictions[1])  # but for the checksum of the checkpoint, which names its run
    assert not list((run / "checkpoints").glob("*.tmp*"))


def best_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint remembers of the best one, wherever its run is."""
    memory = checkpoint["callbacks"]["Checkpoints"]
    scores = {Path(path).name: score for path, score in memory.pop("best_k_models").items()}
    return {k: Path(v).name if k.endswith("path") else v for k, v in memory.items() if k != "dirpath"} | scores


def assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert one.equal(other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert one == other, where
