"""scripts/evaluate.py and compare.py: what they compute is computed again from checkpoints and rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from wandb_file import newest, wandb_records

from thinned.data import ImageDataModule
from thinned.evaluation.batch import in_half
from thinned.tasks import ClassificationTask
from thinned.uncertainty import mc_predict
from thinned.uncertainty.scores import nll
from thinned.uncertainty.temperature import tempered

Script = Callable[..., Any]
WAYS = ["deterministic", "mc_dropout"]
SMALL = ("--trainer.accelerator", "cpu", "--mc_dropout.num_samples", 5)


@pytest.fixture(scope="module")
def other(trained: Any, with_other_weights: Script) -> Path:
    """A checkpoint of the same run with other weights."""
    return with_other_weights(trained.run / "checkpoints/best.ckpt", "net.")


@pytest.fixture(scope="module")
def evaluated(trained: Any, other: Path, run_script_in: Script, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_script_in(tmp_path_factory.mktemp("evaluated"), "evaluate", "--ckpt_path", trained.run, other, *SMALL)


def columns(run: Path) -> dict[str, Tensor]:
    table = pq.read_table(run / "predictions.parquet")
    return {name: torch.tensor(table[name].to_pylist()) for name in table.column_names if name != "source"}


def net_of(path: Path) -> torch.nn.Module:
    return ClassificationTask.load_from_checkpoint(path, map_location="cpu", weights_only=True).net.eval()


@torch.no_grad()
def test_rows_are_those_of_the_networks(trained: Any, other: Path, evaluated: Any) -> None:
    """Ensembles are averages over the networks of both checkpoints, and temperatures those of half of validation."""
    data = ImageDataModule()
    data.setup()
    nets = [net_of(path) for path in (trained.run / "checkpoints/best.ckpt", other)]
    ((x_val, y_val, _),) = data.val_dataloader()
    fit = in_half(x_val, "fit")
    ((x, y, _),) = data.test_dataloader()

    def predictions(inputs: Tensor) -> dict[str, Tensor]:
        deterministic = [net(inputs).softmax(-1) for net in nets]
        sampled = [mc_predict(net, inputs, num_samples=5, seed=0).mean for net in nets]
        return {
            "deterministic": deterministic[0], "mc_dropout": sampled[0],
            "deterministic_ensemble": sum(deterministic) / 2, "mc_dropout_ensemble": sum(sampled) / 2,
        }  # fmt: skip

    rows, of_val = columns(evaluated.run), predictions(x_val[fit])
    ways = json.loads((evaluated.run / "evaluation.json").read_text())["ways"]
    assert list(ways) == [*of_val, *(f"{name}_tempered" for name in of_val)]
    for name, probs in predictions(x).items():
        torch.testing.assert_close(rows[f"{name}_probs"], probs, rtol=1e-4, atol=1e-6)
        temperature = ways[f"{name}_tempered"]["settings"]["temperature"]
        expected = tempered(probs, temperature)
        torch.testing.assert_close(rows[f"{name}_tempered_probs"], expected, rtol=1e-3, atol=1e-6)
        assert ways[f"{name}_tempered"]["scores"]["nll"]["value"] == pytest.approx(
            nll(expected, y).mean().item(), rel=1e-3
        )

        def of_fit(t: float, name: str = name) -> float:
            return nll(tempered(of_val[name].double(), t), y_val[fit]).mean().item()

        assert of_fit(temperature) <= min(of_fit(0.99 * temperature), of_fit(1.01 * temperature), of_fit(1.0))
    assert "deterministic_ensemble_mutual_information_between" in rows


def test_prediction_sets_are_calibrated_for_each_way(evaluated: Any) -> None:
    """About 80 examples calibrate: a coverage of 365 below 0.8 has a probability below 1e-3 for each set."""
    evaluation = json.loads((evaluated.run / "evaluation.json").read_text())
    assert evaluation["coverage"] == 0.9
    rows = columns(evaluated.run)
    for name, way in evaluation["ways"].items():
        for kind in ("thr", "aps", "raps"):
            covered = rows[f"{name}_{kind}_covered"].double().mean().item()
            assert covered > 0.8
            assert way["scores"][f"{kind}_coverage"]["value"] == pytest.approx(covered)
            assert way["scores"][f"{kind}_size"]["value"] == pytest.approx(
                rows[f"{name}_{kind}_size"].double().mean().item()
            )
            assert sum(of_class["n"] for of_class in way["coverage"][kind].values()) == 365
    assert "Prediction sets for 90 % of targets" in evaluated.out


def test_wandb_has_a_run_of_its_own(trained: Any, evaluated: Any) -> None:
    """Linked to the training from which the first checkpoint comes; the other one lies in no run."""
    (record,) = [r.run for r in wandb_records(newest(evaluated.run)) if r.WhichOneof("record_type") == "run"]
    training = f"{trained.run.parent.name}.{trained.run.name}"
    assert (record.job_type, record.notes) == ("evaluate", f"evaluate {training}")
    assert record.run_id == f"mlp_digits.{evaluated.run.name}"
    assert {item.key: json.loads(item.value_json) for item in record.config.update}["trained"] == [training]


@pytest.mark.slow
def test_two_processes_evaluate_the_same(
    trained: Any, other: Path, evaluated: Any, start_script_in: Script, tmp_path: Path
) -> None:
    two = start_script_in(
        tmp_path, "scripts/evaluate.py", "--ckpt_path", trained.run, other, *SMALL, "--trainer.logger", "false",
        "--trainer.devices", 2,
    ).run  # fmt: skip
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (two, evaluated.run))
    assert _close(ours, theirs)


def _close(one: Any, other: Any) -> bool:
    """Compares JSON, in which numbers are equal up to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return one == pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(one, float) else one == other


@pytest.mark.parametrize(("change", "said"), [
    (lambda content: content["ImageDataModule"].update(class_names=list("abcdefghij")), "class_names"),
    (lambda content: content["ImageDataModule"]["split"].update(seed=1), None),
    (lambda content: content["ImageDataModule"]["split"]["digests"].update(test="0"), "split.digests.test"),
])  # fmt: skip
def test_checkpoints_of_other_data_make_no_ensemble(
    change: Callable[[Any], None], said: str | None, trained: Any, other: Path, run_script: Script, tmp_path: Path
) -> None:
    content = torch.load(other, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.ckpt")
    done = run_script("evaluate", "--ckpt_path", trained.run, tmp_path / "changed.ckpt", *SMALL)
    if said is None:
        assert done.status == 0
        return
    assert done.status == 1
    assert done.error.startswith("error: Expected checkpoints of the same data, split and names, but got another ")
    assert said in done.error
    assert not list(tmp_path.glob("runs/*/*"))


def test_checkpoint_given_twice_is_refused(trained: Any, run_script: Script) -> None:
    done = run_script("evaluate", "--ckpt_path", trained.run, trained.run / "checkpoints/best.ckpt")
    assert done.error.startswith("error: Expected --ckpt_path with each checkpoint once")


def test_prediction_takes_one_checkpoint(trained: Any, other: Path, run_script: Script) -> None:
    done = run_script("predict", "--ckpt_path", trained.run, other)
    assert done.error == "error: Expected --ckpt_path with one checkpoint, but got 2: scripts/evaluate.py takes several"


def test_more_coverage_than_validation_allows_is_refused(trained: Any, run_script: Script) -> None:
    done = run_script("evaluate", "--ckpt_path", trained.run, *SMALL, "--mc_dropout.coverage", 0.999)
    assert "Expected at least 999 calibration examples for coverage 0.999" in done.error
    assert "is possible" in done.error


def test_split_of_one_example_is_refused(trained: Any, run_script: Script) -> None:
    one = ("--data.eval_batch_size", 1, "--trainer.limit_predict_batches", 1, "--mc_dropout.coverage", 0.5)
    done = run_script("evaluate", "--ckpt_path", trained.run, *SMALL, *one)
    assert done.error.startswith("error: Expected at least two examples of split test")


def test_network_without_rates_is_evaluated_as_it_is(trained: Any, run_script: Script) -> None:
    """All rates are 0: Monte-Carlo dropout is the deterministic network, and is not told apart from it."""
    rates = ("--model.net.dropout.embedding", 0, "--model.net.dropout.mlp", 0)
    done = run_script("evaluate", "--ckpt_path", trained.run, *SMALL, *rates)
    scores = json.loads((done.run / "evaluation.json").read_text())["ways"]["mc_dropout"]["scores"]
    difference = scores["nll"]["difference"]
    assert (difference["value"], difference["low"], difference["high"], difference["told_apart"]) == (0, 0, 0, False)


# Runs compared


def test_runs_are_compared_on_the_same_examples(trained: Any, evaluated: Any, other: Path, run_script: Script) -> None:
    """The evaluation of the trained network is left out, as it has the checkpoint of its training."""
    predicted = run_script("predict", "--ckpt_path", other, *SMALL)
    done = run_script("compare", trained.run, predicted.run, "--out", "comparison.json")
    comparison = json.loads((done.cwd / "comparison.json").read_text())
    assert list(comparison) == WAYS
    groups = comparison["deterministic"]["ways"]
    assert list(groups) == [trained.run.name, predicted.run.name]
    ours, theirs = columns(trained.run)["deterministic_nll"], columns(predicted.run)["deterministic_nll"]
    nlls = groups[predicted.run.name]["scores"]["nll"]
    assert nlls["value"] == pytest.approx(theirs.double().mean().item())
    assert nlls["difference"]["value"] == pytest.approx((theirs - ours).double().mean().item())
    assert "runs" not in nlls
    assert nlls["seeds"]["why"] == "there is one seed"


def test_runs_that_agree_in_a_setting_are_repetitions(
    trained: Any, other: Path, run_script: Script, tmp_path: Path
) -> None:
    runs = [run_script("predict", "--ckpt_path", other, *SMALL).run]
    for rate, run_id in ((0.1, "a"), (0.2, "b")):
        content = torch.load(other, weights_only=True)
        content["config"]["model"]["init_args"]["net"]["init_args"]["dropout"]["mlp"] = rate
        content["state_dict"]["net.stages.head.bias"] += 0.1 + rate
        torch.save(content, tmp_path / run_id)
        runs.append(run_script("predict", "--ckpt_path", tmp_path / run_id, *SMALL).run)
    done = run_script("compare", *runs, "--by", "model.net.dropout.embedding", "--out", "same.json")
    assert done.error.startswith("error: Expected runs of at least two groups to compare")
    done = run_script("compare", *runs, trained.run, "--by", "model.net.dropout.mlp", "--out", "by.json")
    groups = json.loads((done.cwd / "by.json").read_text())["deterministic"]["ways"]
    assert list(groups) == [f"mlp = {rate}" for rate in (0.3, 0.1, 0.2)]
    values = [columns(run)["deterministic_nll"].double().mean().item() for run in (runs[0], trained.run)]
    nlls = groups["mlp = 0.3"]["scores"]["nll"]
    assert nlls["runs"] == pytest.approx(values)
    assert nlls["value"] == nlls["seeds"]["value"] == pytest.approx(sum(values) / 2)
    assert nlls["low"] < nlls["value"] < nlls["high"]
    assert "fewer than five seeds" in done.out


def test_runs_on_other_examples_are_refused(trained: Any, other: Path, run_script: Script) -> None:
    """The split is the checkpoint's, whatever the options say; another split has other examples."""
    same = run_script("predict", "--ckpt_path", other, *SMALL, "--data.split_seed", 1)
    assert run_script("compare", trained.run, same.run).status == 0
    validation = run_script("predict", "--ckpt_path", other, *SMALL, "--data.predict_split", "val")
    done = run_script("compare", trained.run, validation.run)
    assert done.error.startswith("error: Expected runs on the same examples, but got another data.examples, ")
    assert "data.predict_split" in done.error


def test_folder_without_predictions_is_refused(trained: Any, run_script: Script, tmp_path: Path) -> None:
    done = run_script("compare", trained.run, tmp_path)
    assert done.error.startswith("error: Expected runs with predictions of known targets, but got none in ")


def test_setting_that_no_config_has_is_refused(trained: Any, evaluated: Any, run_script: Script) -> None:
    done = run_script("compare", trained.run, evaluated.run, "--by", "model.net.dropout.mpl")
    assert done.error.startswith("error: Expected --by with a key of ")
    assert done.error.endswith("but got model.net.dropout.mpl")


# While a network is trained


def test_uncertainty_of_validation_is_logged_while_training(
    trained: Any, trained_args: Any, run_script: Script
) -> None:
    """At the second and fourth validation; the weights are those of a training that does not look."""
    every = ("--mc_dropout.validate_every", 2, "--mc_dropout.num_samples", 5, "--trainer.max_epochs", 3)
    run = run_script("train", *trained_args, *every).run
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    at = {name: lines[0].index(name) for name in ("step", "val/mc_nll", "val/mc_ece", "val/mc_mutual_information")}
    logged = [{name: row[i] for name, i in at.items()} for row in lines[1:] if row[at["val/mc_nll"]]]
    assert [int(row["step"]) for row in logged] == [37]  # the end of the second epoch of 19 steps
    assert all(float(row[name]) > 0 for row in logged for name in at)
    one, two = (torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (run, trained.run))
    assert all(torch.equal(one[name], value) for name, value in two.items())


def test_logged_uncertainty_is_that_of_the_validation_split(
    trained: Any, run_script: Script, trained_args: Any
) -> None:
    every = ("--mc_dropout.validate_every", 1, "--mc_dropout.num_samples", 5, "--trainer.max_epochs", 1)
    run = run_script("train", *trained_args, *every).run
    data = ImageDataModule()
    data.setup()
    ((x, y, _),) = data.val_dataloader()
    prediction = mc_predict(net_of(run / "checkpoints/last.ckpt"), x, num_samples=5, seed=0)
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    values = {name: [row[i] for row in lines[1:] if row[i]] for i, name in enumerate(lines[0])}
    assert [float(v) for v in values["val/mc_nll"]] == [pytest.approx(nll(prediction.mean, y).mean().item(), rel=1e-4)]
    information = prediction.mutual_information.mean().item()
    assert [float(v) for v in values["val/mc_mutual_information"]] == [pytest.approx(information, rel=1e-3)]


@pytest.mark.parametrize("every", [0, -1])
def test_validations_are_counted_from_one(every: int, trained_args: Any, run_script: Script) -> None:
    done = run_script("train", *trained_args, "--mc_dropout.validate_every", every)
    assert "Expected mc_dropout.validate_every to be at least 1 or null" in done.error


# What was found by trying


def test_damaged_run_is_named(trained: Any, run_script: Script, tmp_path: Path) -> None:
    for name, damage in {
        "cut": lambda run: (run / "predictions.parquet").write_bytes((run / "predictions.parquet").read_bytes()[:-99]),
        "config": lambda run: (run / "config.yaml").write_text("a: [}"),
        "nothing": lambda run: (run / "config.yaml").unlink(),
    }.items():
        run = tmp_path / name
        run.mkdir()
        for file in ("predictions.parquet", "config.yaml"):
            (run / file).write_bytes((trained.run / file).read_bytes())
        damage(run)
        done = run_script("compare", trained.run, run)
        assert done.error.startswith(
            "error: Expected runs with predictions of known targets, but got damaged or foreign"
        )
        assert str(run) in done.error


def test_data_without_labels_cannot_be_learned_from(trained: Any, run_script: Script) -> None:
    error = run_script("evaluate", "--ckpt_path", trained.run, "--data.path", "letters").error
    assert "Expected a validation split with known targets to learn from, but got none" in error


def test_runs_of_one_name_are_two_groups(trained: Any, other: Path, run_script: Script, tmp_path: Path) -> None:
    """And the interval over seeds stays where an accuracy can be."""
    runs = []
    for experiment in ("one", "two"):
        content = torch.load(other, weights_only=True)
        content["state_dict"]["net.stages.head.bias"] += len(runs)
        torch.save(content, tmp_path / experiment)
        run_script(
            "predict", "--ckpt_path", tmp_path / experiment, *SMALL, "--experiment", experiment, "--run_id", "same"
        )
        runs.append(tmp_path / f"runs/{experiment}/same-predict")
    assert run_script("compare", *runs, "--out", "two.json").status == 0
    assert list(json.loads((tmp_path / "two.json").read_text())["deterministic"]["ways"]) == [str(run) for run in runs]
    run_script("compare", trained.run, *runs, "--by", "experiment", "--out", "by.json")
    groups = json.loads((tmp_path / "by.json").read_text(), parse_constant=pytest.fail)["deterministic"]["ways"]
    assert all(group["scores"]["accuracy"]["seeds"]["why"] == "there is one seed" for group in groups.values())


def test_without_examples_there_is_no_evaluation(trained: Any, run_script: Script) -> None:
    done = run_script("evaluate", "--ckpt_path", trained.run, *SMALL, "--trainer.limit_predict_batches", 0)
    assert "error: Expected " in done.err.splitlines()[-1]


def test_split_that_is_learned_from_is_named(trained: Any, run_script: Script) -> None:
    done = run_script("evaluate", "--ckpt_path", trained.run, *SMALL, "--data.predict_split", "val")
    assert "better than they are on the split they are learned from" in done.err
