"""The folder as Vercel builds and runs it: the real `vercel build`, and its output in Vercel's own Python runtime.

What stands in for the platform is small: it puts the function's files in place, starts the runtime with a socket for
its messages, and adds the platform's headers to each request.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.clients.toolchains import locked, needed, run
from tests.fakes.server import Server
from tests.providers.vercel_support import VERCEL
from tools.sync_shared import ROOT

CLI = Path(__file__).with_name("vercel_cli")
CACHE = ROOT / ".tools" / "vercel"
FUNCTION = ".vercel/output/functions/fastapi.func"
PYTHON = ".vercel/python/.venv/bin/python3"
ROOT_NAME = "function"
DURATION_SECONDS = 300.0  # as vercel.json says
_START_SECONDS = 60.0
_NOT_OURS = {"host", "content-length", "transfer-encoding", "connection"}


def built() -> Path:
    """A copy of the folder with `vercel build` done to it; made once, and again when something of it changes."""
    node, python = needed("node"), _python()
    cli = _made("cli", CLI, run([node, "--version"], CLI), _install)

    def build(copy: Path) -> None:
        (copy / ".vercel").mkdir()
        project = {"projectId": "prj_double", "orgId": "team_double", "settings": {"framework": "fastapi"}}
        (copy / ".vercel/project.json").write_text(json.dumps(project))
        path = f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"  # its Python, and our uv
        environ = {"HOME": os.environ.get("HOME", str(CACHE)), "PATH": path, "VERCEL_TELEMETRY_DISABLED": "1"}
        environ |= {name: os.environ[name] for name in ("SSL_CERT_FILE", "UV_SYSTEM_CERTS") if name in os.environ}
        command = [node, str(cli / "node_modules/vercel/dist/index.js"), "build", "--token", "none", "--yes"]
        done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        _put_in_place(copy)

    return _made("build", VERCEL.path, f"{cli.name} {python}", build)


def _put_in_place(build: Path) -> None:
    """The function's directory as the platform makes it; compiled, or each start would do it again."""
    root = build / ROOT_NAME
    shutil.copytree(build / FUNCTION, root)
    for target, source in json.loads((root / ".vc-config.json").read_text())["filePathMap"].items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        os.link((build / source).resolve(), root / target)
    run([str(build / PYTHON), "-m", "compileall", "-q", "."], root)


def _python() -> Path:
    """The Python that .python-version asks for; without it the test fails on CI and skips elsewhere."""
    version = (VERCEL.path / ".python-version").read_text().strip()
    found = [Path(path) for path in [shutil.which(f"python{version}")] if path]
    pyenv = [Path.home() / ".pyenv/versions", Path(sys.base_prefix).parent]  # pyenv's: also with another HOME
    found += [path for root in pyenv for path in sorted(root.glob(f"{version}*/bin/python{version}"))]
    for path in found:  # a shim that is on the path may stand for nothing
        if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    reason = f"Python {version} is not installed, and Vercel's build needs it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _install(into: Path) -> None:
    # Not `npm ci`: the package's optional parts for other systems are not all published, so no lock can hold them.
    run([needed("npm"), "install", "--no-save", "--no-audit", "--no-fund", "--prefer-offline"], into)


def _made(name: str, source: Path, key: str, make: Callable[[Path], None]) -> Path:
    files = run(["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"], source).splitlines()
    digest = hashlib.sha256(key.encode())
    for file in sorted(files):
        digest.update(file.encode() + b"\0" + (source / file).read_bytes())
    finished = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / f"{name}.lock"):
        if not finished.exists():
            unfinished = CACHE / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            for file in files:
                (unfinished / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / file, unfinished / file)
            make(unfinished)
            unfinished.rename(finished)
    return finished


class Instance:
    """One instance of the built function, run by Vercel's runtime in a process of its own."""

    def __init__(self, build: Path, directory: Path, environ: Mapping[str, str]) -> None:
        self._build = build
        self._directory = directory
        self._environ = environ
        self.ended: list[str] = []
        """Invocations that are over: the answer is sent and `wait_until` has nothing more."""
        self.said = ""
        """The function's log, as the platform gets it."""

    async def start(self) -> None:
        self._started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        socket = self._directory / "ipc.sock"
        self._server = await asyncio.start_unix_server(self._listen, str(socket))
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._directory),
            "VERCEL": "1",
            "VERCEL_IPC_PATH": str(socket),
        }
        environ |= {**config(self._build)["environment"], **self._environ}
        command = [str(self._build / PYTHON), "-c", "import vc__handler__python"]
        root = self._build / ROOT_NAME
        self._process = subprocess.Popen(command, cwd=root, env=environ)  # noqa: ASYNC220 - it only forks
        async with asyncio.timeout(_START_SECONDS):
            self.port = await self._started

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        self._server.close()
        sys.stderr.write(self.said)  # pytest shows it when the test fails

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the runtime tells the platform; each message ends with a zero byte."""
        try:
            while True:
                message = json.loads((await reader.readuntil(b"\0"))[:-1])
                if message["type"] == "server-started":
                    self._started.set_result(message["payload"]["httpPort"])
                elif message["type"] == "log":
                    self.said += base64.b64decode(message["payload"].get("message", "")).decode(errors="replace") + "\n"
                elif message["type"] == "end":
                    self.ended.append(message["payload"]["context"]["invocationId"])
        except asyncio.IncompleteReadError:
            writer.close()


class Platform:
    """The public address: passes requests on to the instance in front, with the platform's headers."""

    def __init__(self, oidc_token: str) -> None:
        self.instances: list[Instance] = []
        self._oidc_token = oidc_token
        self._server = Server(Starlette(routes=[Route("/{path:path}", self._pass_on, methods=["GET", "POST"])]))
        self.url = self._server.url

    def __enter__(self) -> Platform:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()

    async def _pass_on(self, request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in _NOT_OURS}
        deadline = datetime.now(UTC) + timedelta(seconds=DURATION_SECONDS)
        headers |= {
            "x-vercel-oidc-token": self._oidc_token,
            "x-vercel-internal-invocation-id": uuid.uuid4().hex,
            "x-vercel-internal-request-id": "1",
            "x-vercel-internal-span-id": "0",
            "x-vercel-internal-trace-id": "0",
            "x-vercel-internal-deadline": deadline.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }
        url = f"http://127.0.0.1:{self.instances[0].port}{request.url.path}"
        async with httpx.AsyncClient(timeout=60.0) as client:
            reply = await client.request(request.method, url, content=await request.body(), headers=headers)
        shown = {name: value for name, value in reply.headers.items() if name not in _NOT_OURS}
        return Response(reply.content, reply.status_code, shown)


def config(build: Path) -> dict[str, Any]:
    """What the build has made of vercel.json, and of the function."""
    output = json.loads((build / ".vercel/output/config.json").read_text())
    function = json.loads((build / FUNCTION / ".vc-config.json").read_text())
    return {**function, "crons": output["crons"]}
