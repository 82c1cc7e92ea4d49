"""Computes learning rates by step and decay groups, and describes nets and optimisers for checkpoints."""

import inspect
import json
import math
import sys
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import OptimizerCallable
from torch import nn


def warmup_cosine(step: int, warmup_steps: int, total_steps: float, final_fraction: float) -> float:
    """Returns the learning rate at a step, as a fraction of its peak.

    It rises linearly from 1 / (warmup_steps + 1) at step 0 to 1 at step `warmup_steps`, falls by half a cosine
    (Loshchilov and Hutter 2017) to `final_fraction` at `total_steps`, or never if that is inf, and stays there.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def total_steps(trainer: Trainer) -> float:
    """Returns the number of optimiser steps of a whole training; inf if it has no end."""
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler) and epochs > 0 and batches < math.inf:
            # Lightning 2.6.6 takes the accumulation of the current epoch for all epochs.
            steps = sum(math.ceil(batches / callback.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
            return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
    return trainer.estimated_stepping_batches


def decay_groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the trainable parameters that decay (of two dimensions or more) and the others (gains and biases)."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]


def class_spec(cls: type, init_args: dict[str, Any] | None) -> dict[str, Any] | None:
    """Describes an object by the path of its class and by its arguments, as configs do.

    Returns None if the class cannot be imported, or if the arguments are None or hold more than primitives:
    `torch.load(weights_only=True)` would refuse them.

    >>> class_spec(nn.ReLU, {"inplace": True})
    {'class_path': 'torch.nn.modules.activation.ReLU', 'init_args': {'inplace': True}}
    """
    try:
        json.dumps(init_args)
    except TypeError:
        return None
    if init_args is None or getattr(sys.modules[cls.__module__], cls.__qualname__, None) is not cls:
        return None
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}


def optimizer_spec(optimizer: OptimizerCallable) -> dict[str, Any] | None:
    """Describes the optimiser that a callable makes, with all its settings."""
    made = optimizer([{"params": [nn.Parameter(torch.zeros(1, 1))]}])
    names = inspect.signature(type(made)).parameters
    return class_spec(type(made), {key: value for key, value in made.defaults.items() if key in names})
