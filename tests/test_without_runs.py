"""A plain Trainer in place of cli.py and runs/: it trains, tests, predicts and loads the checkpoint all the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch

import thinned

SCRIPT = """
import torch
from lightning.pytorch import Trainer, seed_everything
from thinned.data import ImageDataModule
from thinned.evaluation import MCDropout
from thinned.models import MLP, DropoutRates
from thinned.tasks import ClassificationTask

seed_everything(0)
data = ImageDataModule("digits")
net = MLP((1, 8, 8), 10, (16,), dropout=DropoutRates(embedding=0.1, mlp=0.5))
task = ClassificationTask(net)
mc_dropout = MCDropout(num_samples=3)
trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[mc_dropout], default_root_dir="run")
trainer.fit(task, data)
trainer.test(task, data)
trainer.predict(task, data)
trainer.save_checkpoint("run/two_steps.ckpt")

loaded = ClassificationTask.load_from_checkpoint("run/two_steps.ckpt", weights_only=True)
images = next(iter(data.test_dataloader()))[0]
logits = [module.eval()(images).detach() for module in (task, loaded)]
torch.save({"logits": logits, "evaluation": mc_dropout.evaluation, "examples": data.num_examples("test")}, "found.pt")
"""


def test_a_plain_trainer_is_enough(tmp_path: Path) -> None:
    source = Path(thinned.__file__).parent
    shutil.copytree(
        source, tmp_path / "src" / source.name, ignore=shutil.ignore_patterns("runs", "cli.py", "__pycache__")
    )
    assert not (tmp_path / "src" / source.name / "runs").exists()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["logits"][0].equal(found["logits"][1])
    assert pq.read_table(tmp_path / "run/predictions.parquet")["index"].to_pylist() == list(range(found["examples"]))
    assert found["examples"] == 365
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == found["evaluation"]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["mc_dropout"]["nll"] != metrics["deterministic"]["nll"]
    assert torch.load(tmp_path / "run/two_steps.ckpt", weights_only=True)["global_step"] == 2
