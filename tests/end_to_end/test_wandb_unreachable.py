"""With an API key but no W&B server that takes the run, it is logged offline, says one line, and ends in time."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from wandb_server import closed, served, silent

Script = Callable[..., Any]

CONFIGS = Path(__file__).parents[2] / "configs"
KEY = "0123456789abcdef" * 2 + "fedcba98"
FAST = ("--config", CONFIGS / "debug/fast.yaml", "--config", CONFIGS / "logger/wandb.yaml")
TRAIN = ("--config", CONFIGS / "mlp_digits.yaml", *FAST, "--trainer.accelerator", "cpu")


@pytest.fixture
def train(start_script: Script) -> Callable[..., tuple[Any, float]]:
    """Trains with a key and a server at a port; returns what it did, and how many seconds it took."""

    def run(port: int, *options: object, **environment: str) -> tuple[Any, float]:
        began = time.monotonic()
        url = f"http://127.0.0.1:{port}"
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, **environment}
        finished = start_script("scripts/train.py", *TRAIN, *options, **settings)
        assert finished.status == 0, finished.err
        return finished, time.monotonic() - began

    return run


def assert_no_secrets(finished: Any) -> None:
    for secret in (KEY, os.environ["TEST_SECRET"]):
        assert [
            path for path in finished.cwd.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
        ] == []
        assert secret not in finished.out + finished.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closed", "silent", "500", "401"])
def test_no_server(kind: str, train: Callable[..., tuple[Any, float]]) -> None:
    with ExitStack() as stack:
        if kind in ("closed", "silent"):
            port = stack.enter_context(closed() if kind == "closed" else silent())
        else:
            port = stack.enter_context(served(int(kind))).server_port
        _, seconds_without = train(port, WANDB_MODE="offline")
        finished, seconds = train(port)
    assert seconds - seconds_without < 15
    (line,) = [line for line in finished.err.splitlines() if "W&B" in line]
    assert line.startswith(f"W&B: http://127.0.0.1:{port} does not confirm the API key (")
    assert ("not today" in line) == (kind == "401")
    assert len(list(finished.run.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert (finished.run / "metrics.json").exists()
    assert_no_secrets(finished)


@pytest.mark.slow
def test_server_that_dies(train: Callable[..., tuple[Any, float]]) -> None:
    """The run goes on, and what it did not send can be sent to the next server."""
    with served() as server:

        def die() -> None:
            server.streaming.wait()
            server.status = 503

        threading.Thread(target=die, daemon=True).start()
        options = ("--trainer.max_epochs", 20, "--trainer.log_every_n_steps", 1)
        finished, seconds = train(server.server_port, *options, WANDB_FINISH_TIMEOUT="5")
        server.streaming.set()
        assert server.status == 503
    assert (finished.run / "metrics.json").exists()
    assert seconds < 90
    assert_no_secrets(finished)
    (log,) = finished.run.glob("wandb/run-*/*.wandb")
    with served() as other:
        sync = [sys.executable, "-m", "wandb", "sync", log.parent]
        url = {"WANDB_BASE_URL": f"http://127.0.0.1:{other.server_port}", "WANDB_API_KEY": KEY}
        subprocess.run(sync, env={**os.environ, **url}, check=True, capture_output=True, timeout=60)
        assert any(b"mc/nll" in content for _, content in other.requests)


@pytest.mark.slow
def test_server_that_takes_the_run(train: Callable[..., tuple[Any, float]]) -> None:
    """Nothing but its header holds the key, and nothing the environment."""
    with served() as server:
        finished, _ = train(server.server_port)
    assert any(b"mc/nll" in content for _, content in server.requests)
    for secret in (KEY, os.environ["TEST_SECRET"]):
        assert not any(secret.encode() in content for _, content in server.requests)
    assert "offline" not in finished.err
    assert len(list(finished.run.glob("wandb/run-*/*.wandb"))) == 1
    assert_no_secrets(finished)
