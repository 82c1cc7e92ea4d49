"""A run that resumes elsewhere, or with other settings: what is given acts, is said and recorded, or is refused."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killed_runs import assert_same

Script = Callable[..., Any]

CSV = Path(__file__).parents[2] / "configs/logger/csv.yaml"


@pytest.fixture
def args(trained_args: tuple[object, ...]) -> tuple[object, ...]:
    return (*trained_args, "--config", CSV, "--model.net.hidden", "[16]", "--mc_dropout.num_samples", "null")


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)


def test_config_optimiser_and_schedule_agree(args: tuple[object, ...], run_script: Script) -> None:
    run = run_script("train", *args, "--trainer.max_epochs", 1).run
    given = ("--model.optimizer.lr", 0.5, "--model.optimizer.weight_decay", 0.25, "--model.warmup_steps", 0)
    resumed = run_script("train", *args, "--trainer.max_epochs", 2, "--resume", run, *given)
    assert resumed.status == 0, resumed.err
    assert "lr 0.5 (was 0.002), weight_decay 0.25 (was 0.05)" in resumed.err
    state = checkpoint(run)
    groups = state["optimizer_states"][0]["param_groups"]
    assert [(g["lr"], g["initial_lr"], g["weight_decay"]) for g in groups] == [(0.5, 0.5, 0.25), (0.5, 0.5, 0)]
    assert state["lr_schedulers"][0]["base_lrs"] == [0.5, 0.5]
    for config in (state["config"], yaml.safe_load((run / "config.yaml").read_text())):
        settings = config["model"]["init_args"]["optimizer"]["init_args"]
        assert (settings["lr"], settings["weight_decay"]) == (0.5, 0.25)
    with (run / "metrics.csv").open() as file:
        rates = {int(row["step"]): row["train/lr"] for row in csv.DictReader(file) if row["train/lr"]}
    assert (rates[29], float(rates[9])) == ("0.5", pytest.approx(0.002 * 10 / 51))


def test_change_that_no_step_would_train_is_refused(args: tuple[object, ...], run_script: Script) -> None:
    run = run_script("train", *args, "--trainer.max_epochs", 1).run
    before = (run / "config.yaml").read_bytes()
    done = run_script("train", *args, "--trainer.max_epochs", 1, "--resume", run, "--model.optimizer.lr", 0.5)
    assert done.status == 1
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "Expected steps left for another model.optimizer.lr, but got a run that has ended after epoch 1" in error
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_run_elsewhere_resumes_and_tests_as_in_place(
    how: str, args: tuple[object, ...], run_script: Script, tmp_path: Path
) -> None:
    """With a rate at which every further epoch is worse, so that the best checkpoint is that of before."""
    run = run_script("train", *args, "--trainer.max_epochs", 2).run
    best = checkpoint(run, "best")["global_step"]
    elsewhere = tmp_path / "mounted/b"
    (shutil.move if how == "moved" else shutil.copytree)(run, elsewhere)
    worse = ("--model.optimizer.lr", 9, "--trainer.max_epochs", 3)
    done = run_script("train", *args, "--resume", elsewhere, *worse)
    assert done.status == 0, done.err
    assert checkpoint(elsewhere)["global_step"] == 57
    assert checkpoint(elsewhere, "best")["global_step"] == best
    assert f"{elsewhere}/checkpoints/best.ckpt" in done.err
    if how == "copied":
        run_script("train", *args, "--resume", run, *worse)
        for name in ("metrics.json", "metrics.csv"):
            lines = [(r / name).read_text().splitlines() for r in (run, elsewhere)]
            assert len(lines[0]) == len(lines[1])
        assert (run / "metrics.json").read_bytes() == (elsewhere / "metrics.json").read_bytes()


def memory(run: Path, name: str = "last") -> dict[str, Any]:
    """What a checkpoint remembers of the best one."""
    return checkpoint(run, name)["callbacks"]["Checkpoints"]


def test_best_is_not_replaced_by_a_worse_one_of_a_second_try(args: tuple[object, ...], run_script: Script) -> None:
    """From the end of the first epoch again: with a rate that hardly helps in the second one, and with the same."""
    run = run_script("train", *args, "--trainer.max_epochs", 1).run
    first = shutil.copy(run / "checkpoints/last.ckpt", run / "checkpoints/first.ckpt")
    whole = run_script("train", *args, "--trainer.max_epochs", 2, "--resume", "latest")
    assert whole.status == 0, whole.err
    best, remembered = (run / "checkpoints/best.ckpt").read_bytes(), memory(run)
    again = ("--trainer.max_epochs", 2, "--resume", first)

    worse = run_script("train", *args, *again, "--model.optimizer.lr", 1e-4)
    assert worse.status == 0, worse.err
    assert (run / "checkpoints/best.ckpt").read_bytes() == best
    assert checkpoint(run)["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-4

    same = run_script("train", *args, *again)
    assert same.status == 0, same.err
    assert_same(memory(run), remembered, "last")
    assert (run / "checkpoints/best.ckpt").read_bytes() == best


def test_own_checkpoint_is_not_what_is_tested(args: tuple[object, ...], run_script: Script) -> None:
    own = ("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.save_last", "true")
    done = run_script("train", *args, "--trainer.max_epochs", 1, *own)
    assert {path.name for path in (done.run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (done.run / "model_checkpoint/last.ckpt").exists()
    assert f"{done.run}/checkpoints/best.ckpt" in done.err


def test_callback_that_is_refused_leaves_nothing(args: tuple[object, ...], run_script: Script) -> None:
    finder = run_script("train", *args, "--trainer.callbacks", "LearningRateFinder").error
    assert "Expected trainer.callbacks without LearningRateFinder" in finder


def test_list_of_loggers_resumes_in_the_run(args: tuple[object, ...], run_script: Script, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(
        "trainer: {logger: [{class_path: thinned.runs.WandbLogger, init_args: {project: thinned}}, "
        "{class_path: thinned.runs.CSVLogger, init_args: {save_dir: .}}]}"
    )
    options = (*args, "--config", tmp_path / "two.yaml")
    run = run_script("train", *options, "--trainer.max_epochs", 1, WANDB_MODE="offline").run
    again = run_script("train", *options, "--trainer.max_epochs", 2, "--resume", run, WANDB_MODE="offline")
    assert again.status == 0, again.err
    assert {path.name for path in tmp_path.iterdir()} == {"two.yaml", "runs"}
    logs = [path.name for path in run.glob("wandb/offline-run-*/*.wandb")]
    assert logs == [f"run-mlp_digits.{run.name}.wandb"] * 2
    assert [path.relative_to(run) for path in run.rglob("metrics.csv")] == [Path("metrics.csv")]
    with (run / "metrics.csv").open() as file:
        rows = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert rows == ["9", "19", "29"]
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert [each["init_args"]["save_dir"] for each in recorded["trainer"]["logger"]] == [".", "."]
    assert (recorded["trainer"]["default_root_dir"], recorded["checkpoint"]["dirpath"]) == (None, None)
