"""A checkpoint alone is enough: net, data, their statistics and the Monte-Carlo settings come back from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from thinned.data import ImageDataModule
from thinned.tasks import ClassificationTask
from thinned.uncertainty import classification_scores

Script = Callable[..., Any]


@pytest.fixture(scope="session")
def checkpoint(trained: Any) -> Path:
    return trained.run / "checkpoints/best.ckpt"


@pytest.fixture(scope="session")
def task(checkpoint: Path) -> ClassificationTask:
    return ClassificationTask.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()


@pytest.fixture(scope="session")
def digits() -> ImageDataModule:
    data = ImageDataModule()
    data.setup()
    return data


def column(run: Path, name: str) -> torch.Tensor:
    return torch.tensor(pq.read_table(run / "predictions.parquet")[name].to_pylist())


def test_predictions_are_those_of_the_run(trained: Any, checkpoint: Path, run_script: Script) -> None:
    predicted = run_script("predict", "--ckpt_path", checkpoint)
    for name in ("predictions.parquet", "metrics.json", "evaluation.json"):
        assert (predicted.run / name).read_bytes() == (trained.run / name).read_bytes()
    assert trained.out[trained.out.index("Test, n = 365") : trained.out.index("Run:")] in predicted.out  # the table
    assert not (predicted.run / "wandb").exists()


def test_checkpoint_holds_tensors_and_primitives_only(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    net = content["config"]["model"]["init_args"]["net"]
    assert net["class_path"] == "thinned.models.MLP"
    assert net["init_args"]["dropout"] == {"embedding": 0.1, "attention": 0.0, "residual": 0.0, "mlp": 0.3}
    assert content["state_dict"]["net.stages.head.weight"].shape == (10, 512)


def test_loaded_task_has_the_settings_of_the_run(checkpoint: Path, task: ClassificationTask) -> None:
    model = torch.load(checkpoint, weights_only=True)["config"]["model"]["init_args"]
    assert (task.warmup_steps, task.final_lr_fraction) == (model["warmup_steps"], model["final_lr_fraction"]) == (50, 1)
    optimizer = task.optimizer(task.parameters())
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2e-3, 0.05)
    assert task.net.init_args == model["net"]["init_args"]


def test_statistics_of_the_training_images_are_stored(checkpoint: Path, digits: ImageDataModule) -> None:
    stored = torch.load(checkpoint, weights_only=True)["ImageDataModule"]
    images = digits.raw_images("train", range(len(digits.target["train"]))).double() / 255
    statistics = stored["statistics"]
    assert statistics["mean"] == pytest.approx([images.mean().item()])
    assert statistics["std"] == pytest.approx([images.std().item()], 1e-4)


def test_deterministic_scores_are_those_of_the_loaded_task(
    trained: Any, task: ClassificationTask, digits: ImageDataModule
) -> None:
    (batch,) = digits.test_dataloader()
    with torch.no_grad():
        scores = classification_scores(task(batch.image).softmax(-1), batch.target)
    written = json.loads((trained.run / "metrics.json").read_text())["deterministic"]
    recall = written.pop("recall")
    assert scores == pytest.approx({name: written[name] for name in scores}, abs=1e-6)
    assert {name: of_class["n"] for name, of_class in recall.items()} == dict(
        zip(digits.class_names, batch.target.bincount().tolist(), strict=True)
    )


def test_other_data_wins_and_is_standardised_as_the_training_data(
    checkpoint: Path, task: ClassificationTask, save_images: Script, run_script: Script, tmp_path: Path
) -> None:
    other = save_images(tmp_path / "other", size=8)
    predicted = run_script(
        "predict", "--ckpt_path", checkpoint, "--data.path", other, "--mc_dropout.num_samples", "null"
    )
    data = ImageDataModule(str(other))
    data.setup()
    state = torch.load(checkpoint, weights_only=True)["ImageDataModule"]
    stored = state["statistics"]
    assert abs(data.statistics.mean[0] - stored["mean"][0]) > 0.1  # the other images' own statistics would show
    data.load_state_dict(state)
    images = data.raw_images("test", range(data.num_examples("test"))) / 255  # all of them, as none was trained on
    with torch.no_grad():
        expected = task((images - stored["mean"][0]) / stored["std"][0]).softmax(-1)
    torch.testing.assert_close(column(predicted.run, "deterministic_probs"), expected, atol=1e-5, rtol=0)
    assert column(predicted.run, "target").equal(data.target["test"])
    assert json.loads((predicted.run / "metrics.json").read_text()).keys() == {"deterministic"}


def test_other_settings_win(checkpoint: Path, run_script: Script, digits: ImageDataModule) -> None:
    options = ("--mc_dropout.num_samples", 7, "--data.predict_split", "val")
    predicted = run_script("predict", "--ckpt_path", checkpoint, *options)
    run = predicted.run
    assert column(run, "target").equal(digits.target["val"])
    shares = 7 * column(run, "mc_dropout_variation_ratio")  # votes are counted in sevenths
    torch.testing.assert_close(shares, shares.round(), atol=1e-5, rtol=0)
    assert shares.max() >= 1
    assert json.loads((run / "metrics.json").read_text())["mc_dropout"]["accuracy"] == pytest.approx(
        column(run, "mc_dropout_correct").double().mean().item()
    )
    assert "Validation split" in predicted.out
