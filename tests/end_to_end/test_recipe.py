"""The README's recipe for one's own model, and its Python example, followed to the letter."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import thinned.models
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
