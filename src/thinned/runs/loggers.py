"""Loggers of a run that goes on: each step stands in their record once, however often the run was killed."""

import csv
import json
import os
import shlex
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jsonargparse import Namespace
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from thinned.files import whole_file
from thinned.runs.wandb_server import wandb_offline_reason

GLOBAL_STEP = "trainer/global_step"  # under which Lightning's WandbLogger logs the step


@runtime_checkable
class ResumableLogger(Protocol):
    """A logger that has each step once, even if the run resumes from an earlier one."""

    def resume_from(self, step: int) -> None:
        """Says that the run has been logged before, and which step is computed next."""


class CSVLogger(loggers.CSVLogger):
    """Logs to `metrics.csv`. A run that resumes keeps the rows before the step from which it does.

    Args:
        As Lightning's `CSVLogger`.
    """

    _first_step = 0

    def resume_from(self, step: int) -> None:
        """Keeps the rows of the steps before this one."""
        self._first_step = step

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        if self._experiment is None:
            self._experiment = _ContinuedWriter(self.log_dir, self._first_step)
        return self._experiment


class WandbLogger(loggers.WandbLogger):
    """Weights & Biases, and `metrics.csv` beside it, since of a process that is killed W&B loses what it still held.

    W&B cannot take back what it has recorded, and a run goes on from its last checkpoint, which is older: those steps
    are computed again, bit by bit the same, and left out here. What is in `metrics.csv` alone is logged first.

    Args:
        As Lightning's `WandbLogger`.
    """

    _first_step: int | None = None
    _file: "_ContinuedWriter | None" = None

    def resume_from(self, step: int) -> None:
        """Logs what W&B has lost of the steps before this one, and leaves out what it has of those after."""
        self._first_step = step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._file is None:
            self._begin()
        assert self._file is not None
        self._file.log_metrics({k: v for k, v in metrics.items() if isinstance(v, int | float)}, step)
        self._file.save()
        self._log_new(metrics, step)

    @rank_zero_only
    def log_table(self, key: str, *args: Any, **options: Any) -> None:
        """Logs a table; the run continues without it if the server, which must name a place for it, fails."""
        try:
            super().log_table(key, *args, **options)
        except Exception as error:  # whatever a server does wrong
            rank_zero_info(f"W&B: {' '.join(str(error).split())}; the run continues without the table {key}.")

    def _log_new(self, metrics: Mapping[str, Any], step: int | None) -> None:
        if new := self._seen.new(metrics, step):
            super().log_metrics(new, step)

    def _begin(self) -> None:
        directory = self.save_dir or "."
        before = _read_rows(Path(directory, ExperimentWriter.NAME_METRICS_FILE))
        self._file, self._seen = _ContinuedWriter(directory, self._first_step or 0), _Seen()
        if self._first_step is None:
            return
        if self.experiment.offline:
            for file in sorted(Path(directory).glob("wandb/*run-*/*.wandb")):
                for row in wandb_history(file):
                    self._seen.add(row, int(row.get(GLOBAL_STEP, -1)))
        else:  # where each row has a number
            for row in before[: self.experiment.step]:
                self._seen.add(row, int(row["step"]))
        for row in before:
            if int(row["step"]) < self._first_step:
                values = {key: float(value) for key, value in row.items() if key != "step"}
                self._log_new(values, int(row["step"]))


class _Seen:
    """Which values have been logged at which step, beside the epoch, which goes with every row.

    Those of an earlier process by their key; in this one a number that is the same again, such as Lightning's learning
    rate of each batch whose gradients are accumulated.
    """

    def __init__(self) -> None:
        self._keys: dict[int, set[str]] = {}
        self._step: int | None = None
        self._numbers: dict[str, float] = {}  # of the latest step

    def add(self, row: Mapping[str, Any], step: int) -> None:
        self._keys.setdefault(step, set()).update(row)

    def new(self, row: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        """What of a row has not been logged."""
        if step != self._step:
            self._step, self._numbers = step, {}
        seen = self._keys.get(step, set()) if step is not None else set()
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        again = {key for key, value in numbers.items() if self._numbers.get(key) == value}
        self._numbers |= numbers
        new = {key: value for key, value in row.items() if key == "epoch" or key not in seen | again}
        return new if new.keys() - {"epoch"} else {}


class _ContinuedWriter(ExperimentWriter):
    """Appends to a file that exists, and never has less in it than was there."""

    def __init__(self, log_dir: str, first_step: int) -> None:
        super().__init__(log_dir)
        self.seen = _Seen()
        if rows := _read_rows(Path(self.metrics_file_path)):
            rows = [row for row in rows if int(row["step"]) < first_step]
            self.metrics_keys = sorted({key for row in rows for key in row} | {"step"})
            for row in rows:
                self.seen.add(row, int(row["step"]))
            self._replace(rows)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Records what of a row is new."""
        if new := self.seen.new(metrics_dict, step):
            super().log_metrics(new, step)

    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes the file of a run that goes on."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        self.metrics_keys = fieldnames
        self._replace(rows)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        with whole_file(Path(self.metrics_file_path)) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics file, without empty values."""
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    if whole and not whole[-1].endswith("\n"):  # broken off while it was being written
        del whole[-1]
    rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(whole)]
    return [row for row in rows if "step" in row]


def wandb_history(file: Path) -> Iterator[dict[str, Any]]:
    """The rows that a .wandb file holds; a picture or table is a dict under its key. The end may be broken off."""
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *keys, last = item.nested_key or [item.key]
                place = row
                for key in keys:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            yield row


def wandb_records(file: Path) -> Iterator[Record]:
    """All that a .wandb file holds, a LevelDB log: chunks (CRC, length, kind, bytes) in blocks of 32 KiB."""
    content, position, record = file.read_bytes(), 7, b""
    while position + 7 < len(content):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(content):
            return
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def fill_in_logger(logger: Any, run: Path, experiment: str) -> bool:
    """Fills in the settings of a logger that depend on the run: its directory, its name, whether it reaches W&B.

    Args:
        logger: Config of the logger, as class path and arguments; anything else stays as it is.
        run: Directory of the run.
        experiment: Name of the experiment.

    Returns:
        Whether a run that should be online was set to offline.
    """
    if not isinstance(logger, Namespace):
        return False
    options = logger.init_args
    options.save_dir = str(run)
    if logger.class_path.endswith("CSVLogger"):
        options.name, options.version = "", ""
    if not logger.class_path.endswith("WandbLogger"):
        return False
    options.id, options.name = run.name, f"{experiment} {run.name}"  # the id makes a resumed run the same one
    chosen = options.offline or "WANDB_MODE" in os.environ or "mode" in logger.get("dict_kwargs", {})
    if chosen or getattr(rank_zero_only, "rank", 0) != 0 or not (reason := wandb_offline_reason()):
        return False
    logger.dict_kwargs = {**logger.get("dict_kwargs", {}), "mode": "offline"}
    directory = shlex.quote(str(run / "wandb"))
    rank_zero_info(
        f"W&B: {reason}, so this run is logged offline. Look at it with "
        f"`wandb leet {directory}`, send it with `wandb sync {directory}/offline-run-*`."
    )
    return True
