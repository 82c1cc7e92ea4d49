"""What the loggers hold after a run, read back from their files."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_file import wandb_history, wandb_records

Script = Callable[..., Any]

CONFIGS = Path(__file__).parents[2] / "configs"
SCORES = ("accuracy", "balanced_accuracy", "nll", "brier", "ece")
MORE_SCORES = (
    "brier_miscalibration", "brier_discrimination", "brier_uncertainty", "adaptive_ece", "smooth_ece", "auroc_error",
    "aurc", "augrc", "coverage_at_5_risk", "risk_at_80_coverage",
)  # fmt: skip
KEYS = {
    "epoch", "train/loss", "train/accuracy", "val/loss", "test/loss", "lr-AdamW/pg1", "lr-AdamW/pg2",
    *(f"{stage}/{score}" for stage in ("val", "test", "mc") for score in SCORES),
    *(f"{stage}/{score}" for stage in ("test", "mc") for score in MORE_SCORES),
    *(f"dropout/dropped/{site}" for site in ("embedding", "mlp")),
    *(f"throughput/{name}" for name in ("examples_per_second", "step_ms", "peak_memory_mib")),
}  # fmt: skip
TABLES = {"test/scores", "test/recall", "test/most_uncertain"}
MEDIA = {"test/reliability", "test/entropy", "test/uncertain", "test/confusion"} | TABLES
STEPS = {  # of 57, three times 19, counted from 0; the test comes after them
    "train/loss": [9, 19, 29, 39, 49],
    "lr-AdamW/pg1": [9, 19, 29, 39, 49],
    "dropout/dropped/mlp": [9, 19, 29, 39, 49],
    "throughput/examples_per_second": [9, 19, 29, 39, 49],
    "throughput/step_ms": [9, 19, 29, 39, 49],
    "train/accuracy": [9, 19, 29, 39, 49],
    "val/nll": [18, 37, 56],
    "test/nll": [57],
    "mc/nll": [57],
    "test/reliability": [57],
    "test/most_uncertain": [57],
}


def wandb_file(run: Path) -> Path:
    """The record of a run's only process."""
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    return file


def metrics_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def rows(trained: Any) -> list[dict[str, Any]]:
    return list(wandb_history(wandb_file(trained.run)))


def test_history_has_exactly_these_keys(rows: list[dict[str, Any]]) -> None:
    logged = {key for row in rows for key in row if not key.startswith("_")}
    assert logged == KEYS | MEDIA | {"trainer/global_step"}


def test_history_has_these_steps(rows: list[dict[str, Any]]) -> None:
    steps = [row["trainer/global_step"] for row in rows]
    assert steps == sorted(steps)
    assert {key: [row["trainer/global_step"] for row in rows if key in row] for key in STEPS} == STEPS


def test_history_holds_the_scores_of_the_run(trained: Any, rows: list[dict[str, Any]]) -> None:
    metrics = json.loads((trained.run / "metrics.json").read_text())
    (last,) = [row for row in rows if "mc/nll" in row]
    for prefix, scores in (("test", metrics["deterministic"]), ("mc", metrics["mc_dropout"])):
        logged = {key.removeprefix(f"{prefix}/"): value for key, value in last.items() if key.startswith(prefix)}
        logged.pop("loss", None)
        assert logged == pytest.approx({key: scores[key] for key in logged}, abs=1e-6)
        assert len(logged) == len(SCORES) + len(MORE_SCORES)


def test_learning_rate_is_that_of_the_step(trained: Any, rows: list[dict[str, Any]]) -> None:
    rates = [row["lr-AdamW/pg1"] for row in rows if "lr-AdamW/pg1" in row]
    model = yaml.safe_load((trained.run / "config.yaml").read_text())["model"]["init_args"]
    peak, warmup_steps = model["optimizer"]["init_args"]["lr"], model["warmup_steps"]
    assert warmup_steps >= 50
    assert rates == pytest.approx([peak * (step + 1) / (warmup_steps + 1) for step in STEPS["train/loss"]])


def test_pictures_and_table_are_there(trained: Any, rows: list[dict[str, Any]]) -> None:
    (files,) = trained.run.glob("wandb/offline-run-*/files")
    logged = {key: row[key] for row in rows for key in MEDIA if key in row}
    for key in MEDIA - TABLES:
        (picture,) = logged[key]["filenames"]
        assert (files / picture).read_bytes().startswith(b"\x89PNG"), key
    scores = json.loads((files / logged["test/scores"]["path"]).read_text())
    (row,) = [row for row in scores["data"] if row[:2] == ["mc_dropout", "nll"]]
    nll = json.loads((trained.run / "evaluation.json").read_text())["ways"]["mc_dropout"]["scores"]["nll"]
    assert row[2:6] == pytest.approx([nll["value"], nll["low"], nll["high"], 365])
    assert row[scores["columns"].index("difference_value")] == pytest.approx(nll["difference"]["value"])
    recall = json.loads((files / logged["test/recall"]["path"]).read_text())
    assert recall["columns"] == ["class", "n", "deterministic", "mc_dropout"]
    assert [row[0] for row in recall["data"]] == list("0123456789")
    table = json.loads((files / logged["test/most_uncertain"]["path"]).read_text())
    entropies = [row[table["columns"].index("mc_dropout_predictive_entropy")] for row in table["data"]]
    assert len(entropies) == 64
    assert entropies == sorted(entropies, reverse=True)
    assert 0 < entropies[-1] < entropies[0] < math.log(10)


def test_config_is_logged_once(trained: Any) -> None:
    records = wandb_records(wandb_file(trained.run))
    updates = [record.config.update for record in records if record.WhichOneof("record_type") == "config"]
    logged = [(item.key or item.nested_key, json.loads(item.value_json)) for update in updates for item in update]
    config = yaml.safe_load((trained.run / "config.yaml").read_text())
    for key in ("model", "data", "mc_dropout", "seed_everything"):
        assert [value for name, value in logged if name == key] == [config[key]]
    assert len(updates) == 1


def test_no_environment_in_any_file(trained: Any) -> None:
    secret = os.environ["TEST_SECRET"].encode()
    files = [path for path in trained.run.rglob("*") if path.is_file()]
    assert [path for path in files if secret in path.read_bytes()] == []
    assert any(b"W&B" in path.read_bytes() for path in files)  # the search finds what is there


def test_no_key_in_any_file(run_script: Script) -> None:
    key = "0123456789abcdef" * 2 + "fedcba98"
    few = ("--config", CONFIGS / "debug/fast.yaml", "--config", CONFIGS / "logger/wandb.yaml")
    options = ("--trainer.log_every_n_steps", 1, "--trainer.accelerator", "cpu")
    finished = run_script(
        "train", "--config", CONFIGS / "mlp_digits.yaml", *few, *options, WANDB_MODE="offline", WANDB_API_KEY=key
    )
    assert len(list(wandb_history(wandb_file(finished.run)))) > 3
    files = [path for path in finished.cwd.rglob("*") if path.is_file()]
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert "no API key" not in finished.err


def test_message_without_a_key_names_commands_that_work(trained: Any) -> None:
    (line,) = [line for line in trained.err.splitlines() if "no API key" in line]
    leet, sync = re.findall(r"`wandb (.*?)`", line)
    assert f"Dashboard: wandb {leet}" in trained.out
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", leet.removeprefix("leet ")],
        capture_output=True,
        text=True,
    )
    assert "mc/nll" in shown.stdout, shown.stderr
    command, pattern = sync.split(" ", 1)
    assert command == "sync"
    assert [path.suffix for run in Path("/").glob(pattern[1:]) for path in run.glob("*.wandb")] == [".wandb"]


def test_logger_can_be_left_out(run_script: Script) -> None:
    args = ("--config", CONFIGS / "mlp_digits.yaml", "--trainer.logger=false", "--trainer.accelerator", "cpu")
    finished = run_script("train", *args, "--trainer.max_epochs", 1)
    assert finished.status == 0
    assert not [path for path in finished.new if "wandb" in path.name]
    assert "W&B" not in finished.err


def test_csv_has_the_same_keys_and_steps(run_script: Script) -> None:
    configs = ("--config", CONFIGS / "mlp_digits.yaml", "--config", CONFIGS / "logger/csv.yaml")
    run = run_script("train", *configs, "--trainer.max_epochs", 3, "--trainer.accelerator", "cpu").run
    rows = metrics_csv(run)
    assert set(rows[0]) == KEYS - {"dropout/dropped/embedding"} | {"step"}  # whose rate is 0
    scalars = {key: steps for key, steps in STEPS.items() if key not in MEDIA}
    assert {key: [int(row["step"]) for row in rows if row[key]] for key in scalars} == scalars
    assert not (run / "wandb").exists()
