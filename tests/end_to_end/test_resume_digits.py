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
    assert logs == [f"run-mlp_digits.{first.run.name}.wandb"] * 2  # both under one id


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dicts are, bit by bit."""
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("broken_at", "epoch"), [(25, 1), (19, 0)], ids=["within an epoch", "at its end"])
def test_run_broken_off_by_the_number_of_steps_goes_on(
    num_workers: int, broken_at: int, epoch: int, trained: Any, trained_args: tuple[object, ...],
    run_script: Callable[..., Any],
) -> None:  # fmt: skip
    """Of 19 steps an epoch. Workers fetch batches before Lightning has turned to the one with which a run goes on."""
    args = (*trained_args, "--checkpoint.every_n_train_steps", 3, "--data.num_workers", num_workers)
    first = run_script("train", *args, "--trainer.max_steps", broken_at)
    broken = checkpoint(first.run)
    assert (broken["epoch"], broken["global_step"]) == (epoch, broken_at)
    last = first.run / "checkpoints/last.ckpt"
    resumed = run_script("train", *args, "--resume", last, "--trainer.max_epochs", 3)
    assert resumed.status == 0, resumed.err
    ended, unbroken = checkpoint(first.run), checkpoint(trained.run)
    assert (ended["epoch"], ended["global_step"]) == (2, 57)
    assert not equal(ended["state_dict"], broken["state_dict"])
    assert equal(ended["state_dict"], unbroken["state_dict"])


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

    def spy(trainer: Trainer, filepath: str, *args: Any, **options: Any) -> None:
        written[Path(filepath).stem].append(trainer.global_step)
        save(trainer, filepath, *args, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    few = ("--trainer.max_steps", 25, "--trainer.logger", "false", "--mc_dropout.num_samples", "null")
    assert run_script("train", *trained_args, *how_often, *few).status == 0
    assert written == {"best": [19], "last": last}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--checkpoint.save_top_k", 3), "checkpoint.filename to hold a number, as in best-{step}"),
        (("--trainer.accumulate_grad_batches", 4, "--trainer.val_check_interval", 6), "val_check_interval to come to"),
        (("--trainer.accumulate_grad_batches", 4, "--trainer.val_check_interval", 0.4), "but got 6 batches"),
    ],
)
def test_what_cannot_go_on_exactly_is_refused(
    options: tuple[object, ...], expected: str, trained_args: tuple[object, ...], run_script: Callable[..., Any]
) -> None:
    done = run_script("train", *trained_args, *options, "--trainer.logger", "false")
    assert done.status == 1
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: Expected ")
    assert expected in error


def test_best_of_several_kept_is_the_best(
    trained: Any, trained_args: tuple[object, ...], run_script: Callable[..., Any]
) -> None:
    several = ("--trainer.max_epochs", 3, "--checkpoint.save_top_k", -1, "--checkpoint.filename", "best-{step}")
    run = run_script("train", *trained_args, *several).run
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"last.ckpt", *(f"best-step={step}.ckpt" for step in (19, 38, 57))}
    assert (run / "metrics.json").read_bytes() == (trained.run / "metrics.json").read_bytes()
