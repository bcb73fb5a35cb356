"""What the tests of the Docker provider share: the Engine, the image, providers whose things are removed afterwards.

Everything runs on a real Engine. Each test has a namespace of its own there, so that tests may run at once, beside
whatever else the Engine runs; at its end nothing of that namespace is left.
"""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.clients.toolchains import golang
from tests.contract import CUSTOM_TOOLS
from tests.folders import load_folder

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "providers/docker"
DOCKER = load_folder("docker")
ENGINE_URL = "unix:///var/run/docker.sock"
STAND_IN = Path(__file__).with_name("local_runner.py")
PATIENCE_SECONDS = 60.0
T = TypeVar("T")
TOOLS_FILE = "/opt/tools/my_tools.py"


def docker(*arguments: str, stdin: str | None = None, check: bool = True, env: dict[str, str] | None = None) -> str:
    """What the Docker command prints."""
    done = subprocess.run(
        ["docker", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )
    if check and done.returncode:
        raise RuntimeError(f"docker {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _problem() -> str | None:
    try:
        docker("version")
    except (OSError, RuntimeError) as error:
        return f"no Docker Engine (tools/docker_engine.sh starts one, as root on Debian): {error}"
    return None


PROBLEM = _problem()
# On CI nothing may be skipped: there the tests run, and fail with the reason.
needs_docker = pytest.mark.skipif(PROBLEM is not None and not os.environ.get("CI"), reason=str(PROBLEM))


@cache
def gateway() -> str:
    """This machine's address on the Engine's default bridge: the egress proxy reaches it, and nobody beyond does."""
    (config,) = json.loads(docker("network", "inspect", "bridge"))[0]["IPAM"]["Config"]
    address: str = config["Gateway"]
    return address


@cache
def image(folder: Path = FOLDER) -> str:
    """The folder's image, built by its Dockerfile as its README says. The layer cache makes a second build cheap."""
    return _build(folder, *_on_base())


@cache
def image_with(*arguments: str) -> str:
    """The same with these build arguments. Its own name: the layers stay apart from the usual image's."""
    with tempfile.TemporaryDirectory() as directory:
        context = Path(directory, "-".join(arguments))
        shutil.copytree(FOLDER, context, ignore=_LEFTOVERS)
        return _build(context, *_on_base(), *arguments)


_LEFTOVERS = shutil.ignore_patterns("__pycache__", ".*_cache", ".venv", ".env")


@cache
def image_with_tools() -> str:
    """The same with custom tools in it, as the README says."""
    with tempfile.TemporaryDirectory() as directory:
        context = Path(directory, "with-tools")
        context.mkdir()
        (context / "my_tools.py").write_text(CUSTOM_TOOLS, encoding="utf-8")
        (context / "Dockerfile").write_text(f"FROM {image()}\nCOPY my_tools.py {TOOLS_FILE}\n", encoding="utf-8")
        return _build(context)


@cache
def image_with_ant() -> str:
    """The folder's image with an `ant`, from an archive beside the Dockerfile, as the README says."""
    with tempfile.TemporaryDirectory() as directory:
        context = Path(directory, "with-ant")
        shutil.copytree(FOLDER, context, ignore=_LEFTOVERS)
        version, archive = ant_archive()
        (context / f"ant_{version}_linux_{ARCHITECTURE}.tar.gz").write_bytes(archive)
        digest = hashlib.sha256(archive).hexdigest()
        return _build(context, *_on_base(), f"ANT_VERSION={version}", f"ANT_SHA256={digest}")


ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


@cache
def ant_archive() -> tuple[str, bytes]:
    """Version and archive of the `ant` that ANT names; else of our own small program around the Go SDK, the code that
    `ant beta:worker` is a command line for (tests/clients/README.md says why CI has no `ant`)."""
    ant = Path(os.environ.get("ANT") or golang()[0])
    said = subprocess.run([ant, "--version"], capture_output=True, text=True, check=True).stdout.split()
    content = io.BytesIO()
    # No times in it: the same program makes the same archive, and finds its layers.
    with gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as files:
        member = tarfile.TarInfo("ant")
        member.size, member.mode = ant.stat().st_size, 0o755
        with ant.open("rb") as program:
            files.addfile(member, program)
    return said[-1], content.getvalue()


def _on_base() -> list[str]:
    return [f"BASE_IMAGE={found}"] if (found := base()) else []


def base() -> str | None:
    """The base that tools/docker_engine.sh makes where there is no registry; else the Dockerfile's own."""
    script = (ROOT / "tools/docker_engine.sh").read_bytes()
    tag = f"sandboxes-test-base:{hashlib.sha256(script).hexdigest()[:12]}"
    return tag if docker("image", "ls", "-q", tag) else None


def _build(context: Path, *arguments: str) -> str:
    # A tag keeps it when somebody removes another name of the same image; one for each clone of this repository.
    tag = f"sandboxes-test:{hashlib.sha256(f'{ROOT} {context.name}'.encode()).hexdigest()[:12]}"
    with _one_at_a_time():
        options = [word for argument in arguments for word in ("--build-arg", argument)]
        return docker("build", "-q", "-t", tag, *options, str(context)).split()[-1]


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Several test processes build the same image: one does, the others find its layers."""
    path = Path(tempfile.gettempdir(), f"sandboxes-test-image-{os.getuid()}.lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def namespace(root: Path) -> str:
    """The name on the Engine of what lives below `root` in other providers' tests."""
    return f"test-{hashlib.sha256(str(root).encode()).hexdigest()[:12]}"


def make_provider(root: Path, settings: Any, **options: Any) -> Any:
    """A provider in the namespace of `root`."""
    if isinstance(options.get("runner"), Path):
        options["runner"] = runner(str(options["runner"]))
    return DOCKER.sandbox.DockerProvider(
        DOCKER.module("engine").Engine(options.pop("engine_url", ENGINE_URL)),
        **{
            "namespace": namespace(root),
            "base_url": settings.base_url,
            "image": image(),
            "keep_warm_seconds": settings.keep_warm_seconds,
            **options,
        },
    )


def runner(path: str) -> list[str]:
    """A Python file as the runner, started as the folder's own is."""
    *interpreter, _ = DOCKER.module("containers").RUNNERS["python"]
    return [*interpreter, path]


def remove_all(name: str) -> None:
    """Whatever the Engine has of a namespace, the way the README says."""
    label = f"label=sandboxes.environment={name}"
    if found := docker("ps", "-aq", "--filter", label).split():
        docker("rm", "-f", *found, check=False)
    if found := docker("volume", "ls", "-q", "--filter", label).split():
        docker("volume", "rm", "-f", *found, check=False)


class Sandboxes:
    """A provider in a namespace of its own whose runner is a stand-in, and runs in its sandboxes."""

    RUNNER = "/workspace/stand_in.py"

    def __init__(self, base_url: str | None = None, **options: Any) -> None:
        self.namespace = f"test-{uuid.uuid4().hex[:12]}"
        self.options = {
            "namespace": self.namespace,
            "base_url": base_url or f"http://{gateway()}:9",
            "image": image(),
            "runner": runner(self.RUNNER),
            "grace_seconds": 5,
            **options,
        }
        self.providers: list[Any] = []
        self.provider = self.another()

    def another(self, **options: Any) -> Any:
        """One more worker's provider in the same namespace."""
        chosen = self.options | options
        engine = DOCKER.module("engine").Engine(chosen.pop("engine_url", ENGINE_URL))
        self.providers.append(DOCKER.sandbox.DockerProvider(engine, **chosen))
        return self.providers[-1]

    async def close(self) -> None:
        for provider in self.providers:
            await provider.close()
        remove_all(self.namespace)

    async def begin(self, session_id: str, *commands: str, provider: Any = None, **job: Any) -> tuple[Any, str]:
        """Starts a runner and returns its sandbox and the run's id."""
        sandbox = await (provider or self.provider).acquire(session_id)
        run = uuid.uuid4().hex
        started = await sandbox.start(launch({"run": run, "commands": commands, **job}))
        assert started.outcome == "ready"
        return sandbox, run

    async def run(self, session_id: str, *commands: str, **job: Any) -> list[str]:
        """What `commands` print in the session's sandbox, run as the agent's are: below a runner."""
        sandbox, run = await self.begin(session_id, *commands, **job)
        done = await until(lambda: self._done(sandbox, run))
        out: list[str] = done["out"]
        return out

    async def _done(self, sandbox: Any, run: str) -> dict[str, Any] | None:
        for line in (await sandbox.tail(1000)).splitlines():
            if line.startswith('{"event": "done"') and json.loads(line)["run"] == run:
                return dict(json.loads(line))
        return None

    async def infos(self, provider: Any = None) -> list[Any]:
        return [info async for info in (provider or self.provider).sandboxes()]

    def name(self, session_id: str) -> str:
        return f"sandbox-{self.namespace}-{session_id}"

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(docker("inspect", name))
        return found[0]

    def left(self) -> list[str]:
        """The sandboxes' containers and volumes that the Engine has."""
        label = f"label=sandboxes.environment={self.namespace}"
        containers = docker("ps", "-a", "--filter", label, "--format", "{{.Names}}").split()
        volumes = docker("volume", "ls", "-q", "--filter", label).split()
        return [name for name in containers + volumes if not name.startswith("sandbox-egress-")]


def launch(job: Mapping[str, Any], files: dict[str, bytes] | None = None) -> Any:
    stand_in = {"stand_in.py": STAND_IN.read_bytes()}
    return DOCKER.shared("provider").Launch(stdin=json.dumps(job).encode(), files=files or stand_in)


async def until(look: Callable[[], Awaitable[T | None]]) -> T:
    """Looks at real state until there is what is looked for; fails when it does not come."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := await look()):
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.05)
    return found
