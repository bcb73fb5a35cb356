"""What ships works alone: every folder is copied to an empty directory, installed from its own lock and started there.

A process that imports the tree would hide a file that the copy lacks; so the copy runs in a process of its own, in its
own environment, with nothing that leads back here.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.providers import docker_support
from tests.providers.containers_dev import ContainersDev
from tests.providers.workers_dev import WorkersDev, settings_for, workspace
from tools.emulator import Emulator, Step, call, end, repeat_output, tools
from tools.sync_shared import ROOT, VENDORED, folders, own_modules, typescript_folders

SERVE_SECONDS = 180.0  # on a busy machine; a few, else
WAKE_SECONDS = 45.0  # from a webhook to its poll: below the minute after which a sweep would poll without one
WEBHOOK_PATH = "/webhook"
SERVER = ["main.py", "--host", "127.0.0.1", "--port", "0", "--no-poll"]
# How a folder is started here, and the settings it needs besides the shared ones. None: its platform starts it, and the
# test of that provider does so against its double.
SERVERS: dict[str, dict[str, str] | None] = {
    "daytona": None,  # against its double: tests/providers/test_daytona_main.py
    "docker": {"DOCKER_IMAGE": "{image}"},
    "local": {"LOCAL_ROOT": "{directory}/sandboxes", "ALLOW_UNISOLATED_TOOLS": "true"},
    "modal": None,
    "vercel": None,  # tests/providers/test_vercel_build.py: `vercel build` of a copy, run by Vercel's runtime
}
# How what answers is asked for there.
WORKERS: dict[str, list[Step]] = {
    "cloudflare-container": [tools(call("bash", command="echo the answer is $((6 * 7))"))],
    "cloudflare-worker": [
        tools(call("write", file_path="answer", content="the answer is 42")),
        tools(call("read", file_path="answer")),
    ],
}
SERVED = [
    pytest.param(name, marks=docker_support.needs_docker if name == "docker" else [])
    for name, settings in SERVERS.items()
    if settings is not None
]


@dataclass(frozen=True)
class Copy:
    """A folder outside the tree, with its own environment."""

    folder: Path
    python: Path

    def environ(self, **settings: str) -> dict[str, str]:
        """What a person's shell has, without whatever leads back to the tree, and with `settings`."""
        theirs = {key: value for key, value in os.environ.items() if key in {"HOME", "LANG", "SSL_CERT_FILE"}}
        return theirs | {"PATH": f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin"} | settings


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.is_file() else shutil.which("uv") or "uv"


def copy_out(folder: Path, directory: Path) -> Copy:
    copy, environment = directory / folder.name, directory / "environment"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__", ".*_cache", ".venv", ".env"))
    environ = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [_uv(), "sync", "--frozen", "--python", sys.executable],
        cwd=copy,
        env=environ | {"UV_PROJECT_ENVIRONMENT": str(environment)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Copy(copy, environment / "bin/python")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Copy]:
    """The copies that this process has made so far, by folder."""
    return {}


@pytest.fixture
def copy(request: pytest.FixtureRequest, copies: dict[str, Copy], tmp_path_factory: pytest.TempPathFactory) -> Copy:
    name = request.param
    if name not in copies:
        copies[name] = copy_out(ROOT / "providers" / name, tmp_path_factory.mktemp("copy"))
    return copies[name]


@contextlib.contextmanager
def _emulator(copy: Copy) -> Iterator[Emulator]:
    """The control plane, where this folder's sandboxes reach it."""
    if copy.folder.name != "docker":
        with Emulator() as emulator:
            yield emulator
        return
    with Emulator(host=docker_support.gateway()) as emulator:
        try:
            yield emulator
        finally:
            docker_support.remove_all(emulator.environment_id)


@contextlib.contextmanager
def _running(copy: Copy, emulator: Emulator, directory: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    image = docker_support.image(copy.folder) if copy.folder.name == "docker" else None
    own = {
        name: value.format(directory=directory, image=image)
        for name, value in (SERVERS[copy.folder.name] or {}).items()
    }
    settings = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": emulator.webhook_key,
        "SANDBOX_MAX_IDLE_SECONDS": "1",
    }
    log = directory / "log.txt"
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [str(copy.python), *argv],
            cwd=copy.folder,
            env=copy.environ(**settings, **own),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(SERVE_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()
        sys.stderr.write(log.read_text(encoding="utf-8"))  # pytest shows it when the test fails


def _say(emulator: Emulator, command: str) -> str:
    """What the session's agent says after it ran `command` in its sandbox."""
    session = emulator.create_session()
    emulator.say(session, f"!{command}")
    emulator.wait_idle(session, SERVE_SECONDS)
    return str(emulator.events(session, "agent.message"))


def _status_of_an_unsigned_webhook(address: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", WEBHOOK_PATH, body=b"{}")
        return connection.getresponse().status


def test_every_folder_is_copied_out() -> None:
    assert sorted(SERVERS) == [folder.name for folder in folders(ROOT)]
    assert sorted(WORKERS) == [folder.name for folder in typescript_folders(ROOT)]


@pytest.mark.parametrize("copy", SERVERS, indirect=True)
def test_every_module_of_a_copy_can_be_imported(copy: Copy) -> None:
    files = [*own_modules(copy.folder), *sorted((copy.folder / VENDORED).glob("*.py"))]
    modules = [".".join(path.relative_to(copy.folder).with_suffix("").parts) for path in files]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    run = subprocess.run(
        [str(copy.python), "-W", "error", "-c", program, *modules],
        cwd=copy.folder,
        env=copy.environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("copy", SERVED, indirect=True)
def test_a_copy_serves_a_session_when_a_signed_webhook_arrives(copy: Copy, tmp_path: Path) -> None:
    with _emulator(copy) as emulator, _running(copy, emulator, tmp_path, *SERVER) as process:
        assert process.stdout is not None
        ready = re.search(r"listening on http://(127\.0\.0\.1:\d+)", process.stdout.readline())
        assert ready, "the server did not get ready"
        assert 400 <= _status_of_an_unsigned_webhook(ready[1]) < 500

        # Once the sweep at the start has polled and looks at the list, nothing but a webhook brings work for a minute.
        emulator.wait_until(lambda: any(each.operation == "work.list" for each in emulator.requests), SERVE_SECONDS)

        asked = len(emulator.requests)
        emulator.set_webhook_url(f"http://{ready[1]}{WEBHOOK_PATH}")
        assert "the answer is 42" in _say(emulator, "echo the answer is $((6 * 7))")
        assert emulator.deliveries[0].is_ok
        polled = next(each for each in emulator.requests[asked:] if each.operation == "work.poll")
        assert (polled.at - emulator.deliveries[0].at).total_seconds() < WAKE_SECONDS


@pytest.mark.parametrize("copy", SERVED, indirect=True)
def test_a_copy_serves_a_session_as_an_always_on_poller(copy: Copy, tmp_path: Path) -> None:
    with _emulator(copy) as emulator, _running(copy, emulator, tmp_path, "-m", f"{VENDORED}.worker"):
        assert "the answer is 42" in _say(emulator, "echo the answer is $((6 * 7))")


@contextlib.contextmanager
def _dev(name: str, copy: Path, directory: Path) -> Iterator[WorkersDev]:
    if name != "cloudflare-container":
        with WorkersDev(copy, directory, None) as dev:
            yield dev
        return
    containers = ContainersDev(copy, directory, None)
    try:
        with containers:
            yield containers
    finally:
        containers.remove_all()


@pytest.mark.timeout(400)  # the first test of a process may install and build
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=docker_support.needs_docker if "container" in name else []) for name in WORKERS],
)
def test_a_copy_of_a_worker_serves_a_session_when_a_signed_webhook_arrives(name: str, tmp_path: Path) -> None:
    """As its README says: `.env` made of `.env.example`, `npx wrangler dev`."""
    folder, copy = ROOT / "providers" / name, tmp_path / "copy"
    left_behind = shutil.ignore_patterns("node_modules", ".wrangler", ".env", ".dev.vars")
    shutil.copytree(folder, copy, ignore=left_behind)
    (copy / "node_modules").symlink_to(workspace(name) / "node_modules")  # what `npm ci` made of this very lock
    with Emulator(host=docker_support.gateway() if "container" in name else "127.0.0.1") as emulator:
        env = (copy / ".env.example").read_text(encoding="utf-8")
        for key, value in settings_for(emulator).items():
            env, count = re.subn(rf"^(?:# )?{key}=.*$", f"{key}={value}", env, flags=re.MULTILINE)
            assert count == 1, f".env.example has no place for {key}"
        (copy / ".env").write_text(env, encoding="utf-8")
        with _dev(name, copy, tmp_path) as dev:
            assert 400 <= dev.request("POST", WEBHOOK_PATH, content=b"{}").status_code < 500
            emulator.set_webhook_url(f"{dev.url}{WEBHOOK_PATH}")
            session = emulator.create_session()
            emulator.set_script(session, [*WORKERS[name], repeat_output, end()])
            emulator.say(session, "go")
            emulator.wait_idle(session, 60)
            assert "the answer is 42" in str(emulator.events(session, "agent.message"))
            assert emulator.deliveries[0].is_ok
