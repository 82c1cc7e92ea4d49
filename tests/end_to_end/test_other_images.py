"""Predicting images that were not trained on: all of them, by name, with labels or without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from thinned.data import image_sources
from thinned.data.image_sources import read_digits

Script = Callable[..., Any]


@pytest.fixture
def predict(trained: Any, run_script: Script) -> Script:
    def run(path: Path, *options: object) -> Any:
        checkpoint = trained.run / "checkpoints/best.ckpt"
        return run_script("predict", "--ckpt_path", checkpoint, "--data.path", path, *options)

    return run


def save(folder: Path, rows: list[int], *, by_class: bool) -> dict[str, int]:
    """Writes digits as files, and returns the class of each by its name."""
    digits, classes = read_digits(), {}
    for row in rows:
        label = digits[row]["label"]
        name = f"{label}/{row}.png" if by_class else f"{row}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        digits[row]["image"].save(folder / name)
        classes[name] = label
    return classes


def test_without_labels(predict: Script, tmp_path: Path) -> None:
    classes = save(tmp_path / "new", list(range(30)), by_class=False)
    predicted = predict(tmp_path / "new")
    rows = pq.read_table(predicted.run / "predictions.parquet")
    found = dict(zip(rows["source"].to_pylist(), rows["mc_dropout_prediction"].to_pylist(), strict=True))
    assert found.keys() == classes.keys()
    assert sum(found[name] == label for name, label in classes.items()) >= 24
    assert not {"target", "deterministic_nll"} & {*rows.column_names}
    assert not (predicted.run / "metrics.json").exists()


def test_some_of_the_classes(predict: Script, tmp_path: Path) -> None:
    rows = [row for row, label in enumerate(read_digits()["label"][:200]) if label in (1, 7)]
    classes = save(tmp_path / "some", rows, by_class=True)
    run = predict(tmp_path / "some").run
    found = pq.read_table(run / "predictions.parquet", columns=["source", "target"]).to_pylist()
    assert {row["source"]: row["target"] for row in found} == classes
    recall = json.loads((run / "metrics.json").read_text())["deterministic"]["recall"]
    assert {name: of_class["n"] for name, of_class in recall.items()} == {"1": 19, "7": 20}


def test_all_stored_splits_with_their_rows(predict: Script, tmp_path: Path) -> None:
    digits = read_digits()
    splits = DatasetDict({"train": digits.select(range(5)), "test": digits.select(range(5, 9))})
    # PNG instead of the pixels as they are, so that none of them counts as trained on
    splits = DatasetDict({name: Dataset.from_list([*part], part.features) for name, part in splits.items()})
    splits.save_to_disk(tmp_path / "stored")
    rows = pq.read_table(predict(tmp_path / "stored").run / "predictions.parquet")
    assert rows["source"].to_pylist() == [f"train[{i}]" for i in range(5)] + [f"test[{i}]" for i in range(4)]
    assert rows["target"].to_pylist() == digits["label"][:9]


def test_hidden_labels_of_a_test_split(run_script: Script, tmp_path: Path) -> None:
    """Training ends without scores of it, and with a prediction of each."""
    digits = read_digits()
    hidden = Dataset.from_dict({"image": digits["image"][300:350], "label": [-1] * 50}, features=digits.features)
    DatasetDict({"train": digits.select(range(300)), "test": hidden}).save_to_disk(tmp_path / "set")
    config = Path(__file__).parents[2] / "configs/mlp_digits.yaml"
    options = ("--trainer.max_epochs", 1, "--trainer.logger", "false", "--trainer.accelerator", "cpu")
    finished = run_script("train", "--config", config, "--data.path", tmp_path / "set", *options)
    assert finished.status == 0
    assert "Split test of data.path has no labels: it is predicted without scores" in finished.err
    assert pq.read_table(finished.run / "predictions.parquet").num_rows == 50
    left_out = run_script(
        "train", "--config", config, "--data.path", tmp_path / "set", "--data.leave_out", "[test]", *options
    )
    rows = pq.read_table(left_out.run / "predictions.parquet", columns=["source", "target"])
    assert {source.partition("[")[0] for source in rows["source"].to_pylist()} == {"train"}
    assert min(rows["target"].to_pylist()) >= 0


def test_data_are_read_once_for_what_the_net_leaves_to_them(
    run_script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[None] = []
    monkeypatch.setattr(image_sources, "read_digits", lambda: reads.append(None) or read_digits())
    config = Path(__file__).parents[2] / "configs/mlp_digits.yaml"
    options = ("--trainer.fast_dev_run", "true", "--trainer.logger", "false", "--trainer.accelerator", "cpu")
    assert run_script("train", "--config", config, *options).status == 0
    assert len(reads) == 1


def test_permuted_names_in_training_itself(run_script: Script, tmp_path: Path) -> None:
    """The test split names its classes in another order than the training split; the score is that of their names."""
    digits = read_digits()
    permuted = ClassLabel(names=[str(k) for k in reversed(range(10))])
    test = digits.select(range(1500, 1797))
    test = Dataset.from_dict({"image": test["image"], "label": [9 - k for k in test["label"]]}, digits.features)
    DatasetDict({"train": digits.select(range(1500)), "test": test.cast_column("label", permuted)}).save_to_disk(
        tmp_path / "set"
    )
    config = Path(__file__).parents[2] / "configs/mlp_digits.yaml"
    options = ("--trainer.max_epochs", 5, "--trainer.logger", "false", "--trainer.accelerator", "cpu")
    finished = run_script("train", "--config", config, "--data.path", tmp_path / "set", *options)
    assert json.loads((finished.run / "metrics.json").read_text())["deterministic"]["accuracy"] > 0.8
