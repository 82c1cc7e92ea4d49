"""Text from end to end: a GPT takes its sizes from the data, and its checkpoint alone predicts any text."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from wandb_file import wandb_history, wandb_summary

from thinned.evaluation.prediction_store import Columns
from thinned.uncertainty.scores import SCORES, scores

Script = Callable[..., Any]

CONFIG = Path(__file__).parents[2] / "configs/gpt_pydocs.yaml"
CONTEXT = 32


def read(run: Path, name: str = "predictions") -> dict[str, torch.Tensor]:
    table = pq.read_table(run / f"{name}.parquet")
    return {column: torch.tensor(table[column].to_pylist()) for column in table.column_names}


def net_of(run: Path) -> list[dict[str, Any]]:
    """The arguments of the net in each of the places where a run keeps them."""
    kept = [yaml.safe_load((run / "config.yaml").read_text())]
    kept += [torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["config"] for name in ("best", "last")]
    return [config["model"]["init_args"]["net"]["init_args"] for config in kept]


def spelled(targets: torch.Tensor, text: str) -> str:
    """Targets as text, by the characters of a text in the order of Unicode."""
    vocabulary = sorted(set(text))
    return "".join(vocabulary[target] for target in targets.tolist())


@pytest.fixture
def checkpoint(trained_text: Any) -> Path:
    return trained_text.run / "checkpoints/best.ckpt"


def test_sizes_left_to_the_data_are_kept_with_the_run(trained_text: Any, text_file: Path) -> None:
    asked = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["net"]["init_args"]
    assert (asked["vocab_size"], asked["context_length"]) == (None, None)
    for net in net_of(trained_text.run):
        assert net["vocab_size"] == len(set(text_file.read_text()))
        assert net["context_length"] == CONTEXT
    weights = torch.load(trained_text.run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert weights["net.position_embedding.weight"].shape == (CONTEXT, 16)


def test_given_sizes_are_kept(text_file: Path, small_gpt: Any, run_script: Script) -> None:
    given = ("--model.net.vocab_size", 50, "--model.net.context_length", 40)
    few = ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1)
    quiet = ("--trainer.callbacks=null", "--trainer.logger=false", "--trainer.val_check_interval", 1)
    run = run_script(
        "train", "--config", CONFIG, *small_gpt, "--data.path", text_file, *given, *few, *quiet
    ).run  # fmt: skip
    assert [(net["vocab_size"], net["context_length"]) for net in net_of(run)] == [(50, 40)] * 3


def test_each_token_of_the_test_is_a_row(trained_text: Any, text_file: Path) -> None:
    """The test is the last tenth of the text, of which all but the first character are targets."""
    text = text_file.read_text()
    test = text[int(0.9 * len(text)) :]
    rows, sequences = read(trained_text.run), read(trained_text.run, "sequences")
    assert rows["index"].tolist() == list(range(len(test) - 1))
    assert spelled(rows["target"], text) == test[1:]
    assert rows["bytes"].tolist() == [1] * (len(test) - 1)
    assert sequences["index"].tolist() == list(range(-(-(len(test) - 1) // CONTEXT)))
    assert sequences["tokens"].sum() == len(test) - 1


OF_TOKENS = {"target", "correct", "confidence", "nll", "predictive_entropy", "rank", "position", "bytes"}


def test_metrics_are_those_of_the_rows(trained_text: Any) -> None:
    metrics, rows = json.loads((trained_text.run / "metrics.json").read_text()), read(trained_text.run)
    for way in ("deterministic", "mc_dropout"):
        expected = scores(Columns(rows, way))
        assert expected.keys() == {name for name, score in SCORES.items() if score.needs <= OF_TOKENS}
        assert {key: metrics[way][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert (metrics["mc_dropout"]["num_samples"], metrics["mc_dropout"]["masks"]) == (4, "shared")


def test_predictions_are_those_of_the_run(trained_text: Any, checkpoint: Path, run_script: Script) -> None:
    predicted = run_script("predict", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")
    run = predicted.run
    for name in ("predictions.parquet", "sequences.parquet", "metrics.json"):
        assert (run / name).read_bytes() == (trained_text.run / name).read_bytes()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_nothing(batch_size: int, trained_text: Any, checkpoint: Path, run_script: Script) -> None:
    run = run_script("predict", "--ckpt_path", checkpoint, "--data.eval_batch_size", batch_size).run
    for name in ("predictions", "sequences"):
        expected = read(trained_text.run, name)
        got = read(run, name)
        assert got.keys() == expected.keys()
        for column, values in expected.items():
            torch.testing.assert_close(got[column], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", ["test", "val"])
def test_all_of_another_text_is_read_with_the_vocabulary_of_the_checkpoint(
    split: str, checkpoint: Path, text_file: Path, run_script: Script, tmp_path: Path
) -> None:
    """The other text has fewer characters, which by themselves would have other numbers."""
    other = "some more words of mine" * 40
    assert set(other) < set(text_file.read_text())
    (tmp_path / "other.txt").write_text(other)
    finished = run_script(
        "predict", "--ckpt_path", checkpoint, "--data.path", tmp_path / "other.txt", "--data.predict_split", split
    )
    assert spelled(read(finished.run)["target"], text_file.read_text()) == other[1:]
    assert (finished.run / "sequences.parquet").exists()
    assert (finished.run / "metrics.json").exists()
    assert finished.err.count("not the text of the checkpoint, so all of it is predicted") == 1


def test_nothing_is_chosen_on_the_text_that_is_predicted(
    checkpoint: Path, run_script: Script, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "other.txt").write_text("some more words of mine" * 40)
    options = ("--data.path", tmp_path / "other.txt", "--data.cache_dir", tmp_path_factory.mktemp("cache"))
    error = run_script("predict", "--ckpt_path", checkpoint, *options, "--mc_dropout.sites", "auto").error
    assert "Expected a validation split to learn from, but got another text in data.path" in error


def test_what_was_trained_on_is_not_tested_when_the_text_has_grown(
    trained_text: Any, checkpoint: Path, text_file: Path, run_script: Script, tmp_path: Path
) -> None:
    """Nor if other fractions are asked for. The rows are those of the run."""
    (tmp_path / "grown.txt").write_text(text_file.read_text() + "a lazy fox.\n" * 99)
    options = ("--data.path", tmp_path / "grown.txt", "--data.val_fraction", 0.3, "--data.test_fraction", 0.4)
    finished = run_script("predict", "--ckpt_path", checkpoint, *options, "--trainer.accelerator", "cpu")
    rows, expected = read(finished.run), read(trained_text.run)
    assert all(rows[column].equal(values) for column, values in expected.items())
    for said in (
        "Kept data.val_fraction 0.1 of the checkpoint, instead of 0.3",
        "Kept data.test_fraction 0.1 of the checkpoint, instead of 0.4",
        "data.path has changed since training: the 1,188 tokens at its end are in no split",
    ):
        assert finished.err.count(said) == 1


def test_a_run_that_resumes_trains_on_what_it_trained_on(
    text_file: Path, small_gpt: Any, run_script: Script, tmp_path: Path
) -> None:
    """Though its text has grown. The test has the same targets as before."""
    path = tmp_path / "text.txt"
    path.write_text(text_file.read_text())
    quiet = ("--trainer.callbacks=null", "--trainer.logger=false", "--trainer.val_check_interval", 2)
    options = ("--config", CONFIG, *small_gpt, *quiet, "--mc_dropout.num_samples", 2, "--data.path", path)
    run = run_script("train", *options, "--trainer.max_steps", 2).run
    targets, before = read(run)["target"], torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    path.write_text(text_file.read_text() + "a lazy fox.\n" * 99)
    finished = run_script("train", *options, "--trainer.max_steps", 4, "--resume", run)
    after = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert (finished.status, before["global_step"], after["global_step"]) == (0, 2, 4)
    assert before["TextDataModule"] == after["TextDataModule"]
    assert read(run)["target"].equal(targets)
    assert finished.err.count("has changed since training: the 1,188 tokens at its end are in no split") == 1


def test_a_text_that_has_changed_where_it_was_trained_on_is_refused(
    checkpoint: Path, text_file: Path, run_script: Script, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text, cache = text_file.read_text(), tmp_path_factory.mktemp("cache")
    try:
        text_file.write_text(text[1:])
        error = run_script("predict", "--ckpt_path", checkpoint, "--data.cache_dir", cache).error
    finally:
        text_file.write_text(text)
    assert "Expected data.path to begin with the" in error
    assert str(text_file) in error


def test_wandb_has_scores_and_samples(trained_text: Any) -> None:
    (file,) = trained_text.run.glob("wandb/offline-run-*/*.wandb")
    rows = list(wandb_history(file))
    logged = {key for row in rows for key in row if not key.startswith("_")}
    scores = set(json.loads((trained_text.run / "evaluation.json").read_text())["ways"]["mc_dropout"]["scores"])
    assert "bits_per_byte" in scores
    summary = wandb_summary(file)
    assert {f"mc/{score}" for score in scores} | {f"test/{score}" for score in {"perplexity", *scores}} <= set(summary)
    assert summary["test/perplexity"] == pytest.approx(math.exp(summary["test/nll"]), rel=1e-6)
    assert {"train/loss", "fit/nll", *(f"val/{score}" for score in ("nll", "perplexity", "bits_per_byte"))} <= logged
    assert not [key for key in logged if key.startswith(("mc/", "test/"))]
    table = summary["samples"]
    assert (table["_type"], table["nrows"]) == ("table-file", 2)
    (page,) = [row["samples_page"] for row in rows if "samples_page" in row]
    (copy,) = trained_text.run.glob(f"wandb/offline-run-*/files/{page['path']}")
    assert copy.read_text() == (trained_text.run / "samples.html").read_text()
