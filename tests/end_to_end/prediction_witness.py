"""A callback for predictions in other processes: small chunks, a count of examples, and a halt to be killed at."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from thinned.evaluation import prediction_store


class PredictionWitness(Callback):
    """Leaves the number of examples of each batch in `predicted<rank>`; halts before batch `HALT_AT` for good."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        prediction_store.CHUNK_ROWS = 100

    def on_predict_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if str(batch_idx) == os.environ.get("HALT_AT"):
            signal.pause()
        with Path(f"predicted{trainer.global_rank}").open("a") as file:
            file.write(f"{len(batch[0])}\n")
