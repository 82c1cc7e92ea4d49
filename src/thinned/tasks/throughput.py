"""Measures the speed of training: tokens or examples per second, step time, FLOPs utilisation, peak memory."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from thinned.models.net import net_offers
from thinned.offers import task_offers

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}  # by the first part of `precision`


def is_logged(trainer: Trainer, step: int) -> bool:
    """Returns whether Lightning logs this optimiser step, counted from 1."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (step % every == 0 or trainer.should_stop)


class Throughput(Callback):
    """Logs the speed since the last logged step, without validation.

    Logs `throughput/tokens_per_second` of all devices (`examples_per_second` unless batches are text),
    `throughput/step_ms` per optimiser step, `throughput/peak_memory_mib` of this process's device and, if the net has
    `flops_per_token` and the device's peak is known, `throughput/mfu` (Chowdhery et al. 2022, appendix B).
    """

    _start: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dtype = DTYPES.get(str(trainer.precision).partition("-")[0], torch.float32)
        self._peak_flops = get_available_flops(pl_module.device, dtype)
        self._start, self._items = None, 0  # the first step starts the clock: it may compile and warm up
        self._step = self._last_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start is not None:
            self._start += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        inputs, step, device = batch[0], trainer.global_step, pl_module.device
        text = not inputs.is_floating_point() and inputs.dim() == 2
        self._items += inputs.numel() if text else len(inputs)
        stepped, self._last_step = step > self._last_step, step  # no step while gradients are accumulated
        if not stepped or not (self._start is None or is_logged(trainer, step)):
            return
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        if self._start is not None:
            seconds = now - self._start
            rate, unit = self._items * trainer.world_size / seconds, "tokens" if text else "examples"
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
            metrics = {
                f"throughput/{unit}_per_second": rate,
                "throughput/step_ms": 1000 * seconds / (step - self._step),
                "throughput/peak_memory_mib": peak / 2**20,
            }
            flops_per_token = net_offers(task_offers(pl_module).net).flops_per_token
            if text and flops_per_token is not None and self._peak_flops is not None:
                metrics["throughput/mfu"] = rate * flops_per_token() / (self._peak_flops * trainer.world_size)
            pl_module.log_dict(metrics, batch_size=1)
            pl_module.log(f"{unit}/s", rate, prog_bar=True, logger=False, batch_size=1)
        self._start, self._items, self._step = now, 0, step
