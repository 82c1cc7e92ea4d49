"""A Trainer for the tests of callbacks."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet Trainer on one CPU that writes below `tmp_path`; options as of `Trainer`."""
    warnings.simplefilter("ignore", PossibleUserWarning)  # advice: more workers, a validation loader
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return partial(Trainer, accelerator="cpu", devices=1, enable_progress_bar=False, default_root_dir=tmp_path, **quiet)
