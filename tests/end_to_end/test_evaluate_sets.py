"""scripts/evaluate.py --sets: shifted and foreign sets after the test, resumed, left out, and on two processes."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from html_tables import Page
from sklearn.metrics import roc_auc_score
from torch import Tensor

from thinned.uncertainty.detection import DETECTION
from thinned.uncertainty.scores import SCORES

Script = Callable[..., Any]
SMALL = ("--trainer.accelerator", "cpu", "--mc_dropout.num_samples", 4, "--trainer.logger", "false")
SETS = {
    "rotation": {"distortion": "rotation", "severities": [0, 45]},
    "noise": {"distortion": "noise", "severities": [0.3]},
    "letters": {"path": "letters"},
}


def columns(folder: Path, file: str = "predictions") -> dict[str, Tensor]:
    table = pq.read_table(folder / f"{file}.parquet")
    return {name: torch.tensor(table[name].to_pylist()) for name in table.column_names if name != "source"}


def evaluation_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def sets_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "sets.yaml"
    path.write_text(yaml.safe_dump(SETS, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def evaluated(trained: Any, sets_yaml: Path, run_script_in: Script, tmp_path_factory: pytest.TempPathFactory) -> Any:
    arguments = ("--ckpt_path", trained.run, "--sets", sets_yaml, *SMALL)
    return run_script_in(tmp_path_factory.mktemp("evaluated"), "evaluate", *arguments, pictures=True)


def test_sets_are_drawn(evaluated: Any) -> None:
    """Shifted ones by severity, and foreign ones beside what is right and wrong in the test."""
    svg = {path.stem: path.read_text() for path in evaluated.run.glob("figures/*.svg")}
    assert "rotation (degrees)" in svg["severity"]
    assert "letters, n = " in svg["entropy"]
    assert "letters, n = " in svg["mutual_information"]


def test_scores_of_each_set_stand_beside_those_of_the_test(evaluated: Any) -> None:
    evaluation = evaluation_of(evaluated.run)
    sets = evaluation["sets"]
    assert list(sets) == ["rotation_0", "rotation_45", "noise_0.3", "letters"]
    assert sets["rotation_0"]["ways"] == evaluation["ways"]  # as fitted for the test: nothing is fitted again
    nlls = {name: sets[name]["ways"]["mc_dropout"]["scores"]["nll"] for name in list(sets)[:3]}
    for name, nll in nlls.items():
        rows = columns(evaluated.run / "sets" / name)
        assert nll["value"] == pytest.approx(rows["mc_dropout_nll"].double().mean().item())
        assert nll["low"] < nll["value"] < nll["high"]
        difference = (rows["mc_dropout_nll"] - rows["deterministic_nll"]).double().mean().item()
        assert nll["difference"]["value"] == pytest.approx(difference)
    assert nlls["rotation_0"]["value"] < nlls["rotation_45"]["value"]
    with (evaluated.run / "evaluation.csv").open() as file:
        rows_of_sets = [row["set"] for row in csv.DictReader(file)]
    assert list(dict.fromkeys(rows_of_sets)) == ["test", *sets]
    assert yaml.safe_load((evaluated.run / "config.yaml").read_text())["sets"] == SETS
    assert "rotation (degrees)" in evaluated.out
    assert "letters: mutual information" in evaluated.out


def test_report_has_every_score_in_a_cell_with_its_interval(evaluated: Any) -> None:
    """And the same in the row of its label, in the column of its way, of each set."""
    text = (evaluated.run / "report.html").read_text(encoding="utf-8")
    tables, found = Page(text).tables, evaluation_of(evaluated.run)
    number = 0
    for name, of_set in {"test": found, **found["sets"]}.items():
        rows = {row[0]: row[1:] for row in tables["all-scores", name]}
        for column, way in enumerate(of_set["ways"].values()):
            for key, score in way["scores"].items():
                cell = rows[(SCORES | DETECTION)[key].label][column]
                for of in filter(None, (score, score.get("difference"))):
                    said = [f"{of[part]:z.4f}".replace("-", "−") for part in ("value", "low", "high") if of["low"]]
                    assert all(part in cell for part in said), (name, key, cell)
                number += 1
    assert number > 200
    assert "  report.html\n" in evaluated.out
    assert Page(text).tables["further-sets", "rotation (degrees)"][2][0] == "test"


@pytest.mark.parametrize(("fault", "said"), [
    ("folder", "No report.html: Expected to write "),
    ("jinja2", "No report.html: Expected the package jinja2 for report.html: pip install 'thinned[report]'"),
])  # fmt: skip
def test_report_that_cannot_be_written_leaves_the_rest(
    fault: str, said: str, trained: Any, run_script: Script, tmp_path: Path
) -> None:
    run = tmp_path / "runs/mlp_digits/first-evaluate"
    with mock.patch.dict("sys.modules", {"jinja2": None} if fault == "jinja2" else {}):
        if fault == "folder":
            (run / "report.html").mkdir(parents=True)
            (run / "config.yaml").touch()
        resume = ("--resume", run) if fault == "folder" else ("--run_id", "first")
        done = run_script("evaluate", "--ckpt_path", trained.run, *SMALL, *resume)
    assert done.status == 0, done.err
    assert [line for line in done.out.splitlines() if line.startswith(said)]
    assert "deterministic" in evaluation_of(run)["ways"]
    assert f"Run: {run}" in done.out


def test_foreign_examples_are_told_from_the_test(evaluated: Any) -> None:
    letters = evaluation_of(evaluated.run)["sets"]["letters"]
    assert letters["n"] == 1000
    test, foreign = columns(evaluated.run), columns(evaluated.run / "sets/letters")
    assert "target" not in foreign
    for way, scored in letters["ways"].items():
        scores = scored["scores"]
        assert ("foreign_auroc_mutual_information" in scores) == (way == "mc_dropout")
        assert "nll" not in scores
        for measure, sign in (("confidence", -1), ("predictive_entropy", 1)):
            both = torch.cat([part[f"{way}_{measure}"] for part in (test, foreign)]) * sign
            is_foreign = torch.arange(1365) >= 365
            failed = torch.cat([~test[f"{way}_correct"], torch.ones(1000, dtype=torch.bool)])
            expected = roc_auc_score(is_foreign, both), roc_auc_score(failed, both)
            for name, value in zip(("foreign_auroc", "scod_auroc"), expected, strict=True):
                score = scores[f"{name}_{measure}"]
                assert score["value"] == pytest.approx(value, abs=1e-6)
                assert score["low"] < value < score["high"]
                assert ("difference" in score) == (way != "deterministic")


def test_what_is_there_is_not_predicted_again(
    trained: Any, sets_yaml: Path, evaluated: Any, run_script: Script, tmp_path: Path
) -> None:
    """Of an evaluation that was killed; with other settings, all is predicted."""
    before = evaluation_of(evaluated.run)
    run = shutil.copytree(evaluated.run, tmp_path / "runs/mlp_digits/killed-evaluate")
    files = {path.parent.name: path for path in run.glob("sets/*/predictions.parquet")}
    files["noise_0.3"].unlink()
    (run / "evaluation.json").unlink()
    times = {name: path.stat().st_mtime_ns for name, path in files.items() if path.exists()}
    arguments = ("evaluate", "--ckpt_path", trained.run, "--sets", sets_yaml, *SMALL, "--resume", run)
    assert run_script(*arguments).status == 0
    assert {name: path.stat().st_mtime_ns for name, path in files.items() if name in times} == times
    assert evaluation_of(run) == before
    assert run_script(*arguments, "--mc_dropout.seed", 1).status == 0
    assert all(path.stat().st_mtime_ns > times.get(name, 0) for name, path in files.items())


def test_interrupted_set_resumes(trained: Any, sets_yaml: Path, run_script: Script, tmp_path: Path) -> None:
    """The rows that it had written stay, and those that it lacked are added."""
    from thinned.evaluation.prediction_store import PredictionStore

    arguments = ("evaluate", "--ckpt_path", trained.run, "--sets", sets_yaml, *SMALL, "--data.eval_batch_size", 100)
    write, written = PredictionStore.write, []

    def stop_in_noise(store: Any, rows: Any, sequences: Any) -> None:
        if store.directory.name == "noise_0.3" and len(written) == 2:
            raise KeyboardInterrupt
        if store.directory.name == "noise_0.3":
            written.append(rows["index"].tolist())
        write(store, rows, sequences)

    with mock.patch.object(PredictionStore, "write", stop_in_noise):
        assert run_script(*arguments, "--run_id", "killed").status != 0
    run = tmp_path / "runs/mlp_digits/killed-evaluate"
    assert written == [[*range(100)], [*range(100, 200)]]
    rest: list[int] = []

    def count(store: Any, rows: Any, sequences: Any) -> None:
        if store.directory.name == "noise_0.3":
            rest.extend(rows["index"].tolist())
        write(store, rows, sequences)

    with mock.patch.object(PredictionStore, "write", count):
        assert run_script(*arguments, "--resume", run).status == 0
    assert rest == [*range(200, 365)]
    assert columns(run / "sets/noise_0.3")["index"].tolist() == [*range(365)]


@pytest.mark.parametrize(("sets", "said"), [
    ({"a": {"distortion": "rotatoin", "severities": [1]}}, "Expected data.distortion to be <kind>:<severity>"),
    ({"a": {"distortion": "rotation"}}, "Expected data.distortion to be <kind>:<severity>"),
    ({"a": {"distortion": "rotation", "severities": []}}, "Expected sets.a with a distortion and a list of its sever"),
    ({"a": {"distortion": "rotation", "severities": [200]}}, "a severity in [0, 180], but got 'rotation:200'"),
    ({"a": {"distorsion": "rotation:1"}}, "distorsion"),
    ({"a": {"eval_batch_size": 0}}, "eval_batch_size"),
    ({"a": 3}, "sets"),
])  # fmt: skip
def test_wrong_entry_is_refused_before_anything_is_predicted(
    sets: Any, said: str, trained: Any, run_script: Script
) -> None:
    done = run_script("evaluate", "--ckpt_path", trained.run, "--sets", json.dumps(sets), *SMALL)
    assert said in done.error


def test_missing_yaml_of_sets_gets_the_nearest_one(trained: Any, run_script: Script) -> None:
    wrong = "configs/evaluation/images_shifts.yaml"
    error = run_script("evaluate", "--ckpt_path", trained.run, "--sets", wrong).error
    nearest = "configs/evaluation/image_shifts.yaml"
    assert error == f"error: Expected --sets with the path of a yaml, but got {wrong} (did you mean {nearest}?)"


def test_set_that_cannot_be_predicted_is_left_out(
    trained: Any, hub_images: Path, run_script: Script, tmp_path: Path
) -> None:
    """Images of another shape, none at all; the other sets are evaluated, and the last line says what is missing."""
    sets = {"large": {"path": str(hub_images)}, "none": {"path": "nowhere"}, "spin": {"distortion": "rotation:45"}}
    done = run_script("evaluate", "--ckpt_path", trained.run, "--sets", json.dumps(sets), *SMALL)
    assert done.status == 1
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: Expected sets that this network can predict, but left out large: ")
    assert "none: Expected data.path to be " in last
    (run,) = tmp_path.glob("runs/mlp_digits/*-evaluate")
    found = evaluation_of(run)["sets"]
    assert "image shape" in found["large"]["left_out"]
    assert found["none"]["left_out"].startswith("Expected data.path to be ")
    assert "nll" in found["spin"]["ways"]["mc_dropout"]["scores"]
    assert "spin (degrees): accuracy" in done.out


def test_shifted_prediction_is_that_of_the_set(
    trained: Any, evaluated: Any, run_script: Script, tmp_path: Path
) -> None:
    """It is of other examples than the test, on which another checkpoint is not compared with it."""
    shifted = run_script("predict", "--ckpt_path", trained.run, *SMALL, "--data.distortion", "rotation:45")
    ours, theirs = columns(shifted.run), columns(evaluated.run / "sets/rotation_45")
    for name in ("deterministic_probs", "mc_dropout_probs"):
        torch.testing.assert_close(ours[name], theirs[name])
    content = torch.load(trained.run / "checkpoints/best.ckpt", weights_only=True)
    torch.save(content | {"epoch": 99}, tmp_path / "other.ckpt")
    plain = run_script("predict", "--ckpt_path", tmp_path / "other.ckpt", *SMALL)
    done = run_script("compare", shifted.run, plain.run)
    assert done.error.startswith("error: Expected runs on the same examples, but got another data.distortion in ")


@pytest.mark.slow
def test_two_processes_evaluate_sets_as_one_does(
    trained: Any, sets_yaml: Path, evaluated: Any, start_script: Script
) -> None:
    """Foreign data that cannot be read are left out by both."""
    sets = yaml.safe_load(sets_yaml.read_text()) | {"none": {"path": "nowhere"}}
    arguments = ("--ckpt_path", trained.run, "--sets", json.dumps(sets), *SMALL)
    two = start_script("scripts/evaluate.py", *arguments, "--trainer.devices", 2)
    assert two.status == 1
    assert "left out none: " in two.err
    (run,) = two.cwd.glob("runs/mlp_digits/*-evaluate")
    for name in ("rotation_45", "noise_0.3", "letters"):
        ours, theirs = (columns(folder / "sets" / name) for folder in (run, evaluated.run))
        assert ours["index"].tolist() == theirs["index"].tolist()
        for key in ("deterministic_probs", "mc_dropout_probs"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)
