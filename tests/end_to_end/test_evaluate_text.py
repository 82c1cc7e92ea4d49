"""scripts/evaluate.py and compare.py on text: ways of two checkpoints, a temperature for tokens, runs compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from thinned.data import TextDataModule
from thinned.evaluation.batch import in_half
from thinned.evaluation.report import blocks_of
from thinned.tasks import LanguageModelingTask
from thinned.uncertainty.scores import nll
from thinned.uncertainty.temperature import tempered

Script = Callable[..., Any]
SMALL = ("--trainer.accelerator", "cpu", "--mc_dropout.num_samples", 2, "--trainer.logger", "false")


@pytest.fixture(scope="module")
def other(trained_text: Any, with_other_weights: Script) -> Path:
    """A checkpoint of the same run with other weights."""
    return with_other_weights(trained_text.run / "checkpoints/best.ckpt", "net.blocks")


@torch.no_grad()
def test_tokens_are_predicted_by_ensembles_and_at_a_temperature(
    trained_text: Any, other: Path, run_script_in: Script
) -> None:
    checkpoint = trained_text.run / "checkpoints/best.ckpt"
    run = run_script_in(trained_text.cwd, "evaluate", "--ckpt_path", checkpoint, other, *SMALL).run
    nets = [LanguageModelingTask.load_from_checkpoint(p, weights_only=True).net.eval() for p in (checkpoint, other)]
    data = TextDataModule.load_from_checkpoint(checkpoint, weights_only=True)
    data.hparams["cache_dir"] = str(trained_text.cwd / "data")
    data.prepare_data()
    data.setup()

    def means_and_targets(loader: Any, fit: bool) -> tuple[Tensor, Tensor]:
        means, targets = [], []
        for tokens, target, *_ in loader:
            rows = in_half(tokens, "fit") if fit else slice(None)
            counted = target[rows] >= 0
            probs = [net(tokens[rows])[counted].double().softmax(-1) for net in nets]
            means.append(sum(probs) / 2)
            targets.append(target[rows][counted])
        return torch.cat(means), torch.cat(targets)

    ways = json.loads((run / "evaluation.json").read_text())["ways"]
    assert list(ways)[2:4] == ["deterministic_ensemble", "mc_dropout_ensemble"]
    mean, target = means_and_targets(data.test_dataloader(), False)
    scores = ways["deterministic_ensemble"]["scores"]
    assert scores["nll"]["value"] == pytest.approx(nll(mean, target).mean().item(), rel=1e-4)
    assert scores["perplexity"]["value"] == pytest.approx(nll(mean, target).mean().exp().item(), rel=1e-4)
    temperature = ways["deterministic_ensemble_tempered"]["settings"]["temperature"]
    of_tempered = ways["deterministic_ensemble_tempered"]["scores"]["nll"]["value"]
    assert of_tempered == pytest.approx(nll(tempered(mean, temperature), target).mean().item(), rel=1e-3)
    mean, target = means_and_targets(data.val_dataloader(), True)

    def of_fit(t: float) -> float:
        return nll(tempered(mean, t), target).mean().item()

    assert of_fit(temperature) <= min(of_fit(0.99 * temperature), of_fit(1.01 * temperature), of_fit(1.0)) + 1e-9
    assert ways["deterministic"]["coverage"] == {}  # prediction sets are for classes
    assert {"bits_per_byte", "top_5"} <= scores.keys()
    names = pq.read_schema(run / "predictions.parquet").names
    assert "mc_dropout_ensemble_mutual_information_between" in names

    compared = run_script_in(trained_text.cwd, "compare", trained_text.run, run, "--out", "same.json")
    assert compared.error.startswith("error: Expected runs of at least two groups")  # one checkpoint
    predicted = run_script_in(trained_text.cwd, "predict", "--ckpt_path", other, *SMALL).run
    assert run_script_in(trained_text.cwd, "compare", trained_text.run, predicted, "--out", "compared.json").status == 0
    nlls = json.loads((trained_text.cwd / "compared.json").read_text())["deterministic"]["ways"][predicted.name][
        "scores"
    ]["nll"]
    assert nlls["low"] < nlls["value"] < nlls["high"]
    assert nlls["difference"]["value"] == pytest.approx(
        nlls["value"] - ways["deterministic"]["scores"]["nll"]["value"], rel=1e-3
    )


def test_tokens_depend_on_those_close_to_them() -> None:
    """27 sequences of 2 tokens, of which the last has one: 9 blocks of 3."""
    sequence, position = torch.arange(53) // 2, torch.arange(53) % 2
    blocks = blocks_of({"index": 2 * sequence + position, "position": position + 1})
    assert blocks is not None
    assert blocks.tolist() == (sequence // 3).tolist()
    assert blocks_of({"index": torch.arange(3)}) is None
