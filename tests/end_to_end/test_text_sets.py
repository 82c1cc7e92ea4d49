"""scripts/evaluate.py --sets, of text: characters exchanged, another text, and text beyond the vocabulary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

Script = Callable[..., Any]


def columns(folder: Path) -> dict[str, Tensor]:
    table = pq.read_table(folder / "predictions.parquet")
    return {name: torch.tensor(table[name].to_pylist()) for name in table.column_names}


def test_text_is_shifted_and_foreign(trained_text: Any, text_file: Path, run_script: Script, tmp_path: Path) -> None:
    """Foreign sequences are told by means over their tokens; text beyond the vocabulary is left out."""
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:1500].replace("e", "x").replace("o", "q"))
    sets = {
        "exchanged": {"distortion": "characters", "severities": [0, 0.5]},
        "other": {"path": str(other)}, "code": {"path": "stdlib"},
    }  # fmt: skip
    settings = ("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--data.cache_dir", tmp_path / "data")
    done = run_script("evaluate", "--ckpt_path", trained_text.run, "--sets", json.dumps(sets), *settings)
    assert "left out code: Expected text within the vocabulary of the tokenizer" in done.err
    (run,) = tmp_path.glob("runs/*/*-evaluate")
    evaluation = json.loads((run / "evaluation.json").read_text())
    found = evaluation["sets"]
    assert found["exchanged_0"]["ways"] == evaluation["ways"]
    nlls = [found[name]["ways"]["mc_dropout"]["scores"]["nll"]["value"] for name in ("exchanged_0", "exchanged_0.5")]
    assert nlls[0] < nlls[1]
    scores = found["other"]["ways"]["mc_dropout"]["scores"]
    assert scores["nll"]["value"] > nlls[0]
    assert not any(name.startswith("scod") for name in scores)
    means = []
    for folder in (run, run / "sets/other"):
        rows = columns(folder)
        first = rows["index"] - rows["position"]
        means.append([rows["mc_dropout_predictive_entropy"][first == start].mean() for start in first.unique()])
    truth = roc_auc_score([0] * len(means[0]) + [1] * len(means[1]), [*means[0], *means[1]])
    score = scores["foreign_auroc_predictive_entropy"]
    assert score["value"] == pytest.approx(truth, abs=1e-6)
    assert score["n"] == len(means[0]) + len(means[1])
