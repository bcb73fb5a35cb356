"""Upstash's REST interface in front of a real redis-server: what it says comes from Redis, byte for byte.

One command (POST / with a JSON array, or a path), /pipeline and /multi-exec; base64 answers when the client asks for
them; its error shapes. redis-server listens on a Unix socket only.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.fakes.server import Server

TOKEN = "upstash-token-of-the-double"
_START_SECONDS = 60.0


def missing() -> str | None:
    """Why there can be no Redis here, or None."""
    return None if shutil.which("redis-server") else "redis-server is not installed"


needs_redis = pytest.mark.skipif(missing() is not None and not os.environ.get("CI"), reason=str(missing()))


class RedisError(Exception):
    """What Redis answered with a minus in front."""


class RedisServer:
    """A redis-server with its data in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.socket = directory / "redis.sock"
        directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self._directory),
            "save": "",
            "appendonly": "no",
        }
        command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "ready to accept connections" in line.lower():
                return
        raise RuntimeError("redis-server did not start")

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=_START_SECONDS)

    def copy(self) -> bytes:
        """A backup of all it holds."""
        subprocess.run(["redis-cli", "-s", str(self.socket), "SAVE"], check=True, stdout=subprocess.DEVNULL)
        return (self._directory / "dump.rdb").read_bytes()

    def restore(self, copy: bytes) -> None:
        """The backup's state again, whatever has happened since."""
        self.stop()
        (self._directory / "dump.rdb").write_bytes(copy)
        self.start()


class Upstash:
    """`with Upstash(directory) as upstash:`. Faults are attributes that a test sets."""

    def __init__(self, directory: Path) -> None:
        self.redis = RedisServer(directory)
        self.commands: list[list[str]] = []
        self.delay_seconds = 0.0
        self.is_down = False
        self.answers_to_lose = 0
        """So many requests are carried out and then not answered."""
        routes = [Route("/{path:path}", self._handle, methods=["GET", "POST"])]
        self._server = Server(Starlette(routes=routes))
        self.url = self._server.url

    def __enter__(self) -> Upstash:
        self.redis.start()
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()
        self.redis.stop()

    def environ(self) -> dict[str, str]:
        return {"UPSTASH_REDIS_REST_URL": self.url, "UPSTASH_REDIS_REST_TOKEN": TOKEN}

    async def _handle(self, request: Request) -> Response:
        await asyncio.sleep(self.delay_seconds)
        if self.is_down:
            return Response("<html>502 Bad Gateway</html>", 502, media_type="text/html")
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "WRONGPASS invalid or missing auth token"}, 401)
        path, body = request.path_params["path"].strip("/"), await request.body()
        try:
            several = path in ("pipeline", "multi-exec")
            commands = json.loads(body) if several else [json.loads(body) if not path else _from_path(path, body)]
            if not all(isinstance(command, list) and command for command in commands):
                raise ValueError("no command")
        except ValueError:
            return JSONResponse({"error": "ERR failed to parse command"}, 400)
        self.commands += commands
        replies = await self._run([["MULTI"], *commands, ["EXEC"]] if path == "multi-exec" else commands)
        if self.answers_to_lose:
            self.answers_to_lose -= 1
            self._server.hang_up(request)
        return _reply(path, replies, request.headers.get("upstash-encoding") == "base64")

    async def _run(self, commands: list[list[Any]]) -> list[Any]:
        reader, writer = await asyncio.open_unix_connection(str(self.redis.socket))
        try:
            writer.write(b"".join(_encoded(command) for command in commands))
            return [await _read(reader) for _ in commands]
        finally:
            writer.close()


def _from_path(path: str, body: bytes) -> list[Any]:
    return [*path.split("/"), *([body.decode()] if body else [])]


def _reply(path: str, replies: list[Any], in_base64: bool) -> Response:
    headers = {"Upstash-Sync-Token": "double"}
    if path == "pipeline":
        return JSONResponse([_item(reply, in_base64) for reply in replies], headers=headers)
    last = replies[-1]
    if path == "multi-exec" and not isinstance(last, RedisError):
        return JSONResponse([_item(reply, in_base64) for reply in last], headers=headers)
    return JSONResponse(_item(last, in_base64), 400 if isinstance(last, RedisError) else 200, headers=headers)


def _item(value: Any, in_base64: bool) -> dict[str, Any]:
    return {"error": str(value)} if isinstance(value, RedisError) else {"result": _shown(value, in_base64)}


def _shown(value: Any, in_base64: bool) -> Any:
    if isinstance(value, list):
        return [_shown(each, in_base64) for each in value]
    if isinstance(value, str):  # a status; "OK" alone is never encoded
        value = value if value == "OK" or not in_base64 else value.encode()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode() if in_base64 else value.decode(errors="replace")
    return value


def _encoded(command: Iterable[Any]) -> bytes:
    """A command as Redis reads it (RESP)."""
    words = [word.encode() if isinstance(word, str) else json.dumps(word).encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


async def _read(reader: asyncio.StreamReader) -> Any:
    line = (await reader.readuntil(b"\r\n"))[:-2]
    kind, rest = line[:1], line[1:]
    if kind == b"+":
        return rest.decode()
    if kind == b"-":
        return RedisError(rest.decode())
    if kind == b":":
        return int(rest)
    if rest == b"-1":
        return None
    if kind == b"$":
        return (await reader.readexactly(int(rest) + 2))[:-2]
    return [await _read(reader) for _ in range(int(rest))]
