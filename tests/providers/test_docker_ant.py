"""DOCKER_RUNNER=ant: the vendor's `ant` in the sandbox in place of our runner.

Where ANT is the path of an `ant` it is that one. Else it is a small program around the Go SDK's own worker, which is
what `ant beta:worker run` is, too (see docker_support.ant_archive).
"""

from __future__ import annotations

import hashlib
import http.server
import json
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.toolchains import INSTALL_SECONDS
from tests.providers import docker_support as support
from tests.providers.docker_support import DOCKER, docker, needs_docker, until
from tests.world import HEALABLE_SECONDS, World
from tools.emulator import Emulator, call, end, tools

pytestmark = pytest.mark.timeout(INSTALL_SECONDS)  # the first run builds
ANT = DOCKER.module("containers").RUNNERS["ant"]
GET_ANT = DOCKER.module("get_ant")
SettingsError = DOCKER.shared("errors").SettingsError
LaunchFailed = DOCKER.shared("errors").LaunchFailed


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    def make(root: Path, settings: Any, **options: Any) -> Any:
        return support.make_provider(root, settings, **{"image": support.image_with_ant(), "runner": ANT, **options})

    with Emulator(host=support.gateway()) as emulator:
        world = World(emulator, DOCKER, make, tmp_path / "sandboxes")
        yield world
        await world.close()
        support.remove_all(support.namespace(tmp_path / "sandboxes"))


# What the agent may try for the credential.
_SEARCH = r"""
ln -s /proc/$PPID/environ link
echo "mine: $(env | grep -c ANTHROPIC)"
echo "all: $(cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -c ANTHROPIC)"
cat /proc/$PPID/environ /proc/$PPID/mem /opt/ant/ant 2>/dev/null || echo "nothing of ant's is readable"
echo kept > file
"""


@needs_docker
async def test_ant_serves_and_its_credential_is_not_to_be_found(world: World, tmp_path: Path) -> None:
    host = world.host()
    session = world.emulator.create_session()
    world.emulator.set_script(
        session, [tools(call("bash", command=_SEARCH)), tools(call("read", file_path="link")), end()]
    )
    world.emulator.say(session, "go")
    await host.dispatcher.drain()
    await host.until_stopped(session)
    sandbox = await host.provider.acquire(session)

    async def ended() -> bool:
        return "ended with 0" in await sandbox.tail(10)

    await until(ended)
    (_, searched), (is_error, _) = host.results(session)
    assert searched.split() == ["mine:", "0", "all:", "0", "nothing", "of", "ant's", "is", "readable"]
    assert is_error
    records = docker("inspect", sandbox.id) + docker("container", "top", sandbox.id) + docker("logs", sandbox.id)
    assert "sk-ant" not in records
    assert "eyJ" not in records
    asked = [record for record in world.emulator.requests if record.operation != "work.poll"]
    assert {(record.credential, record.status) for record in asked} == {("sessions_token", 200)}
    assert (host.count("work.ack"), host.claims()) == (1, 1)

    assert (await host.ask(session, "!cat file")).strip() == "kept"
    assert host.claims() == 2
    said = [json.loads(line) for line in docker("logs", sandbox.id).splitlines() if line.startswith("{")]
    assert [line["event"] for line in said][:3] == ["ready", "exit", "sandbox"]
    assert said[1] == {"event": "exit", "code": 0, "reason": "ant has ended"}


@needs_docker
async def test_a_call_that_a_stop_ends_is_answered_and_the_session_goes_on(world: World) -> None:
    """By `ant`, or by whoever heals: it stops its item whatever ends it."""
    host = world.host()
    session = world.emulator.create_session()
    world.emulator.set_script(session, [tools(call("bash", command="touch began; sleep 60")), end()])
    world.emulator.say(session, "go")
    await host.dispatcher.drain()
    (sandbox,) = [info.sandbox_id async for info in host.provider.sandboxes()]

    async def began() -> str:
        return docker("exec", sandbox, "sh", "-c", "ls began", check=False)

    await until(began)
    await host.provider.stop(session)
    assert '"reason": "told to leave"' in docker("logs", sandbox)
    assert world.emulator.work(session)["state"] == "stopped"
    world.emulator.advance(HEALABLE_SECONDS)
    await host.dispatcher.sweep()
    await host.until(lambda: host.results(session))
    ((is_error, told),) = host.results(session)
    assert is_error
    assert "may have taken effect" in told or "context canceled" in told
    await host.until_stopped(session)
    assert (await host.ask(session, "!ls began")).strip() == "began"


@needs_docker
async def test_an_item_that_cannot_be_acked_is_not_run(world: World) -> None:
    host = world.host()
    session = world.emulator.create_session()
    world.emulator.say(session, "!echo no")
    sandbox = await host.provider.acquire(session)
    job = {
        "ANTHROPIC_SESSION_ID": session,
        "ANTHROPIC_WORK_ID": session,
        "ANTHROPIC_ENVIRONMENT_ID": world.emulator.environment_id,
        "ANTHROPIC_BASE_URL": world.base_url,
        "ANTHROPIC_ENVIRONMENT_KEY": "no-key-of-anybody",
    }
    await sandbox.start(support.launch(job))

    async def ended() -> bool:
        return "ended with 76" in await sandbox.tail(10)

    await until(ended)
    assert '"reason": "the ack was refused or not answered"' in await sandbox.tail(10)
    assert host.count("work.heartbeat") == 0


@needs_docker
async def test_an_image_without_ant_is_named_with_the_way_to_make_it(world: World) -> None:
    host = world.host(options={"image": support.image()})
    sandbox = await host.provider.acquire("sesn_1")
    with pytest.raises(
        LaunchFailed, match="DOCKER_IMAGE holds no ant: build it with --build-arg ANT_VERSION"
    ) as caught:
        await sandbox.start(support.launch(_JOB))
    assert not caught.value.retriable


_JOB = {
    "ANTHROPIC_SESSION_ID": "sesn_1",
    "ANTHROPIC_WORK_ID": "sesn_1",
    "ANTHROPIC_ENVIRONMENT_ID": "env_1",
    "ANTHROPIC_ENVIRONMENT_KEY": "no-key-of-anybody",
}


@needs_docker
def test_an_image_whose_ant_could_be_read_is_refused() -> None:
    chmod_and_run = f"chmod 0755 /opt/ant/ant && su -s /bin/sh -c 'exec {' '.join(ANT)}' agent"
    options = ["--rm", "-i", "-u", "root", "--entrypoint", "sh"]
    said = docker("run", *options, support.image_with_ant(), "-c", chmod_and_run, stdin=json.dumps(_JOB), check=False)
    (line,) = said.splitlines()
    assert json.loads(line)["code"] == 69
    assert "/opt/ant/ant can be read by its user" in line


@pytest.mark.parametrize("asked", [{"SANDBOX_TOOLS": "my_tools:tools"}, {"SANDBOX_TOOL_NAMES": "weather"}])
def test_custom_tools_are_refused(asked: dict[str, str]) -> None:
    environ = {"ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": "k", "DOCKER_RUNNER": "ant", **asked}
    with pytest.raises(SettingsError, match="DOCKER_RUNNER=ant cannot run custom tools: unset SANDBOX_TOOLS"):
        DOCKER.sandbox.open_provider(environ, DOCKER.shared("settings").Settings.from_env(environ))


# --- get_ant.py: what the image's build says --------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """A server of releases with one in it: its address, that archive's hash, and what it was asked for."""
    version, archive = support.ant_archive()
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            found = self.path == f"/v{version}/ant_{version}_linux_{support.ARCHITECTURE}.tar.gz"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(archive if found else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", hashlib.sha256(archive).hexdigest(), asked
        server.shutdown()
        thread.join()


def test_a_release_is_downloaded_checked_and_made_unreadable(
    release: tuple[str, str, list[str]], tmp_path: Path
) -> None:
    url, digest, asked = release
    version, _ = support.ant_archive()
    GET_ANT.main(version, digest.upper(), tmp_path / "ant", url)
    assert (tmp_path / "ant/ant").stat().st_mode & 0o777 == 0o711
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("version", "sha256", "said"),
    [
        ("{version}", "0" * 64, "its SHA-256 is {digest}, expected 000"),
        ("{version}", "", "the hash of ant_{version}_.* is not known here: set ANT_SHA256 .* to one of these: 1"),
        ("9.9.9", "0" * 64, "cannot be had .*404.*: download it elsewhere, and put it beside the Dockerfile"),
        ("", "0" * 64, "ANT_SHA256 is set without ANT_VERSION"),
    ],
)  # fmt: skip
def test_what_is_no_release_is_refused(
    version: str, sha256: str, said: str, release: tuple[str, str, list[str]], tmp_path: Path
) -> None:
    url, digest, _ = release
    names = {"version": support.ant_archive()[0], "digest": digest}
    with pytest.raises(SystemExit, match=said.format(**names)):
        GET_ANT.main(version.format(**names), sha256, tmp_path / "ant", url)
    assert list((tmp_path / "ant").iterdir()) == []


def test_an_ant_of_another_version_than_its_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, archive = support.ant_archive()
    beside = tmp_path / "get_ant.py"
    monkeypatch.setattr(GET_ANT, "__file__", str(beside))
    (tmp_path / f"ant_7.7.7_linux_{support.ARCHITECTURE}.tar.gz").write_bytes(archive)
    with pytest.raises(SystemExit, match=r"says it is 'ant version .*', not 7\.7\.7"):
        GET_ANT.main("7.7.7", hashlib.sha256(archive).hexdigest(), tmp_path / "ant")


def test_an_ant_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / f"ant_7.7.7_linux_{support.ARCHITECTURE}.tar.gz"
    (tmp_path / "program").write_bytes(b"of another machine")
    with tarfile.open(packed, "w:gz") as files:
        files.add(tmp_path / "program", "ant")
    monkeypatch.setattr(GET_ANT, "__file__", str(tmp_path / "get_ant.py"))
    with pytest.raises(SystemExit, match=r"the ant in ant_7\.7\.7_.* does not run here: .*Exec format"):
        GET_ANT.main("7.7.7", hashlib.sha256(packed.read_bytes()).hexdigest(), tmp_path / "ant")


def test_without_a_version_there_is_no_ant(tmp_path: Path) -> None:
    GET_ANT.main("", "", tmp_path / "ant")
    assert list((tmp_path / "ant").iterdir()) == []
