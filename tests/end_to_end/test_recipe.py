"""The README's recipes and Python examples, followed to the letter."""

import copy
import doctest
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from thinned.data.image_sources import read_digits
from thinned.tasks import ClassificationTask
from thinned.uncertainty.scores import SCORES

ROOT = Path(__file__).parents[2]
README = "".join((ROOT / name).read_text() for name in ("README.md", "scripts/README.md"))


def code(language: str, containing: str) -> str:
    """The one code block of the READMEs of that language with that text."""
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in b]
    return str(block)


RECIPES = [line for line in code("sh", "my.ConvNet").splitlines() if line]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Runs a command of the README for a few batches, beside the module that the README writes; returns the run."""
    (tmp_path / "my.py").write_text(code("python", "class ConvNet"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("train", ROOT / "scripts" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(command: str) -> Path:
        python, path, *options = shlex.split(command)
        assert (python, path) == ("python", "scripts/train.py")
        options = [str(ROOT / word) if word.startswith("configs/") else word for word in options]
        script.main([*options, "--config", str(ROOT / "configs/debug/fast.yaml"), "--trainer.accelerator", "cpu"])
        (directory,) = (tmp_path / "runs" / "mlp_digits").iterdir()
        return directory

    if "my" in sys.modules:  # It stays there: jsonargparse imports the module of each subclass that it finds.
        importlib.reload(sys.modules["my"])
    yield run
    SCORES.pop("mean_confidence", None)


def checkpoint_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)


def test_a_net(train: Callable[[str], Path]) -> None:
    run = train(RECIPES[0])
    ways = json.loads((run / "evaluation.json").read_text())["ways"]
    assert ways["mc_dropout"]["settings"]["masks"] == "independent"  # it has no `thin`
    of_way = {name: way["scores"] for name, way in ways.items()}
    assert of_way["mc_dropout"]["nll"]["value"] != of_way["deterministic"]["nll"]["value"]
    weights = checkpoint_of(run)["state_dict"]
    assert weights["net.0.weight"].shape == (32, 1, 3, 3)
    task = ClassificationTask.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert (type(task.net).__name__, task.net[3].p) == ("ConvNet", 0.2)
    assert torch.equal(task.net[0].weight, weights["net.0.weight"])
    rows = pq.read_table(run / "predictions.parquet")  # and a metric
    confidence = of_way["deterministic"]["mean_confidence"]
    assert confidence["value"] == pytest.approx(pc.mean(rows["deterministic_confidence"]).as_py(), abs=1e-6)
    assert confidence["low"] < confidence["value"] < confidence["high"]


def test_data(train: Callable[[str], Path]) -> None:
    rows = pq.read_table(train(RECIPES[1]) / "predictions.parquet")
    assert rows["index"].to_pylist() == list(range(64))
    assert rows["target"].to_pylist() == [i % 10 for i in range(64)]


def test_a_loss(train: Callable[[str], Path]) -> None:
    assert checkpoint_of(train(RECIPES[2]))["config"]["model"]["class_path"] == "my.HingeTask"


def test_a_way(train: Callable[[str], Path]) -> None:
    rows = pq.read_table(train(RECIPES[3]) / "predictions.parquet")
    once, twice = (torch.tensor(rows[f"{way}_probs"].to_pylist()).log() for way in ("deterministic", "sharper"))
    torch.testing.assert_close(twice, (2 * once).log_softmax(-1), rtol=0, atol=1e-4)


def test_a_callback(train: Callable[[str], Path]) -> None:
    (name,) = [name for name in checkpoint_of(train(RECIPES[4]))["callbacks"] if name.startswith("EarlyStopping")]
    assert "val/nll" in name


def test_an_optimiser(train: Callable[[str], Path]) -> None:
    (state,) = checkpoint_of(train(RECIPES[5]))["optimizer_states"]
    assert [group["initial_lr"] for group in state["param_groups"]] == [0.1, 0.1]
    assert "betas" not in state["param_groups"][0]


def test_every_recipe_has_a_test() -> None:
    assert len(RECIPES) == 6


def test_the_quickstart_prints_what_it_says() -> None:
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False) == doctest.TestResults(0, 8)


def test_a_predictor_from_a_checkpoint_and_its_net_exported(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    read_digits()[3]["image"].save("digit.png")
    names: dict[str, Any] = {}
    exec(code("python", "digit.png").replace("runs/...", str(trained.run)), names)
    assert capsys.readouterr().out.startswith(f"{names['prediction'].label} {{")

    net = names["predictor"].net
    names["net"] = copy.deepcopy(net)
    for parameter in names["net"].parameters():
        parameter.data.zero_()
    exec(code("python", "net.safetensors"), names)
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(names["net"](images), net(images))
    assert torch.equal(torch.export.load("net.pt2").module()(images), net(images))
