"""What the loggers hold after a run, read back from their files."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from killed_runs import end, start
from wandb_file import wandb_config, wandb_history, wandb_records, wandb_summary

from thinned.evaluation.figures import CAPTIONS

Script = Callable[..., Any]

CONFIGS = Path(__file__).parents[2] / "configs"
SCORES = ("accuracy", "balanced_accuracy", "nll", "brier", "ece")
MORE_SCORES = (
    "brier_miscalibration", "brier_discrimination", "brier_uncertainty", "adaptive_ece", "smooth_ece", "auroc_error",
    "aurc", "augrc", "coverage_at_5_risk", "risk_at_80_coverage",
)  # fmt: skip
CURVES = {
    "epoch", "train/loss", "train/accuracy", "train/lr", "fit/nll", "fit/accuracy",
    *(f"val/{score}" for score in SCORES),
    *(f"dropout/dropped/{site}" for site in ("embedding", "mlp")),
    *(f"throughput/{name}" for name in ("examples_per_second", "step_ms", "peak_memory_mib")),
}  # fmt: skip
TESTED = {f"{way}/{score}" for way in ("test", "mc") for score in SCORES + MORE_SCORES}
TABLES = {"test/scores", "test/recall", "test/most_uncertain"}
PICTURES = {"fit/learning_curves", *(f"test/{name}" for name in CAPTIONS.keys() - {"learning_curves", "severity"})}
BEST = {"fit/nll": "min", "val/nll": "min", "fit/accuracy": "max", "val/accuracy": "max"}
STEPS = {  # of 57, three times 19, counted from 0; the test comes after them
    "train/loss": [9, 19, 29, 39, 49],
    "train/lr": [9, 19, 29, 39, 49],
    "dropout/dropped/mlp": [9, 19, 29, 39, 49],
    "throughput/examples_per_second": [9, 19, 29, 39, 49],
    "throughput/step_ms": [9, 19, 29, 39, 49],
    "train/accuracy": [9, 19, 29, 39, 49],
    "fit/nll": [18, 37, 56],
    "val/nll": [18, 37, 56],
    "fit/learning_curves": [57],
    "test/reliability": [57],
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
    assert logged == CURVES | PICTURES | {"trainer/global_step"}  # no score of the test, a chart of one point


def test_history_has_these_steps(rows: list[dict[str, Any]]) -> None:
    steps = [row["trainer/global_step"] for row in rows]
    assert steps == sorted(steps)
    assert {key: [row["trainer/global_step"] for row in rows if key in row] for key in STEPS} == STEPS


def test_summary_holds_the_scores_of_the_run(trained: Any) -> None:
    metrics = json.loads((trained.run / "metrics.json").read_text())
    summary = wandb_summary(wandb_file(trained.run))
    assert {key for key in summary if key.startswith(("test/", "mc/")) and key.count("/") == 1} >= TESTED | TABLES
    for prefix, scores in (("test", metrics["deterministic"]), ("mc", metrics["mc_dropout"])):
        logged = {score: summary[f"{prefix}/{score}"] for score in SCORES + MORE_SCORES}
        assert logged == pytest.approx({key: scores[key] for key in logged}, abs=1e-6)


def test_summary_holds_the_best_of_each_curve(trained: Any, rows: list[dict[str, Any]]) -> None:
    summary = wandb_summary(wandb_file(trained.run))
    for key, best in BEST.items():
        values = [row[key] for row in rows if key in row]
        assert (len(values), len(set(values))) == (3, 3)
        assert summary[key][best] == pytest.approx({"min": min, "max": max}[best](values)), key


def test_learning_rate_is_that_of_the_step(trained: Any, rows: list[dict[str, Any]]) -> None:
    rates = [row["train/lr"] for row in rows if "train/lr" in row]
    model = yaml.safe_load((trained.run / "config.yaml").read_text())["model"]["init_args"]
    peak, warmup_steps = model["optimizer"]["init_args"]["lr"], model["warmup_steps"]
    assert warmup_steps >= 50
    assert rates == pytest.approx([peak * (step + 1) / (warmup_steps + 1) for step in STEPS["train/loss"]])


def test_pictures_and_table_are_there(trained: Any, rows: list[dict[str, Any]]) -> None:
    (files,) = trained.run.glob("wandb/offline-run-*/files")
    logged = {key: row[key] for row in rows for key in PICTURES if key in row}
    logged |= {key: value for key, value in wandb_summary(wandb_file(trained.run)).items() if key in TABLES}
    for key in PICTURES:
        (picture,) = logged[key]["filenames"]
        assert (files / picture).read_bytes().startswith(b"\x89PNG"), key
    scores = json.loads((files / logged["test/scores"]["path"]).read_text())
    (row,) = [row for row in scores["data"] if row[:3] == ["test", "mc_dropout", "nll"]]
    nll = json.loads((trained.run / "evaluation.json").read_text())["ways"]["mc_dropout"]["scores"]["nll"]
    assert row[3:7] == pytest.approx([nll["value"], nll["low"], nll["high"], 365])
    assert row[scores["columns"].index("difference_value")] == pytest.approx(nll["difference"]["value"])
    recall = json.loads((files / logged["test/recall"]["path"]).read_text())
    assert recall["columns"] == ["class", "n", "deterministic", "mc_dropout"]
    assert [row[0] for row in recall["data"]] == list("0123456789")
    table = json.loads((files / logged["test/most_uncertain"]["path"]).read_text())
    entropies = [row[table["columns"].index("mc_dropout_predictive_entropy")] for row in table["data"]]
    assert len(entropies) == 64
    assert entropies == sorted(entropies, reverse=True)
    assert 0 < entropies[-1] < entropies[0] < math.log(10)


def test_first_record_holds_the_whole_config(trained: Any) -> None:
    records = list(wandb_records(wandb_file(trained.run)))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    first = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    config = yaml.safe_load((trained.run / "config.yaml").read_text())
    assert first == config | {
        "net": "MLP", "dataset": "digits", "seed": 0,
        "dropout/embedding": 0.1, "dropout/attention": 0.0, "dropout/residual": 0.0, "dropout/mlp": 0.3,
    }  # fmt: skip
    later = [record.config.update for record in records if record.WhichOneof("record_type") == "config"]
    assert [{item.key: item.value_json for item in update} for update in later] == [{"params": "301066"}]
    assert wandb_config(wandb_file(trained.run))["params"] == 64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


def test_page_is_set_up(trained: Any) -> None:
    records = list(wandb_records(wandb_file(trained.run)))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.job_type, list(run.tags)) == ("mlp_digits", "train", ["MLP", "digits"])
    metrics = {record.metric.name: record.metric for record in records if record.WhichOneof("record_type") == "metric"}
    assert {key for key, metric in metrics.items() if metric.options.hidden} == {"epoch", "trainer/global_step"}
    best = {key: "min" if metric.summary.min else "max" for key, metric in metrics.items() if str(metric.summary)}
    assert best == BEST | {"val/mc_nll": "min"}
    assert {metrics[key].step_metric for key in best} == {"trainer/global_step"}


def test_one_folder_shows_all_runs(trained: Any) -> None:
    (link,) = trained.run.parents[1].glob("wandb/offline-run-*")
    assert link.resolve() == wandb_file(trained.run).parent.resolve()
    assert f"All runs: wandb leet {trained.run.parents[1] / 'wandb'}" in trained.out


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


def test_killed_run_has_its_config(tmp_path: Path) -> None:
    """Each process is killed, W&B's too, which by itself would write when it has 32 KiB or 15 seconds are over."""
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.max_epochs", 1000, "--trainer.accelerator", "cpu")
    process = start("--config", CONFIGS / "mlp_digits.yaml", *quiet, "--run_id", "killed", cwd=tmp_path)
    run, deadline = tmp_path / "runs/mlp_digits/killed", time.monotonic() + 60
    while not (run / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGKILL)
    end(process)
    config = wandb_config(wandb_file(run))
    assert config["model"] == yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (config["dropout/mlp"], config["params"]) == (0.2, 301066)


@pytest.mark.slow
def test_checkpoint_and_code_are_artifacts_if_asked_for(start_script: Script, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/mine.py").write_text("print(1)")
    few = ("--trainer.max_epochs", 1, "--trainer.accelerator", "cpu", "--mc_dropout.num_samples", "null")
    asked = {"WANDB_SAVE_CODE": "true", "WANDB_CODE_DIR": str(tmp_path / "code")}
    model = ("--trainer.logger.log_model", "true")
    run = start_script("scripts/train.py", "--config", CONFIGS / "mlp_digits.yaml", *few, *model, **asked).run
    records = wandb_records(wandb_file(run))
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    code, *models = [a for a in artifacts if a.type in ("code", "model")]
    assert [content.path for content in code.manifest.contents] == ["mine.py"]
    assert {tuple(sorted(model.aliases)) for model in models} == {("latest",), ("best", "latest")}
    sizes = {model.manifest.contents[0].size for model in models}
    assert sizes == {path.stat().st_size for path in (run / "checkpoints").glob("*.ckpt")}


def test_csv_has_the_same_keys_and_steps(run_script: Script) -> None:
    configs = ("--config", CONFIGS / "mlp_digits.yaml", "--config", CONFIGS / "logger/csv.yaml")
    sizes = ("--data.test_fraction", 0.2, "--trainer.max_epochs", 3)
    run = run_script("train", *configs, *sizes, "--trainer.accelerator", "cpu").run
    rows = metrics_csv(run)
    assert set(rows[0]) == (CURVES | TESTED | {"step"}) - {"dropout/dropped/embedding"}  # whose rate is 0
    scalars = {key: steps for key, steps in STEPS.items() if key not in PICTURES} | {"test/nll": [57], "mc/nll": [57]}
    assert {key: [int(row["step"]) for row in rows if row[key]] for key in scalars} == scalars
    assert not (run / "wandb").exists()
