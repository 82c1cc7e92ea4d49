"""A training takes its first step without importing what only pictures, pages and other people's weights need."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
UNUSED = {"jinja2", "matplotlib", "matplotlib.pyplot", "transformers", "IPython"}


def say_modules_and_end(*_: Any) -> None:
    print(f"imported: {sorted(UNUSED & sys.modules.keys())}", flush=True)
    os._exit(0)


@pytest.mark.parametrize(
    "config",
    [
        "mlp_digits",  # mlp only
        "gpt_pydocs",  # gpt only
    ],
)
def test_first_step_imports_no_more_than_it_needs(config: str, start_script: Callable[..., Any]) -> None:
    ending = ("--trainer.callbacks+=lightning.pytorch.callbacks.LambdaCallback", "--trainer.accelerator=cpu")
    ending += ("--trainer.callbacks.on_train_batch_end=test_start.say_modules_and_end",)
    done = start_script("scripts/train.py", "--config", CONFIGS / f"{config}.yaml", *ending)
    assert "imported: []" in done.out, done.err
