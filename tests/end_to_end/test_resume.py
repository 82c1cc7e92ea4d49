"""A run that goes on from its last checkpoint ends where it would have ended without the break."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL_GPT = (
    "--config", CONFIGS / "gpt_pydocs.yaml", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
    "--model.net.num_layers", 1, "--model.net.width", 16, "--model.net.num_heads", 2,
    "--model.net.dropout.embedding", 0.1, "--model.net.dropout.attention", 0.1, "--model.net.dropout.mlp", 0.1,
    "--model.warmup_steps", 2, "--model.final_lr_fraction", 1,  # which does not depend on the number of steps
    "--data.cache_dir", "cache", "--data.val_fraction", 0.01, "--data.test_fraction", 0.005,
    "--mc_dropout.num_samples", "null", "--trainer.callbacks", "[]",
)  # fmt: skip


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_resumed_run_is_the_unbroken_run(
    trained: Any, trained_args: tuple[object, ...], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    first = run_script("train", *trained_args, "--trainer.max_epochs", 2)
    assert (checkpoint(first.run)["epoch"], checkpoint(first.run)["global_step"]) == (1, 38)
    last = first.run / "checkpoints/last.ckpt"
    resumed = run_script("train", *trained_args, "--resume", last, "--trainer.max_epochs", 3)
    assert resumed.status == 0, resumed.err
    assert list((tmp_path / "runs/mlp_digits").iterdir()) == [first.run]

    ended, unbroken = checkpoint(first.run), checkpoint(trained.run)
    assert (ended["epoch"], ended["global_step"]) == (2, 57)
    for name, value in unbroken["state_dict"].items():
        assert ended["state_dict"][name].equal(value), name
    assert (first.run / "metrics.json").read_bytes() == (trained.run / "metrics.json").read_bytes()
    tables = [pq.read_table(run / "predictions.parquet") for run in (first.run, trained.run)]
    assert tables[0].equals(tables[1])
    assert {path.name for path in (first.run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert yaml.safe_load((first.run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3

    logs = [file.name for file in sorted(first.run.glob("wandb/offline-run-*/*.wandb"))]
    assert logs == [f"run-{first.run.name}.wandb"] * 2  # both under one id


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dicts are, bit by bit."""
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


def test_run_resumed_within_an_epoch_is_the_unbroken_run(
    trained: Any, trained_args: tuple[object, ...], run_script: Callable[..., Any]
) -> None:
    """Of 19 steps an epoch: broken off after 25, the sixth of its epoch."""
    args = (*trained_args, "--checkpoint.every_n_train_steps", 3)
    first = run_script("train", *args, "--trainer.max_steps", 25)
    broken = checkpoint(first.run)
    assert (broken["epoch"], broken["global_step"]) == (1, 25)
    last = first.run / "checkpoints/last.ckpt"
    resumed = run_script("train", *args, "--resume", last, "--trainer.max_epochs", 3)
    assert resumed.status == 0, resumed.err
    ended, unbroken = checkpoint(first.run), checkpoint(trained.run)
    assert (ended["epoch"], ended["global_step"]) == (2, 57)
    assert not equal(ended["state_dict"], broken["state_dict"])
    assert equal(ended["state_dict"], unbroken["state_dict"])


@pytest.mark.parametrize(
    ("options", "broken_at"),
    [
        (("--trainer.val_check_interval", 3), 3),
        (("--trainer.val_check_interval", 4, "--trainer.accumulate_grad_batches", 2), 2),
        (("--trainer.val_check_interval", 6, "--checkpoint.every_n_train_steps", 2), 4),
    ],
    ids=["at a validation", "with accumulated gradients", "between validations"],
)
def test_gpt_resumed_within_an_epoch_is_the_unbroken_run(
    options: tuple[object, ...], broken_at: int, run_script: Callable[..., Any]
) -> None:
    steps = 4 if broken_at == 2 else 6
    whole = run_script("train", *SMALL_GPT, *options, "--trainer.max_steps", steps)
    first = run_script("train", *SMALL_GPT, *options, "--trainer.max_steps", broken_at)
    broken = checkpoint(first.run)
    assert (broken["epoch"], broken["global_step"]) == (0, broken_at)
    last = first.run / "checkpoints/last.ckpt"
    resumed = run_script("train", *SMALL_GPT, *options, "--resume", last, "--trainer.max_steps", steps)
    assert resumed.status == 0, resumed.err
    ended, unbroken = checkpoint(first.run), checkpoint(whole.run)
    assert (ended["epoch"], ended["global_step"]) == (unbroken["epoch"], unbroken["global_step"]) == (0, steps)
    assert not equal(ended["state_dict"], broken["state_dict"])
    assert equal(ended["state_dict"], unbroken["state_dict"])
    assert (first.run / "metrics.json").read_bytes() == (whole.run / "metrics.json").read_bytes()


@pytest.mark.parametrize(
    ("how_often", "last"),
    [
        (("--checkpoint.every_n_train_steps", 6), [6, 12, 18, 19, 24, 25]),
        (("--checkpoint.train_time_interval", "0:00:00"), [*range(1, 26)]),
        ((), [19, 25]),
    ],
    ids=["steps", "time", "validations"],
)
def test_best_is_chosen_at_validations_however_often_last_is_written(
    how_often: tuple[object, ...], last: list[int], trained_args: tuple[object, ...], run_script: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of 19 steps an epoch, which a validation follows: broken off after 25."""
    written: dict[str, list[int]] = {"best": [], "last": []}
    save = Trainer.save_checkpoint

    def spy(trainer: Trainer, filepath: str, *args: Any) -> None:
        written[Path(filepath).stem].append(trainer.global_step)
        save(trainer, filepath, *args)

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    few = ("--trainer.max_steps", 25, "--trainer.logger", "false", "--mc_dropout.num_samples", "null")
    assert run_script("train", *trained_args, *how_often, *few).status == 0
    assert written == {"best": [19], "last": last}
