"""Records each step once, however often the run was killed and resumed."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from thinned.files import whole_file

GLOBAL_STEP = "trainer/global_step"  # as Lightning's logger calls the step
BEST = {"fit/nll": "min", "val/nll": "min", "val/mc_nll": "min", "fit/accuracy": "max", "val/accuracy": "max"}


class ResumableLogger:
    """Writes `metrics.csv`, and has to know from which step a run resumes."""

    _first_step: int | None = None  # None for a new run
    has_curves = True  # False for the numbers of a test or a prediction: one each

    def resume_from(self, step: int) -> None:
        """Keeps the rows of the steps before this one."""
        self._first_step = step


class CSVLogger(loggers.CSVLogger, ResumableLogger):
    """Logs as Lightning's `CSVLogger` does, but keeps the rows of its file when the run resumes."""

    _experiment: "_MetricsWriter | None"

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir, self._first_step or 0)
        return self._experiment


class WandbLogger(loggers.WandbLogger, ResumableLogger):
    """Logs to W&B, and to `metrics.csv`, since W&B loses rows if the process is killed.

    A run that resumes first logs the rows of `metrics.csv` that W&B lacks. Offline, each process writes a W&B file of
    its own with all rows, so the newest file holds the whole run, and syncing all is safe. Online, the server tells how
    many rows it has, and these are not logged again. The numbers and tables of a test or a prediction are in
    the summary alone: a chart of one point shows nothing.
    """

    _writer: "_MetricsWriter | None" = None

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]  # as a config is one
        """Logs the parameters that the first record of the run lacks."""
        super().log_hyperparams({k: v for k, v in params.items() if self.experiment.config.get(k) != v})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._writer is None:
            self._writer = self._begin()
        if new := self._writer.add(metrics, step):
            self._writer.save()
            self._log(new, step)

    @rank_zero_only
    def log_image(self, *args: Any, **options: Any) -> None:
        import matplotlib.pyplot  # noqa: F401  # W&B takes it for imported

        super().log_image(*args, **options)

    @rank_zero_only
    def log_table(self, key: str, *args: Any, **options: Any) -> None:
        """Logs a table; if the server fails, the run continues without it."""
        try:
            super().log_table(key, *args, **options)
        except Exception as error:  # a server can fail in many ways
            rank_zero_info(f"W&B: {' '.join(str(error).split())}; the run continues without the table {key}.")

    def _log(self, row: Mapping[str, Any], step: int | None) -> None:
        if not self.has_curves:
            once = {key: value for key, value in row.items() if isinstance(value, int | float | wandb.Table)}
            self.experiment.summary.update(once)
            row = {key: value for key, value in row.items() if key not in once}
        if row and (step, frozenset(row)) not in self._there:
            super().log_metrics(row, step)

    def _begin(self) -> "_MetricsWriter":
        directory = self.save_dir or "."
        before = _read_rows(Path(directory, ExperimentWriter.NAME_METRICS_FILE))
        writer = _MetricsWriter(directory, self._first_step or 0)
        for key in ("epoch", GLOBAL_STEP):
            self.experiment.define_metric(key, hidden=True)
        for key, best in BEST.items():
            self.experiment.define_metric(key, step_metric=GLOBAL_STEP, step_sync=True, summary=best)
        self._there: set[tuple[int | None, frozenset[str]]] = set()  # steps and keys of rows
        if self._first_step is not None:
            there = before[: self.experiment.step]  # none if W&B is offline
            self._there = {(int(row["step"]), frozenset(row) - {"step"}) for row in there}
            for row in _read_rows(writer.path):
                self._log({key: float(value) for key, value in row.items() if key != "step"}, int(row["step"]))
        return writer


class _MetricsWriter(ExperimentWriter):
    """Appends to `metrics.csv`; a crash loses only rows that will be computed again."""

    def __init__(self, log_dir: str, first_step: int) -> None:
        # Not Lightning's constructor, which deletes the file of a run that resumes.
        self.log_dir, self.hparams, self.metrics, self.metrics_keys = log_dir, {}, [], []
        self.path = Path(log_dir, self.NAME_METRICS_FILE)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = _read_rows(self.path)
        kept = [row for row in before if int(row["step"]) < first_step]
        if before:
            self._rewrite(kept)
        # A run that resumes may log the step before it again.
        self._step: int | None = first_step - 1
        self._earlier = {key for row in kept if int(row["step"]) == self._step for key in row}
        self._numbers: dict[str, str] = {}  # of the latest step, as text, since NaN equals NaN there

    def add(self, row: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        """Records a row and returns it, both without the numbers that this step has already.

        Lightning logs the learning rate of each batch whose gradients are accumulated, and `Checkpoints` logs a row
        before Lightning does. The epoch is in every row.
        """
        if step != self._step:
            self._step, self._earlier, self._numbers = step, set(), {}
        numbers = {key: str(value) for key, value in row.items() if isinstance(value, int | float)}
        seen = {key for key, value in numbers.items() if key in self._earlier or self._numbers.get(key) == value}
        self._numbers |= numbers
        new = {key: value for key, value in row.items() if key == "epoch" or key not in seen}
        if not new.keys() - {"epoch"}:
            return {}
        if recorded := {key: value for key, value in new.items() if key in numbers}:
            super().log_metrics(recorded, step)
        return new

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        self.add(metrics_dict, step)

    def save(self) -> None:
        """Appends the recorded rows; if there is a new column, it writes the whole file again."""
        if not self.metrics:
            return
        if not self.path.exists() or any(row.keys() - set(self.metrics_keys) for row in self.metrics):
            self._rewrite([*_read_rows(self.path), *self.metrics])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        self.metrics = []

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.metrics_keys = sorted({key for row in rows for key in row} | {"step"})
        with whole_file(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the complete rows of a metrics file, without empty values."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one may be cut off
    rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(whole)]
    return [row for row in rows if "step" in row]
