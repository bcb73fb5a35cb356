"""The first process of a sandbox container: does what the session's Durable Object asks on port 8080.

    GET /            the state, as JSON
    PUT /workspace   the files of an earlier container, or none; once, and a fresh container starts no runner before it
    POST /runners    puts files in place and starts a runner; answers with its output, up to its end
    GET /runners     the output from now on of the runners there are, up to the end of the last
    GET /workspace   the files, as one archive; not while there is a runner

The body of a start is one JSON line, `{"files": [[path, size], ...], "stdin": size}`, the files, and the job, which
goes to the runner's stdin and nowhere else.

The agent's programs reach this port too, so every request carries a key. The first request says what it is: it comes
from the Durable Object, before there is a runner and thus a program of the agent's. This process and the runners are
hidden from the agent's shell, which has the same user, by an interpreter that nobody may read (the Dockerfile says
how). What the requests do is in sandbox.py. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from _shared import runner_process
from sandbox import CHUNK_BYTES, Output, Refused, Sandbox

PORT = 8080
_MAX_START_BYTES = 32 << 20  # the files, of which a host brings 20 MiB at most, and the job
_PR_SET_NO_NEW_PRIVS = 38


class Handler(BaseHTTPRequestHandler):
    """The five requests."""

    protocol_version = "HTTP/1.1"
    timeout = 600.0  # of a client that neither sends nor reads
    sandbox: Sandbox
    key: str | None = None
    _key_lock = threading.Lock()

    def do_GET(self) -> None:
        self._route({"/": self._state, "/runners": self._follow, "/workspace": self._archive})

    def do_POST(self) -> None:
        self._route({"/runners": self._start})

    def do_PUT(self) -> None:
        self._route({"/workspace": self._restore})

    def _route(self, routes: dict[str, Callable[[], None]]) -> None:
        try:
            if not self._is_known():
                raise Refused(401, "the key is missing or wrong")
            if (answer := routes.get(urlsplit(self.path).path)) is None:
                raise Refused(404, "there is no such thing here")
            answer()
        except Refused as error:
            self.close_connection = True  # its body may be unread
            self._reply(error.status, str(error).encode(), "text/plain; charset=utf-8")
        except OSError as error:  # a full disk, or a client that left
            self.close_connection = True
            with contextlib.suppress(OSError):
                self._reply(507, (error.strerror or "input or output failed").encode(), "text/plain; charset=utf-8")

    def _is_known(self) -> bool:
        given = self.headers.get("authorization", "")
        with self._key_lock:
            if Handler.key is None and given:
                Handler.key = given
            return Handler.key is not None and hmac.compare_digest(Handler.key.encode(), given.encode())

    def _state(self) -> None:
        self._reply(200, json.dumps(self.sandbox.state()).encode(), "application/json")

    def _start(self) -> None:
        size = self._content_length()
        if size > _MAX_START_BYTES:
            raise Refused(413, "the job and its files are too large")
        body = io.BytesIO(self.rfile.read(size))
        sizes = json.loads(body.readline())
        files = {name: body.read(size) for name, size in sizes["files"]}
        self._stream(self.sandbox.start(files, body.read(sizes["stdin"])))

    def _follow(self) -> None:
        self._stream(self.sandbox.follow())

    def _archive(self) -> None:
        most = int(parse_qs(urlsplit(self.path).query)["most"][0])
        with self.sandbox.archive(most) as (file, size, sha256):
            self.send_response(200)
            self.send_header("content-type", "application/gzip")
            self.send_header("content-length", str(size))
            self.send_header("x-sha256", sha256)
            self.end_headers()
            while chunk := file.read(CHUNK_BYTES):
                self.wfile.write(chunk)

    def _restore(self) -> None:
        self.sandbox.restore(self.rfile, self._content_length(), self.headers.get("x-sha256", ""))
        self._reply(200, b"", "text/plain")

    def _content_length(self) -> int:
        length = self.headers.get("content-length", "")
        if not length.isdecimal():
            raise Refused(411, "the length of the body is missing")
        return int(length)

    def _stream(self, output: Output) -> None:
        """Lines as they come, up to the end of the last runner."""
        try:
            self.send_response(200)
            self.send_header("content-type", "application/x-ndjson")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            while line := output.get():
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        finally:
            self.sandbox.unfollow(output)

    def _reply(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent: requests are the Durable Object's business, and it logs."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no news; anything else is a bug, and its traceback goes to the container's log."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def main() -> None:
    runner_process.hide()
    # No setuid program helps anybody here.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")
    environ = dict(os.environ)
    Handler.sandbox = Sandbox(Path(environ["SANDBOX_WORKDIR"]), Path(environ["SANDBOX_STATE_DIR"]), environ)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    with Server(("", PORT), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told.wait()
        Handler.sandbox.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
