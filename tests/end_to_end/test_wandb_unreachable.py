"""With an API key but no W&B server that takes the run, it is logged offline, says one line, and ends in time."""

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb

from thinned.runs.logger_settings import wandb_offline_reason

Script = Callable[..., Any]

CONFIGS = Path(__file__).parents[2] / "configs"
KEY = "0123456789abcdef" * 2 + "fedcba98"
FAST = ("--config", CONFIGS / "debug/fast.yaml", "--config", CONFIGS / "logger/wandb.yaml")
TRAIN = ("--config", CONFIGS / "mlp_digits.yaml", *FAST, "--trainer.accelerator", "cpu")


VIEWER = {"id": "1", "username": "anyone", "entity": "anyone", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "2", "name": "thinned", "entity": {"id": "3", "name": "anyone"}}


class Server(ThreadingHTTPServer):
    """Answers with the status; with 200, as much as a run needs. Keeps what it was sent."""

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.requests: list[tuple[str, bytes]] = []
        self.streaming = threading.Event()  # history has been sent

    def handle_error(self, *_: object) -> None:
        """Clients may break off."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        self.server.requests.append((self.path, content))
        answer: dict[str, Any] = {"errors": [{"message": "not today"}]}
        if self.server.status == 200:
            answer = {"data": self._data(json.loads(content))} if self.path == "/graphql" else {}
        body = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path.endswith("file_stream"):
            self.server.streaming.set()

    do_GET = do_POST = do_PUT = _answer

    def _data(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            bucket = {
                "id": "4",
                "name": variables.get("name"),
                "displayName": "run",
                "config": "{}",
                "project": PROJECT,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            url = f"http://127.0.0.1:{self.server.server_port}/files"
            files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "4", "uploadHeaders": [], "files": files}}
        return {"viewer": VIEWER} if "viewer" in query else {"entity": None}

    def log_message(self, *_: object) -> None:
        """Nothing to the terminal."""


@contextmanager
def served(status: int = 200) -> Iterator[Server]:
    """A server while the block runs."""
    with Server(status) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def silent() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield listener.getsockname()[1]


@contextmanager
def closed() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def server(kind: str) -> Iterator[int]:
    """The port of one that takes no run: closed, silent, or the status that it answers."""
    if kind in ("closed", "silent"):
        with closed() if kind == "closed" else silent() as port:
            yield port
    else:
        with served(int(kind)) as answering:
            yield answering.server_port


@pytest.fixture
def train(start_script: Script) -> Script:
    """Trains with a key and a server at a port."""

    def run(port: int, *options: object, **environment: str) -> Any:
        url = f"http://127.0.0.1:{port}"
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, **environment}
        finished = start_script("scripts/train.py", *TRAIN, *options, **settings)
        assert finished.status == 0, finished.err
        return finished

    return run


def assert_no_secrets(finished: Any) -> None:
    for secret in (KEY, os.environ["TEST_SECRET"]):
        assert [
            path for path in finished.cwd.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
        ] == []
        assert secret not in finished.out + finished.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closed", "silent", "500", "401"])
def test_decision_takes_no_longer_than_20_seconds(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with server(kind) as port:
        for name, value in {"API_KEY": KEY, "BASE_URL": f"http://127.0.0.1:{port}", "DIR": str(tmp_path)}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        wandb.setup()
        began = time.monotonic()
        assert "does not confirm the API key" in str(wandb_offline_reason())
        assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closed", "silent", "500", "401"])
def test_no_server(kind: str, train: Script) -> None:
    with server(kind) as port:
        finished = train(port)
    (line,) = [line for line in finished.err.splitlines() if line.startswith("W&B: ")]
    assert line.startswith(f"W&B: http://127.0.0.1:{port} does not confirm the API key (")
    assert "this run is logged offline" in line
    assert ("not today" in line) == (kind == "401")
    assert len(list(finished.run.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert (finished.run / "metrics.json").exists()
    assert_no_secrets(finished)


@pytest.mark.slow
def test_server_that_dies(train: Script) -> None:
    """The run goes on, and what it did not send can be sent to the next server."""
    with served() as taking:

        def die() -> None:
            taking.streaming.wait()
            taking.status = 503

        threading.Thread(target=die, daemon=True).start()
        options = ("--trainer.max_epochs", 20, "--trainer.log_every_n_steps", 1)
        finished = train(taking.server_port, *options, WANDB_FINISH_TIMEOUT="5")
        taking.streaming.set()
        assert taking.status == 503
    assert (finished.run / "metrics.json").exists()
    assert "without the table test/most_uncertain" in finished.err
    assert_no_secrets(finished)
    (log,) = finished.run.glob("wandb/run-*/*.wandb")
    with served() as other:
        sync = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", log.parent]
        url = {"WANDB_BASE_URL": f"http://127.0.0.1:{other.server_port}", "WANDB_API_KEY": KEY}
        subprocess.run(sync, cwd=finished.cwd, env={**os.environ, **url}, check=True, capture_output=True, timeout=60)
        assert any(b"mc/nll" in content for _, content in other.requests)


@pytest.mark.slow
def test_server_that_takes_the_run(train: Script) -> None:
    """Nothing but its header holds the key, and nothing the environment."""
    with served() as taking:
        finished = train(taking.server_port)
    assert any(b"mc/nll" in content for _, content in taking.requests)
    for secret in (KEY, os.environ["TEST_SECRET"]):
        assert not any(secret.encode() in content for _, content in taking.requests)
    assert "logged offline" not in finished.err
    assert len(list(finished.run.glob("wandb/run-*/*.wandb"))) == 1
    assert_no_secrets(finished)
