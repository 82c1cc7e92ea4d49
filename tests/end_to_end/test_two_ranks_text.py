"""A data-parallel run on text: different masks, equal weights, a text that is tokenised once, all tokens scored."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from thinned.data import TextDataModule
from thinned.tasks import LanguageModelingTask

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 4


@pytest.mark.slow
def test_two_ranks(
    start_script: Callable[..., Any], run_script: Callable[..., Any], text_file: Path, small_gpt: Any, tmp_path: Path
) -> None:
    """The text is tokenised once; every token of the test is a row, scored as one process scores it."""
    configs = ("--config", CONFIGS / "gpt_pydocs.yaml", *small_gpt, "--config", CONFIGS / "trainer/ddp_cpu.yaml")
    options = ("--data.path", text_file, "--trainer.max_steps", STEPS, "--trainer.val_check_interval", STEPS)
    samples = ("--trainer.callbacks.prompt", "the ", "--trainer.callbacks.max_new_tokens", 5)
    witness = ("--trainer.callbacks+=rank_witness.RankWitness",)
    run = start_script("scripts/train.py", *configs, *options, "--trainer.devices", 2, *samples, *witness).run

    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert len(first["masks"]) == len(second["masks"]) > 0
    assert not any(one.equal(other) for one, other in zip(first["masks"], second["masks"], strict=True))
    assert all(one.equal(other) for one, other in zip(first["weights"], second["weights"], strict=True))
    assert len(list((tmp_path / "data").iterdir())) == 1

    task = LanguageModelingTask.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True).eval()
    data = TextDataModule.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)
    data.setup("fit")
    tokens, targets, _ = map(torch.cat, zip(*data.fit_dataloader(), strict=True))
    with torch.no_grad():
        nll = F.cross_entropy(task(tokens).transpose(1, 2), targets)
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    assert [float(row["fit/nll"]) for row in rows if row["fit/nll"]] == [pytest.approx(nll.item(), rel=1e-5)]

    alone = run_script("predict", "--ckpt_path", run / "checkpoints/best.ckpt", "--data.eval_batch_size", 5).run
    for name in ("predictions", "sequences"):
        two, one = (pq.read_table(directory / f"{name}.parquet") for directory in (run, alone))
        assert two["index"].to_pylist() == one["index"].to_pylist() == list(range(len(one)))
        for column in one.column_names:
            pair = (torch.tensor(table[column].to_pylist(), dtype=torch.float64) for table in (two, one))
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
