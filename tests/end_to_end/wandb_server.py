"""Servers in the place of W&B's: one that takes a run, and several that do not."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
