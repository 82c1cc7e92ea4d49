"""Predictions do not depend on how examples are dealt out to batches and processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

ROOT = Path(__file__).parents[2]


def assert_equal(predicted: pa.Table, expected: pa.Table) -> None:
    """To 1e-6; of negative log-likelihoods, whose rounding has no bound, the probabilities.

    Brier scores to 4e-6, as their slope is up to 2 for each of two probabilities; the first networks to 3e-6, as one
    alone is no mean.
    """
    assert predicted.schema == expected.schema
    assert expected["source"] == predicted["source"]
    for name in set(expected.column_names) - {"source"}:
        pair = [torch.tensor(table[name].to_pylist(), dtype=torch.float64) for table in (predicted, expected)]
        if name.endswith(("nll", "nll_at")):
            pair = [torch.exp(-column) for column in pair]
        atol = 4e-6 if name.endswith("brier") else 3e-6 if name.endswith("nll_at") else 1e-6
        torch.testing.assert_close(*pair, atol=atol, rtol=0, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_batch_size(batch_size: int, trained: Any, run_script: Callable[..., Any]) -> None:
    args = ("--ckpt_path", trained.run / "checkpoints/best.ckpt", "--data.predict_split", "val")
    runs = [
        run_script("predict", *args, "--mc_dropout.num_samples", 3, "--data.eval_batch_size", size).run
        for size in (64, batch_size)
    ]
    expected, predicted = (pq.read_table(run / "predictions.parquet") for run in runs)
    assert expected["index"].to_pylist() == list(range(161))
    assert_equal(predicted, expected)


@pytest.mark.slow
def test_two_processes(trained: Any, start_script: Callable[..., Any]) -> None:
    args = ("--ckpt_path", trained.run / "checkpoints/best.ckpt", "--config", ROOT / "configs/trainer/ddp_cpu.yaml")
    run = start_script("scripts/predict.py", *args, "--data.eval_batch_size", 50).run
    predicted, expected = (pq.read_table(r / "predictions.parquet") for r in (run, trained.run))
    assert predicted["index"].to_pylist() == list(range(365))  # odd: one process has an example more
    assert_equal(predicted, expected)
    assert not list(run.glob("*.part*"))
    ours, theirs = (pq.read_schema(r / "predictions.parquet").metadata[b"thinned"] for r in (run, trained.run))
    assert ours == theirs
    scores, alone = (json.loads((r / "metrics.json").read_text())["mc_dropout"] for r in (run, trained.run))
    assert scores.pop("sites") == alone.pop("sites")
    assert scores.pop("recall") == alone.pop("recall")
    assert scores == pytest.approx(alone, abs=1e-6)
