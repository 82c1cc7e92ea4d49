"""Each step stands in the record of a run once, whatever had been written when it was killed."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from wandb_file import GLOBAL_STEP, newest, wandb_history

from thinned.runs.loggers import CSVLogger, WandbLogger


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def csv_logger(folder: Path, first_step: int | None = None) -> CSVLogger:
    logger = CSVLogger(folder, name="", version="")
    if first_step is not None:
        logger.resume_from(first_step)
    return logger


def log(logger: Any, *steps: int) -> None:
    for step in steps:
        logger.log_metrics({"loss": step / 8, "epoch": 0}, step)
        logger.save()


def test_csv_goes_on_from_a_step(tmp_path: Path) -> None:
    log(csv_logger(tmp_path), 0, 1, 2, 3)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0,0.625")  # a row that was being written
    second = csv_logger(tmp_path, 2)
    assert [row["step"] for row in csv_rows_after(second, tmp_path)] == ["0", "1"]
    log(second, 1, 2, 3, 4)
    assert [(row["step"], row["loss"]) for row in csv_rows(tmp_path)] == [(str(i), str(i / 8)) for i in range(5)]
    second.log_metrics({"other": 1.0}, 4)  # a new column
    second.save()
    assert [row["step"] for row in csv_rows(tmp_path)] == ["0", "1", "2", "3", "4", "4"]
    assert csv_rows(tmp_path)[-1]["other"] == "1.0"


def csv_rows_after(logger: CSVLogger, folder: Path) -> list[dict[str, str]]:
    """The rows once the logger has looked at the file."""
    assert logger.experiment is not None
    return csv_rows(folder)


def test_same_number_of_the_same_step_is_logged_once(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    for step, rate in ((3, 0.1), (3, 0.1), (3, 0.2), (4, 0.2)):
        logger.log_metrics({"rate": rate}, step)
    logger.save()
    assert [(row["step"], row["rate"]) for row in csv_rows(tmp_path)] == [("3", "0.1"), ("3", "0.2"), ("4", "0.2")]


def test_csv_has_all_rows_at_the_end(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": step / 8}, step)
    logger.finalize("success")
    assert [row["loss"] for row in csv_rows(tmp_path)] == ["0.0", "0.125", "0.25"]


def test_csv_of_a_new_run_begins_empty(tmp_path: Path) -> None:
    log(csv_logger(tmp_path), 0, 1)
    log(csv_logger(tmp_path, 0), 0)
    assert [row["step"] for row in csv_rows(tmp_path)] == ["0"]


def offline(folder: Path, first_step: int | None = None) -> WandbLogger:
    logger = WandbLogger(save_dir=folder, id="run", project="thinned", mode="offline")
    if first_step is not None:
        logger.resume_from(first_step)
    return logger


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.3, 0.0])
def test_newest_wandb_file_has_each_step_once(keep: float, same_start: Callable[[], Any], tmp_path: Path) -> None:
    """Logged: steps 0 to 5. The file loses its end; the run goes on from step 4 and computes 4 and 5 again."""
    with same_start():  # at its end W&B's file is complete
        log(offline(tmp_path), *range(6))
    file = newest(tmp_path)
    earlier = file.parent.with_name("offline-run-20000101_000000-run")  # W&B names folders by the second
    file = file.parent.rename(earlier) / file.name
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with same_start():
        log(offline(tmp_path, 4), 4, 5, 6)
    rows = list(wandb_history(newest(tmp_path)))
    assert [(row[GLOBAL_STEP], row["loss"]) for row in rows] == [(step, step / 8) for step in range(7)]
    assert [float(row["loss"]) for row in csv_rows(tmp_path)] == [step / 8 for step in range(7)]


def test_run_continues_without_a_table_that_the_server_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = offline(tmp_path)
    monkeypatch.setattr("wandb.Table", mock.Mock(side_effect=ConnectionError("no\nanswer")))
    with caplog.at_level("INFO"):
        logger.log_table("mc/most_uncertain", ["x"], [[1]], step=3)
    assert "W&B: no answer; the run continues without the table mc/most_uncertain." in caplog.messages


def test_online_the_number_of_rows_says_what_is_there(same_start: Callable[[], Any], tmp_path: Path) -> None:
    with same_start():
        log(offline(tmp_path), *range(6))

    logged: list[dict[str, float]] = []
    run = mock.Mock(offline=False, step=3, log=logged.append)  # W&B has the first three rows
    second = offline(tmp_path, 4)
    second._experiment = run
    log(second, 4, 5, 6)
    assert [row[GLOBAL_STEP] for row in logged] == [3, 4, 5, 6]
