"""Measures CPU seconds from the start of Python to the first step: scripts/train.py against a plain Trainer."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def say_time_and_end(*_: Any) -> None:
    print(f"CPU seconds: {time.process_time()}", flush=True)
    os._exit(0)


def train_plainly() -> None:
    """Trains the net of configs/mlp_digits.yaml for one step, as a plain script would."""
    import lightning.pytorch as pl
    import torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            hidden = [nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.2)]
            self.net = nn.Sequential(*hidden, nn.Linear(512, 10))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32), torch.tensor(labels))
    ending = pl.callbacks.LambdaCallback(on_train_batch_end=say_time_and_end)
    pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[ending], logger=False).fit(Task(), DataLoader(data, 64, True))


def bench_start(repeats: int) -> None:
    """Measures both sides in turn, each in its own process, without its children, such as W&B's service."""
    plain = ("-c", "from start import train_plainly; train_plainly()")
    ending: tuple[str, ...] = ("--trainer.callbacks+=lightning.pytorch.callbacks.LambdaCallback",)
    ending += ("--trainer.callbacks.on_train_batch_end=start.say_time_and_end", "--trainer.accelerator=cpu")
    ours = (str(ROOT / "scripts/train.py"), "--config", str(ROOT / "configs/mlp_digits.yaml"), *ending)
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

    def seconds(arguments: tuple[str, ...]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *arguments]
            out = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout
        return float(out.rpartition("CPU seconds: ")[2])

    pairs = [(seconds(plain), seconds(ours)) for _ in range(repeats)]
    base, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"CPU seconds to the first step: plain Trainer {base:.2f}, scripts/train.py {mine:.2f}, ratio {ratio:.2f}")
