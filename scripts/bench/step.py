"""Measures a training step of scripts/train.py, with callbacks, logger and progress bar, against a plain Trainer's."""

import os
import tempfile
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from measuring import compare, show
from torch import Tensor, nn, optim

from thinned.cli import ThinnedCLI

CONFIGS = Path(__file__).parents[2] / "configs"


class PlainTask(pl.LightningModule):
    """Trains the net of a task on the same batches, as a minimal script would."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.net.parameters(), fused=True)


def bench_step(repeats: int, config: str, steps: int) -> None:
    """Trains for some steps on the CPU, without validation; both sides read the same data module."""
    limits = ("--trainer.accelerator=cpu", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):

        def side(ours: bool) -> float:
            times: list[float] = []  # CPU seconds, which other processes disturb less
            timer = LambdaCallback(
                on_train_start=lambda *_: times.append(time.process_time()),
                on_train_end=lambda *_: times.append(time.process_time()),
            )
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                configs = [f"--config={CONFIGS / name}.yaml" for name in (config, "logger/csv")]
                cli = ThinnedCLI([*configs, *limits])
                trainer, task = cli.trainer, cli.model
                if ours:
                    trainer.callbacks.append(timer)  # type: ignore[attr-defined]
                else:
                    plain = CSVLogger("plain")
                    trainer = pl.Trainer(
                        accelerator="cpu", max_steps=steps, limit_val_batches=0, logger=plain, callbacks=[timer],
                        log_every_n_steps=cli.trainer.log_every_n_steps,  # type: ignore[attr-defined]
                    )  # fmt: skip
                    task = PlainTask(cli.model.net)
                trainer.fit(task, cli.datamodule)
            return times[1] - times[0]

        results = compare({"plain Trainer": lambda: side(False), "scripts/train.py": lambda: side(True)}, repeats)
    show(f"Training step, {config}", results, steps)
