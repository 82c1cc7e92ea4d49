"""What a run leaves behind: its directory, the scores in it, what is printed, and a config that can be used again."""

import csv
import json
import re
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from thinned.evaluation.figures import CAPTIONS
from thinned.uncertainty import classification_scores
from thinned.uncertainty.scores import SCORES

OTHERS = {"position", "bytes", *(f"{kind}_{of}" for kind in ("thr", "aps", "raps") for of in ("covered", "size"))}
SCORE_NAMES = {name for name, score in SCORES.items() if not OTHERS & score.needs}  # not of tokens, not of sets
SCORES_OF_RUN = {"evaluation.json", "evaluation.csv", "metrics.json"}
PICTURES = {f"figures/{name}.{kind}" for name in CAPTIONS.keys() - {"severity"} for kind in ("png", "svg")}


def test_files_of_a_run(trained: Any) -> None:
    run = trained.run
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "wandb" not in path.parts}
    checkpoints = {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    written = {"config.yaml", "metrics.csv", "predictions.parquet", "report.html"}
    assert files == written | SCORES_OF_RUN | checkpoints | PICTURES
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"checkpoints", "figures", "wandb"}
    assert [path.name for path in run.parents[2].iterdir()] == ["runs"]  # nothing beside it


def test_pictures_show_something(trained: Any) -> None:
    for name in (name for name in PICTURES if name.endswith("png")):
        colours = Image.open(trained.run / name).convert("RGB").getcolors(maxcolors=10**6)
        assert len(colours) > 20, name


def test_metrics_have_exactly_these_keys(trained: Any) -> None:
    metrics = json.loads((trained.run / "metrics.json").read_text())
    assert metrics.keys() == {"deterministic", "mc_dropout"}
    assert metrics["deterministic"].keys() == SCORE_NAMES | {"recall"}
    assert metrics["mc_dropout"].keys() == SCORE_NAMES | {"recall", "num_samples", "masks", "seed", "sites", "scale"}
    assert (metrics["mc_dropout"]["num_samples"], metrics["mc_dropout"]["masks"]) == (50, "shared")
    assert metrics["mc_dropout"]["accuracy"] > 0.9


def test_metrics_are_those_of_the_predictions(trained: Any) -> None:
    rows = pq.read_table(trained.run / "predictions.parquet")
    assert rows["index"].to_pylist() == list(range(365))
    probs, target = torch.tensor(rows["mc_dropout_probs"].to_pylist()), torch.tensor(rows["target"].to_pylist())
    written = json.loads((trained.run / "metrics.json").read_text())["mc_dropout"]
    expected = classification_scores(probs, target)
    assert expected == pytest.approx({key: written[key] for key in expected}, abs=1e-6)
    assert (probs.argmax(-1) == torch.tensor(rows["mc_dropout_prediction"].to_pylist())).all()


def test_printed_table_holds_the_headline_scores_with_intervals(trained: Any) -> None:
    ways = json.loads((trained.run / "evaluation.json").read_text())["ways"]
    lines = trained.out.splitlines()
    header = next(line for line in lines if "deterministic" in line)
    assert header.split() == ["deterministic", "S", "=", "50,", "shared", "masks"]
    headline = [key for key, score in SCORES.items() if score.headline and key in SCORE_NAMES]
    assert headline == ["accuracy", "nll", "brier", "ece", "auroc_error", "aurc"]
    for key in headline:
        (line,) = [i for i, line in enumerate(lines) if line.startswith(f" {SCORES[key].label} ")]
        printed = [float(number) for number in re.findall(r"-?\d+\.\d{4}", lines[line] + lines[line + 1])]
        of_ways = [way["scores"][key] for way in ways.values()]
        expected = [of[bound] for of in (*of_ways, of_ways[1]["difference"]) for bound in ("value", "low", "high")]
        assert printed == pytest.approx(expected, abs=5.1e-5), key
    assert "the data cannot tell" in trained.out[trained.out.index("MC dropout against deterministic: ") :]


def test_evaluation_holds_each_score_with_its_interval(trained: Any) -> None:
    evaluation = json.loads((trained.run / "evaluation.json").read_text())
    metrics = json.loads((trained.run / "metrics.json").read_text())
    assert (evaluation["split"], evaluation["n"], evaluation["baseline"]) == ("test", 365, "deterministic")
    for name, way in evaluation["ways"].items():
        assert way["scores"].keys() == SCORE_NAMES
        for key, score in way["scores"].items():
            assert (score["value"], score["n"]) == (metrics[name][key], 365)
            assert score["low"] is None or score["low"] <= score["high"]
            assert ("difference" in score) == (name != "deterministic" and score["low"] is not None)
        assert sum(recall["n"] for recall in way["recall"].values()) == 365
        assert all(recall["low"] < recall["high"] for recall in way["recall"].values())
    with (trained.run / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["way"], row["score"]) for row in rows} == {(w, s) for w in evaluation["ways"] for s in SCORE_NAMES}
    for row in rows:
        score = evaluation["ways"][row["way"]]["scores"][row["score"]]
        assert row["value"] == ("" if score["value"] is None else str(score["value"]))


def test_printed_files_are_those_of_the_run(trained: Any) -> None:
    lines = trained.out.splitlines()
    start = lines.index(f"Run: {trained.run}") + 1
    printed = {line.strip() for line in lines[start:] if line.startswith("  ")}
    files = {path.name for path in trained.run.iterdir() if path.is_file()}
    figures = len([*trained.run.glob("figures/*")])
    assert printed == files | {"checkpoints/ (2 files)", f"figures/ ({figures} files)"}


def test_config_of_a_run_gives_an_equal_run(trained: Any, run_script: Callable[..., Any]) -> None:
    again = run_script("train", "--config", trained.run / "config.yaml").run
    assert again != trained.run
    assert (again / "metrics.json").read_bytes() == (trained.run / "metrics.json").read_bytes()
    tables = [pq.read_table(run / "predictions.parquet") for run in (trained.run, again)]
    assert tables[0].equals(tables[1])
    one, other = (json.loads(table.schema.metadata[b"thinned"]) for table in tables)
    assert one.pop("checkpoint") != other.pop("checkpoint")  # which holds the path of its run
    assert one == other
    first, second = (yaml.safe_load((run / "config.yaml").read_text()) for run in (trained.run, again))
    for key in ("seed_everything", "model", "data", "mc_dropout"):
        assert first[key] == second[key]


def test_config_does_not_remember_that_there_was_no_key(trained: Any) -> None:
    logger = yaml.safe_load((trained.run / "config.yaml").read_text())["trainer"]["logger"]
    assert (logger.get("dict_kwargs") or {}).get("mode") != "offline"
