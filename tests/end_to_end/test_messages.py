"""Whatever fails in a person's own code ends in one line, the last on the screen, that names the line in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[..., Any]

BASE = ("--config", Path(__file__).parents[2] / "configs/mlp_digits.yaml", "--trainer.accelerator", "cpu")
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
ERRORS = [
    "AttributeError", "KeyError", "TypeError", "IndexError", "OverflowError", "ZeroDivisionError", "UnicodeEncodeError",
    "ValueError", "RuntimeError", "AssertionError",
]  # fmt: skip


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.mark.parametrize("error", ERRORS)
def test_error_of_a_net_is_one_line(error: str, run_script: Script) -> None:
    net = ("--model.net", "foreign_errors.FailingNet", "--model.net.error", error)
    done = run_script("train", *BASE, *QUIET, *net, WANDB_MODE="offline")
    assert done.error.startswith(f"error: {error}")
    assert "(foreign_errors.py, line " in done.error
    assert done.err.splitlines()[-1] == done.error
    assert "wandb sync" not in done.err


@pytest.mark.parametrize("hook", ["setup", "on_sanity_check_start", "on_train_batch_end", "on_validation_end"])
def test_error_of_a_callback_is_one_line(hook: str, run_script: Script) -> None:
    own = ("--trainer.callbacks", "foreign_errors.FailingCallback", "--trainer.callbacks.error", "KeyError")
    done = run_script("train", *BASE, *QUIET, "--trainer.logger", "false", *own, "--trainer.callbacks.hook", hook)
    assert done.status == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: KeyError: 'missing' (foreign_errors.py, line ")
    assert done.err.splitlines()[-1] == line


def test_error_in_building_is_one_line(run_script: Script) -> None:
    net = ("--model.net", "foreign_errors.FailingNet", "--model.net.error", "KeyError", "--model.net.built", "false")
    error = run_script("train", *BASE, *net).error
    assert error.startswith("error: KeyError: 'missing' (foreign_errors.py, line ")


def test_traceback_on_request(run_script: Script) -> None:
    net = ("--model.net", "foreign_errors.FailingNet", "--model.net.error", "OverflowError")
    with pytest.raises(OverflowError):
        run_script("train", *BASE, *QUIET, "--trainer.logger", "false", *net, THINNED_TRACEBACK="1")
