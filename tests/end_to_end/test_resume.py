"""A run that goes on from its last checkpoint ends where it would have ended without the break."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_resumed_run_is_the_unbroken_run(
    trained: Any, trained_args: tuple[object, ...], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    first = run_script("train", *trained_args, "--trainer.max_epochs", 2)
    assert (checkpoint(first.run)["epoch"], checkpoint(first.run)["global_step"]) == (1, 38)
    last = first.run / "checkpoints/last.ckpt"
    resumed = run_script("train", *trained_args, "--ckpt_path", last, "--trainer.max_epochs", 3)
    assert resumed.status == 0, resumed.err
    assert list((tmp_path / "runs/mlp_digits").iterdir()) == [first.run]

    ended, unbroken = checkpoint(first.run), checkpoint(trained.run)
    assert (ended["epoch"], ended["global_step"]) == (2, 57)
    for name, value in unbroken["state_dict"].items():
        assert ended["state_dict"][name].equal(value), name
    for name in ("metrics.json", "predictions.parquet"):
        assert (first.run / name).read_bytes() == (trained.run / name).read_bytes()
    assert {path.name for path in (first.run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert yaml.safe_load((first.run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3

    logs = [file.name for file in sorted(first.run.glob("wandb/offline-run-*/*.wandb"))]
    assert logs == [f"run-{first.run.name}.wandb"] * 2  # both under one id
