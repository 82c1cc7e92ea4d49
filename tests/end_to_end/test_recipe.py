"""The README's recipe for one's own model, and its Python example, followed to the letter."""

import copy
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import thinned.models
from thinned.data.image_sources import read_digits
from thinned.tasks import ClassificationTask

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def code(language: str, containing: str) -> str:
    """The README's one code block of that language with that text."""
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in b]
    return str(block)


def test_the_recipe_trains_a_model_that_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "convnet.py").write_text(code("python", "class ConvNet"))
    monkeypatch.setattr(thinned.models, "__path__", [*thinned.models.__path__, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    command = shlex.split(code("sh", "convnet.ConvNet"))
    assert command[:2] == ["python", "scripts/train.py"]
    options = [str(ROOT / word) if word.startswith("configs/") else word for word in command[2:]]
    spec = importlib.util.spec_from_file_location("train", ROOT / "scripts" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)

    train.main([*options, "--config", str(ROOT / "configs/debug/fast.yaml"), "--trainer.accelerator", "cpu"])

    (run,) = (tmp_path / "runs" / "mlp_digits").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["mc_dropout"]["masks"] == "independent"  # it has no `thin`
    assert metrics["mc_dropout"]["nll"] != metrics["deterministic"]["nll"]
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert weights["net.layers.0.weight"].shape == (32, 1, 3, 3)
    task = ClassificationTask.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert (type(task.net).__name__, task.net.layers[4].p) == ("ConvNet", 0.2)
    assert torch.equal(task.net.layers[0].weight, weights["net.layers.0.weight"])


def test_the_python_example_runs() -> None:
    names: dict[str, object] = {}
    exec(code("python", "mc_predict"), names)
    prediction = names["prediction"]
    assert prediction.mean.sum(-1).tolist() == pytest.approx([1.0] * 4)  # type: ignore[attr-defined]
    assert (prediction.mutual_information > 0).all()  # type: ignore[attr-defined]


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
