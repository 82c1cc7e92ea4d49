"""Compares runs on the same examples: those that agree in a setting are repetitions with other seeds.

A comparison has the form of an evaluation (see `score_tables`), with a group of runs in place of each way. Its scores
are means over the runs of a group, and have `runs`, the score of each, and `seeds`, Student's interval of their mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml

from thinned.evaluation.prediction_store import Columns
from thinned.evaluation.provenance import differences, stored_provenance
from thinned.evaluation.report import as_json, scored
from thinned.evaluation.rows import blocks_of
from thinned.uncertainty.intervals import Interval, score_intervals, t_interval
from thinned.uncertainty.scores import SCORES, Score

# What decides which examples are evaluated, if a checkpoint holds their split; else all settings do, but for these.
DECIDING = {"predict_split", "distortion", "examples", "class_names", "split"}
INDIFFERENT = {"seed", "path", "cache_dir"}


@dataclass(frozen=True)
class EvaluatedRun:
    """Holds the rows of a run, and what decided them."""

    path: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    rows: Columns

    @classmethod
    def read(cls, path: Path) -> "EvaluatedRun":
        """Opens a run's folder; ValueError if it has no predictions with targets."""
        file, expected = path / "predictions.parquet", "Expected runs with predictions of known targets, but got"
        try:
            provenance = stored_provenance(file)
            if not provenance or "target" not in (rows := Columns(file)):
                raise ValueError(f"{expected} none in {path}: see scripts/evaluate.py")
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        except (pa.ArrowException, OSError, UnicodeError, yaml.YAMLError) as error:
            raise ValueError(f"{expected} damaged or foreign files in {path} ({str(error).splitlines()[0]})") from None
        return cls(path, config, provenance, rows)

    def setting(self, key: str) -> Any:
        """Returns a setting by its name on the command line, such as `model.net.dropout.mlp`."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get("init_args", value) if isinstance(value, dict) and part not in value else value
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"Expected --by with a key of {self.path / 'config.yaml'}, but got {key}")
            value = value[part]
        return value

    def check_same_examples(self, first: "EvaluatedRun") -> None:
        """Raises a ValueError if its rows are of other examples than another run's, or of another version."""

        def facts(run: EvaluatedRun) -> dict[str, Any]:
            data = run.provenance.get("data", {})
            decide = DECIDING if data.get("split") else data.keys() - INDIFFERENT
            data = {key: data[key] for key in sorted(decide & data.keys())}
            version = run.provenance.get("versions", {}).get("thinned")
            return {"row_format": run.provenance.get("row_format"), "version": version, "data": data}

        changed = [change.partition(" = ")[0] for change in differences(facts(self), facts(first))]
        if not changed:
            changed = [name for name in ("index", "target") if not torch.equal(self.rows[name], first.rows[name])]
        if changed:
            got = f"another {', '.join(changed)} in {self.path} than in {first.path}"
            raise ValueError(f"Expected runs on the same examples, but got {got}")


def compared(paths: Sequence[Path], by: str | None) -> dict[str, dict[str, Any]]:
    """Returns a comparison for each way that all runs have predicted in; ValueError if they cannot be compared.

    The runs in `paths` are grouped by a setting, named as on the command line, or each of them is compared with the
    first.
    """
    runs: dict[tuple[str, str], EvaluatedRun] = {}
    names = [path.absolute().name for path in paths]
    for path, name in zip(paths, names, strict=True):
        run = EvaluatedRun.read(path)
        group = name if names.count(name) == 1 else str(path)
        group = group if by is None else f"{by.rpartition('.')[2]} = {run.setting(by)}"
        checkpoint = run.provenance["checkpoint"] or run.provenance["weights"]
        same = next((r for (c, g), r in runs.items() if c == checkpoint and (by is None or g == group)), None)
        if same is not None:  # a training and an evaluation of it are one
            print(f"Left out, with the checkpoint of {same.path}: {path}")
            continue
        runs[checkpoint, group] = run
    first, *others = runs.values()
    for run in others:
        run.check_same_examples(first)
    groups: dict[str, list[EvaluatedRun]] = {}
    for (_, group), run in runs.items():
        groups.setdefault(group, []).append(run)
    if len(groups) < 2:
        raise ValueError(f"Expected runs of at least two groups to compare, but got {list(groups)}")
    ways = [way for way in first.provenance["ways"] if all(way in run.provenance["ways"] for run in others)]
    return {way: _comparison(way, groups, first) for way in ways}


def _comparison(way: str, groups: Mapping[str, Sequence[EvaluatedRun]], first: EvaluatedRun) -> dict[str, Any]:
    rows = {group: [Columns(run.rows, way) for run in runs] for group, runs in groups.items()}
    baseline = next(iter(groups))
    intervals, differences = score_intervals(rows, baseline, blocks_of(first.rows))
    ways = {
        group: {
            "label": group,
            "details": f"{len(runs)} run{'s' * (len(runs) > 1)}",
            "settings": {"runs": [str(run.path) for run in runs]},
            "recall": {},
            "coverage": {},
            "scores": {
                key: score | {"seeds": as_json(_of_seeds(intervals[group][key], SCORES[key]))}
                for key, score in scored(intervals[group], differences.get(group, {})).items()
            },
        }
        for group, runs in groups.items()
    }
    split, n = first.provenance["data"]["predict_split"], len(first.rows["target"])
    return {"split": split, "n": n, "baseline": baseline, "ways": ways}


def _of_seeds(of_examples: Interval, score: Score) -> Interval:
    """Returns Student's interval over the runs of a score, within the values that the score can have."""
    interval = t_interval(of_examples.runs or [of_examples.value])
    if math.isnan(interval.low):
        return interval
    most = 1.0 if score.kind in ("proportion", "calibration") else score.most
    return replace(interval, low=max(0.0, interval.low), high=min(most, interval.high))
