"""A way to predict that is added here, touching no other file, appears wherever the ways that are shipped do."""

import json
import re
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from wandb_file import wandb_summary

from thinned.evaluation import figures
from thinned.evaluation.batch import Batch, Validation, in_half
from thinned.evaluation.prediction_store import Columns
from thinned.evaluation.ways import Way
from thinned.models.net import Logits
from thinned.uncertainty.calibration import equal_mass_bins
from thinned.uncertainty.scores import SCORES, nll, scores

ROOT = Path(__file__).parents[2]
TEMPERATURES = torch.logspace(-4, 3, 85, base=2)
Script = Callable[..., Any]


class Ensemble(Way):
    """The networks of several checkpoints."""

    name, label = "ensemble", "ensemble"

    def __init__(self, paths: list[str]) -> None:
        self.nets = [net_of(path) for path in paths]

    def bind(self, net: nn.Module) -> None:
        """It has networks of its own."""

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        for net in self.nets:
            yield batch.logits(net)


class TemperedEnsemble(Way):
    """The mean of several networks, at the temperature with the lowest validation NLL."""

    name, label = "tempered", "tempered ensemble"

    def __init__(self, paths: list[str]) -> None:
        self.ensemble = Ensemble(paths)
        self.builds_on = [self.ensemble]
        self.temperature = 1.0

    def bind(self, net: nn.Module) -> None:
        """Its networks are those that it builds on."""

    def fit(self, validation: Validation) -> None:
        def nlls(batch: Batch) -> Tensor:
            mean = batch.mean(self.ensemble)
            return torch.stack([nll(tempered(mean, t), batch.target) for t in TEMPERATURES], dim=-1)

        self.temperature = TEMPERATURES[validation.mean(nlls).argmin()].item()

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        yield Logits(batch.mean(self.ensemble).log() / self.temperature)

    @property
    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    @property
    def details(self) -> str:
        return f"T = {self.temperature:.2f}"

    def load_settings(self, settings: Mapping[str, Any]) -> None:
        self.temperature = settings["temperature"]


def net_of(path: str) -> nn.Module:
    task: Any = locate(torch.load(path, weights_only=True)["config"]["model"]["class_path"])
    return task.load_from_checkpoint(path, map_location="cpu", weights_only=True).net.eval()


def tempered(probs: Tensor, temperature: Tensor | float) -> Tensor:
    powers = probs.double() ** (1 / float(temperature))
    return (powers / powers.sum(-1, keepdim=True)).float()


KINDS = [
    pytest.param("trained", id="images"),  # mlp only
    pytest.param("trained_text", id="text"),  # gpt only
]


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    run: Path = request.getfixturevalue(request.param).run
    return run / "checkpoints/best.ckpt"


@pytest.fixture
def members(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints whose networks differ from the trained one, and from each other."""
    folder, paths = tmp_path_factory.mktemp("members"), []
    for seed in range(2):
        content = torch.load(checkpoint, weights_only=True)
        generator = torch.Generator().manual_seed(seed)
        for name, value in content["state_dict"].items():
            if name.startswith("net.") and not name.endswith("head.weight"):  # which may be tied
                noise = torch.randn(value.shape, generator=generator)
                value += 0.5 * value.std() * noise
        paths.append(str(folder / f"{seed}.ckpt"))
        torch.save(content, paths[-1])
    return paths


def options(checkpoint: Path, members: list[str]) -> tuple[object, ...]:
    ways = [{"class_path": "test_added_way.TemperedEnsemble", "init_args": {"paths": members}}]
    small = ("--mc_dropout.num_samples", 3, "--trainer.accelerator", "cpu")
    return "--ckpt_path", checkpoint, "--mc_dropout.ways", json.dumps(ways), *small


@torch.no_grad()
def expected(checkpoint: Path, members: list[str]) -> tuple[float, Tensor, Tensor]:
    """By definition: the temperature, and of the test split the distributions (N, K) and targets (N,)."""
    kind: Any = locate(torch.load(checkpoint, weights_only=True)["config"]["data"]["class_path"])
    data = kind.load_from_checkpoint(checkpoint, weights_only=True)
    data.prepare_data()
    data.setup()

    def mean_and_targets(loader: Any, fit: bool = False) -> tuple[Tensor, Tensor]:
        means, targets = [], []
        for batch in loader:
            if fit:
                chosen = in_half(batch[0], "fit")
                batch = [column[chosen] for column in batch]
            counted = batch[1] >= 0
            means.append(sum(net_of(path)(batch[0])[counted].double().softmax(-1) for path in members) / len(members))
            targets.append(batch[1][counted])
        return torch.cat(means), torch.cat(targets)

    mean, targets = mean_and_targets(data.val_dataloader(), fit=True)
    best = min(TEMPERATURES.tolist(), key=lambda t: nll(tempered(mean, t), targets).double().mean().item())
    mean, targets = mean_and_targets(data.test_dataloader())
    return best, tempered(mean, best), targets


def columns(run: Path) -> dict[str, Tensor]:
    table = pq.read_table(run / "predictions.parquet")
    return {name: torch.tensor(table[name].to_pylist()) for name in table.column_names if name != "source"}


def test_it_appears_wherever_the_others_do(
    checkpoint: Path, members: list[str], run_script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    draw = figures.figures

    def keep(*args: Any) -> dict[str, Any]:
        drawn.update(draw(*args))
        return drawn

    monkeypatch.setattr(figures, "figures", keep)
    monkeypatch.chdir(checkpoint.parents[4])  # whose folder `data` has the tokens
    logged = ("--config", ROOT / "configs/logger/wandb.yaml")
    done = run_script("predict", *options(checkpoint, members), *logged, pictures=True, COLUMNS="200")
    temperature, probs, targets = expected(checkpoint, members)
    assert temperature not in (1, TEMPERATURES[0], TEMPERATURES[-1])

    rows = columns(done.run)
    confidence, prediction = probs.max(-1)
    torch.testing.assert_close(rows["tempered_nll"], nll(probs, targets), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows["tempered_confidence"], confidence, rtol=1e-4, atol=1e-5)
    assert rows["tempered_correct"].equal(prediction == targets)
    assert "tempered_mutual_information" not in rows  # it streams a single distribution

    metrics = json.loads((done.run / "metrics.json").read_text())
    assert list(metrics) == ["deterministic", "mc_dropout", "tempered"]
    of_rows = scores(Columns(rows, "tempered"))
    recall = metrics["tempered"].pop("recall", None)
    assert (recall is None) == ("position" in rows)
    assert metrics["tempered"] == pytest.approx(of_rows | {"temperature": temperature}, rel=1e-6)
    assert metrics["tempered"]["nll"] != pytest.approx(metrics["mc_dropout"]["nll"], rel=1e-3)

    assert "tempered ensemble" in done.out
    assert f"T = {temperature:.2f}" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith(f" {SCORES['nll'].label} ")]
    assert re.findall(r"(\d\.\d{4}) \[", line)[2] == f"{of_rows['nll']:.4f}"
    scored = json.loads((done.run / "evaluation.json").read_text())["ways"]["tempered"]["scores"]["nll"]
    assert scored["value"] == pytest.approx(of_rows["nll"])
    assert scored["low"] < scored["value"] < scored["high"]
    baseline = metrics["deterministic"]["nll"]
    assert scored["difference"]["value"] == pytest.approx(of_rows["nll"] - baseline, abs=1e-6)

    curve = drawn["reliability"].axes[0].containers[2]  # after two other ways
    assert curve.get_label().startswith("tempered ensemble: ECE ")
    accuracy = [(prediction == targets)[of_bin].double().mean().item() for of_bin in equal_mass_bins(confidence)]
    assert curve[0].get_ydata().tolist() == pytest.approx(accuracy, abs=0.02)
    assert [axes.get_title() for axes in drawn["entropy"].axes][2] == "tempered ensemble"
    assert (done.run / "figures/reliability.png").exists()

    (file,) = done.run.glob("wandb/offline-run-*/*.wandb")
    assert wandb_summary(file)["tempered/nll"] == pytest.approx(of_rows["nll"])


@pytest.mark.slow
def test_two_processes_learn_and_predict_the_same(
    checkpoint: Path, members: list[str], run_script: Script, start_script_in: Script, tmp_path: Path
) -> None:
    args = options(checkpoint, members)
    one = run_script("predict", *args).run
    two = start_script_in(
        tmp_path, "scripts/predict.py", *args, "--config", ROOT / "configs/trainer/ddp_cpu.yaml", "--run_id", "two"
    ).run
    ours, theirs = columns(two), columns(one)
    assert ours.keys() == theirs.keys()
    for name in ("index", "tempered_nll", "tempered_confidence", "tempered_prediction"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    scored = [json.loads((run / "metrics.json").read_text())["tempered"] for run in (one, two)]
    assert scored[1].pop("recall", None) == scored[0].pop("recall", None)
    assert scored[1] == pytest.approx(scored[0], abs=1e-5)
