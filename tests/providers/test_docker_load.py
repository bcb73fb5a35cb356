"""The Docker provider under load and under fire: many sessions at once, a killed worker, an Engine that restarts or is
full. The Engine that is restarted and filled is one of this test's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.providers import docker_support as support
from tests.providers.docker_support import DOCKER, FOLDER, docker, needs_docker
from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, RECLAIM_SECONDS, World
from tools.emulator import Emulator, call, end, repeat_output, tools

pytestmark = needs_docker
needs_root = pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="a dockerd of its own needs root")
LaunchFailed = DOCKER.shared("errors").LaunchFailed
SESSIONS = 20
PATIENCE_SECONDS = 60.0


@pytest.mark.timeout(300)
async def test_twenty_sessions_at_once_are_each_served_in_their_own_sandbox(tmp_path: Path) -> None:
    with Emulator(host=support.gateway()) as emulator:
        world = World(emulator, DOCKER, support.make_provider, tmp_path / "sandboxes")
        try:
            host = world.host(SANDBOX_LAUNCH_CONCURRENCY="4")  # for a machine with few cores, which has other tests too
            sessions = [emulator.create_session() for _ in range(SESSIONS)]
            for session in sessions:
                emulator.say(session, f"!ls; echo {session} | tee file")
            await host.dispatcher.drain()
            waiting = (asyncio.to_thread(emulator.wait_idle, session, 3 * PATIENCE_SECONDS) for session in sessions)
            await asyncio.gather(*waiting)
            assert [host.said(session) for session in sessions] == sessions  # and no file of another session
            assert host.claims() == SESSIONS
            assert len([info async for info in host.provider.sandboxes()]) == SESSIONS
        finally:
            await world.close()
            support.remove_all(support.namespace(tmp_path / "sandboxes"))


@contextlib.contextmanager
def _worker(emulator: Emulator, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m _shared.worker` in the folder, as its README starts it. What still runs at the end is killed."""
    settings = {
        "ANTHROPIC_ENVIRONMENT_ID": emulator.environment_id,
        "ANTHROPIC_ENVIRONMENT_KEY": emulator.environment_key,
        "ANTHROPIC_BASE_URL": emulator.url,
        "DOCKER_IMAGE": support.image(),
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with log.open("ab") as output:
        worker = subprocess.Popen([sys.executable, "-m", "_shared.worker"], cwd=FOLDER, env=settings, stderr=output)
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


async def test_a_worker_killed_in_a_call_is_not_missed_and_the_next_one_finds_its_sandbox(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with Emulator(host=support.gateway()) as emulator:
        try:
            session = emulator.create_session()
            said = [tools(call("bash", command="echo began > file; sleep 3; echo done >> file; cat file"))]
            emulator.set_script(session, [*said, repeat_output, end()])
            with _worker(emulator, log) as worker:
                emulator.say(session, "go")
                await asyncio.to_thread(emulator.wait_until, lambda: _called(emulator, session), PATIENCE_SECONDS)
                worker.kill()  # -9: nothing of it is left, and the call is under way
            await asyncio.to_thread(emulator.wait_idle, session, PATIENCE_SECONDS)
            assert _said(emulator, session) == "began\ndone"  # the runner went on
            before = docker("ps", "-q", "--no-trunc", "--filter", f"label=sandboxes.session={session}")
            with _worker(emulator, log):
                await asyncio.to_thread(emulator.advance, LAPSE_SECONDS)  # as if hours had passed: the item ended
                emulator.say(session, "!cat file")
                await asyncio.to_thread(emulator.wait_idle, session, PATIENCE_SECONDS)
            assert _said(emulator, session) == "began\ndone"
            after = docker("ps", "-q", "--no-trunc", "--filter", f"label=sandboxes.session={session}")
            assert after == before != ""
        finally:
            support.remove_all(emulator.environment_id)


def _called(emulator: Emulator, session: str) -> bool:
    claimed = any(record.operation == "work.heartbeat" and record.status == 200 for record in emulator.requests)
    return claimed and bool(emulator.events(session, "agent.tool_use"))


def _said(emulator: Emulator, session: str) -> str:
    return str(emulator.events(session, "agent.message")[-1]["content"][0]["text"])


class PrivateEngine:
    """A dockerd of this test's own, on a bridge of its own, that knows nothing of the machine's."""

    def __init__(self, directory: Path, bridge: str, *options: str) -> None:
        self.directory = directory
        self._options = options
        self.url = f"unix://{directory}/docker.sock"
        self._bridge = bridge
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.directory / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                ["dockerd", "--host", self.url, "--data-root", f"{self.directory}/data", "--exec-root",
                 f"{self.directory}/exec", "--pidfile", f"{self.directory}/pid", "--bridge", self._bridge,
                 "--iptables=false", "--ip-masq=false", "--containerd", "", *self._options],
                stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(RuntimeError):
                docker("--host", self.url, "version")
                return
            assert self._process.poll() is None, (self.directory / "log.txt").read_text()[-3000:]
            assert time.monotonic() < deadline, (self.directory / "log.txt").read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> None:
        """As a service manager stops it: SIGTERM; its containers end in order."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE_SECONDS)
            self._process = None


@contextlib.contextmanager
def private_engine(*options: str, images: Sequence[str]) -> Iterator[tuple[PrivateEngine, str]]:
    """The Engine with the images in it, and this machine's address on its bridge."""
    bridge = f"sbx{uuid.uuid4().hex[:8]}"
    docker("network", "create", "-o", f"com.docker.network.bridge.name={bridge}", bridge)
    try:
        gateway = docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", bridge)
        with tempfile.TemporaryDirectory(prefix="sbx") as directory:  # short: a Unix socket's path is
            data = Path(directory, "data")
            data.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", data], check=True)
            engine = PrivateEngine(Path(directory), bridge, *options)
            try:
                engine.start()
                with subprocess.Popen(["docker", "save", *images], stdout=subprocess.PIPE) as save:
                    load = ["docker", "-H", engine.url, "load", "-q"]
                    subprocess.run(load, stdin=save.stdout, check=True, capture_output=True)
                yield engine, gateway
            finally:
                engine.stop()
                subprocess.run(["umount", "-R", data], check=True)
    finally:
        docker("network", "rm", bridge)


@pytest.fixture
def private() -> Iterator[tuple[PrivateEngine, str]]:
    with private_engine(images=[support.image()]) as engine:
        yield engine


@needs_root
@pytest.mark.timeout(240)
async def test_an_engine_that_restarts_or_is_full_loses_no_session(
    private: tuple[PrivateEngine, str], tmp_path: Path
) -> None:
    engine, gateway = private

    def make(root: Path, settings: Any, **options: Any) -> Any:
        return support.make_provider(root, settings, engine_url=engine.url, **options)

    with Emulator(host=gateway) as emulator:
        world = World(emulator, DOCKER, make, tmp_path / "sandboxes")
        try:
            host = world.host()
            session = emulator.create_session()
            command = "echo began > file; sleep 60"
            script: list[Any] = [
                tools(call("bash", command=command)),
                tools(call("bash", command="cat file")),
                repeat_output,
                end(),
            ]
            emulator.set_script(session, script)
            emulator.say(session, "go")
            await host.dispatcher.drain()
            name = support.DOCKER.module("containers").Names(support.namespace(tmp_path / "sandboxes")).sandbox(session)

            async def began() -> str:
                return docker("--host", engine.url, "exec", name, "cat", "file", check=False)

            await support.until(began)
            await asyncio.to_thread(engine.stop)
            ((is_error, told),) = host.results(session)  # the runner handed over, with the proxy still there
            assert is_error
            assert "may have taken effect" in told
            emulator.advance(RECLAIM_SECONDS)
            with pytest.raises(LaunchFailed, match="does not answer"):
                await host.provider.acquire(session)
            await asyncio.to_thread(engine.start)
            emulator.advance(LAPSE_SECONDS)
            emulator.advance(HEALABLE_SECONDS)
            await host.dispatcher.sweep()
            assert await host.answer(session) == "began"  # its files are there
            assert host.results(session)[1:] == [(False, "began")]  # and the call was not run again

            other = emulator.create_session()
            emulator.say(other, "!echo served")
            filler = engine.directory / "data" / "filler"
            with filler.open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            with pytest.raises(LaunchFailed, match="the Engine's disk is full") as caught:
                await host.provider.acquire(other)
            assert not caught.value.retriable
            await host.dispatcher.drain()
            assert emulator.work(other)["state"] == "queued"
            filler.unlink()
            emulator.advance(RECLAIM_SECONDS)
            await host.dispatcher.drain()
            assert await host.answer(other) == "served"
        finally:
            await world.close()


if RUNSC := os.environ.get("RUNSC"):  # the path of a `runsc`; CI has none (README, gVisor)

    @pytest.mark.timeout(600)
    async def test_gvisor_serves_from_an_image_made_for_it_and_no_other(tmp_path: Path) -> None:
        arguments = ["--platform=ptrace", "--network=none", "--host-uds=open"]
        config = tmp_path / "daemon.json"
        config.write_text(json.dumps({"runtimes": {"runsc": {"path": RUNSC, "runtimeArgs": arguments}}}))
        images = [support.image(), support.image_with("INTERPRETER_MODE=0755")]
        with private_engine("--config-file", str(config), images=images) as (engine, gateway):

            def make(root: Path, settings: Any, **options: Any) -> Any:
                chosen = {"engine_url": engine.url, "runtime": "runsc", "image": images[1], **options}
                return support.make_provider(root, settings, **chosen)

            with Emulator(host=gateway) as emulator:
                world = World(emulator, DOCKER, make, tmp_path / "sandboxes")
                try:
                    with pytest.raises(LaunchFailed, match="DOCKER_RUNTIME needs another image"):
                        await world.host(options={"image": images[0]}).provider.acquire("sesn_1")
                    host = world.host()
                    session = emulator.create_session()
                    emulator.say(session, "!uname -a; echo kept > file; cat file")
                    await host.dispatcher.drain()
                    await asyncio.to_thread(emulator.wait_idle, session, 2 * PATIENCE_SECONDS)
                    assert host.said(session).split()[-1] == "kept"
                    assert " 4.4.0 " in host.said(session)  # the kernel that gVisor says it is
                finally:
                    await world.close()
