"""The Docker provider on a real Engine: what it makes, finds again, refuses and leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.providers import docker_support as support
from tests.providers.docker_support import DOCKER, Sandboxes, docker, needs_docker, until
from tests.world import RECLAIM_SECONDS, World
from tools.emulator import Emulator

pytestmark = needs_docker
LaunchFailed = DOCKER.shared("errors").LaunchFailed
SettingsError = DOCKER.shared("errors").SettingsError


@pytest.fixture
async def sandboxes() -> AsyncIterator[Sandboxes]:
    sandboxes = Sandboxes()
    yield sandboxes
    await sandboxes.close()


# --- what the agent finds ---------------------------------------------------------------------------------------------

# Prints, for each address, how a connection there ends. Everything an agent could think of, by number: there is no DNS.
_CONNECT = """
import json, socket, sys
for kind, host, port in json.loads(sys.argv[1]):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, getattr(socket, kind)) as s:
        s.settimeout(3)
        try:
            s.connect((host, port)); s.send(b"x")
        except OSError as error:
            print(host, error.strerror or error)
        else:
            print(host, "REACHED")
try:
    print(socket.getaddrinfo("example.com", 443))
except OSError as error:
    print("no name is resolved")
"""


async def test_nothing_can_be_reached_without_the_proxy(sandboxes: Sandboxes) -> None:
    with socket.create_server(
        (support.gateway(), 0)
    ) as server:  # a service of this machine that containers could reach
        docker("run", "-d", "--rm", "--label", f"sandboxes.environment={sandboxes.namespace}", "--name",
               f"{sandboxes.namespace}-peer", "--entrypoint", "sleep", support.image(), "60")  # fmt: skip
        peer = sandboxes.inspect(f"{sandboxes.namespace}-peer")["NetworkSettings"]["IPAddress"]
        here = [support.gateway(), "127.0.0.2", "172.17.0.1", "172.18.0.1", peer]
        beyond = [
            "169.254.169.254",
            "169.254.1.1",
            "100.100.100.200",
            "10.0.0.1",
            "192.168.0.1",
            "1.1.1.1",
            "fe80::1",
            "fd00:ec2::254",
            "::ffff:1.1.1.1",
        ]
        tried = [("SOCK_STREAM", host, server.getsockname()[1]) for host in here]
        tried += [(kind, host, 80) for host in beyond for kind in ("SOCK_STREAM", "SOCK_DGRAM")]
        (said, links, egress) = await sandboxes.run(
            "sesn_1",
            f"python3 -c '{_CONNECT}' '{json.dumps(tried)}'",
            "ls /sys/class/net; cat /proc/net/route | wc -l",
            "ls /run/egress; ls /var/run/docker.sock /run/docker.sock /run/containerd 2>&1 | grep -c 'No such file'",
        )
    *answers, dns = said.splitlines()
    assert len(answers) == len(tried)
    assert "REACHED" not in said
    assert dns == "no name is resolved"
    assert links.split() == ["lo", "1"]  # one link, and of the routes the heading only
    assert egress.split() == ["proxy.sock", "3"]


async def test_a_job_leaves_no_trace_on_the_engine(sandboxes: Sandboxes) -> None:
    secret = f"sk-ant-req-{os.urandom(8).hex()}"
    sandbox, _ = await sandboxes.begin("sesn_1", "true", linger=True, secret=secret)
    inspected = docker("inspect", sandbox.id)
    (container,) = json.loads(inspected)
    # The program that passed the job on is still among the Engine's records, and maybe on its way out.
    commands = [docker("container", "top", sandbox.id), docker("logs", sandbox.id)]
    history = docker("history", "--no-trunc", support.image())
    processes = _everything_in_proc()
    files = _files_with(secret, Path("/var/lib/docker/containers", container["Id"])) if os.getuid() == 0 else []
    assert "stand_in.py" in "".join(commands)  # it is this container's
    assert secret.encode() not in processes
    assert [secret in text for text in (inspected, history, *commands)] == [False] * 4
    assert files == []


def _everything_in_proc() -> bytes:
    """The arguments and the environment of every process of this machine that this user may look at."""
    found = b""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    found += (entry / name).read_bytes()
    return found


def _files_with(text: str, directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


async def test_process_1_listens_to_nobody_inside(sandboxes: Sandboxes) -> None:
    ask = r"""
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("\0sandbox-init")
try:
    s.sendall(b'{"do": "hold"}\n')
    print("answer:", s.recv(100))
except (BrokenPipeError, ConnectionResetError) as error:  # hung up, before or after it got the line
    print("answer:", b"")
"""
    assert await sandboxes.run("sesn_1", f"python3 -c {shlex.quote(ask)}") == ["answer: b''\n"]


async def test_what_a_runner_leaves_behind_ends_with_it_and_no_zombie_stays(sandboxes: Sandboxes) -> None:
    orphan = "(setsid sleep 1000 &) ; (setsid sh -c 'sleep 0.01' &); sleep 0.1"
    sandbox, _ = await sandboxes.begin("sesn_1", orphan)

    async def ended() -> bool:
        return "ended with 0" in await sandbox.tail(10)

    await until(ended)

    async def nothing_is_left() -> bool:
        states = docker("exec", sandbox.id, "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null; true")
        names = [line.partition("(")[2].partition(")")[0] for line in states.splitlines()]
        assert names, "not even what looks is seen"
        assert "sleep" not in names
        return ") Z " not in states  # process 1 collects what has just ended

    await until(nothing_is_left)


async def test_a_sandbox_that_its_agent_ends_is_made_again_with_its_files(sandboxes: Sandboxes) -> None:
    first, _ = await sandboxes.begin("sesn_1", "echo kept > file; kill -TERM 1; sleep 20")
    before = sandboxes.inspect(first.id)["Id"]

    async def replaced() -> list[str] | None:
        with contextlib.suppress(LaunchFailed):
            return await sandboxes.run("sesn_1", "cat file; ls handed-over")
        return None

    assert await until(replaced) == ["kept\nhanded-over\n"]
    assert sandboxes.inspect(first.id)["Id"] != before


# --- what is found again ----------------------------------------------------------------------------------------------


async def test_another_worker_finds_what_runs(sandboxes: Sandboxes) -> None:
    sandbox, _ = await sandboxes.begin("sesn_1", "true", linger=True)
    before = sandboxes.inspect(sandbox.id)
    await sandboxes.provider.close()  # the worker ends, the sandbox does not
    another = sandboxes.another()
    (info,) = await sandboxes.infos(another)
    assert (info.session_id, info.sandbox_id, info.running) == ("sesn_1", sandbox.id, True)
    found = await another.acquire("sesn_1")
    assert (found.id, found.created) == (sandbox.id, False)
    after = sandboxes.inspect(sandbox.id)
    assert (after["Id"], after["State"]["Pid"]) == (before["Id"], before["State"]["Pid"])
    assert "stand_in.py" in docker("container", "top", sandbox.id)


async def test_an_unused_sandbox_ends_by_itself_and_keeps_its_files(sandboxes: Sandboxes) -> None:
    provider = sandboxes.another(keep_warm_seconds=0.0)
    sandbox, _ = await sandboxes.begin("sesn_1", "echo kept > file; echo kept > ~/file", provider=provider)

    async def ended() -> Any:
        (info,) = await sandboxes.infos()
        return None if info.running else info

    info = await until(ended)
    assert abs(info.last_used_at - time.time()) < 60
    assert info.created_at <= info.last_used_at
    assert '"unused"' in await sandbox.tail(1)  # its log can still be read
    assert await sandboxes.run("sesn_1", "cat file ~/file") == ["kept\nkept\n"]


async def test_an_idle_sandbox_of_older_settings_is_replaced_and_a_working_one_is_not(sandboxes: Sandboxes) -> None:
    newer = sandboxes.another(limits=DOCKER.module("containers").Limits(memory_mb=256))
    working, _ = await sandboxes.begin("sesn_works", "true", linger=True)
    await sandboxes.run("sesn_idle", "echo kept > file")
    before = {name: sandboxes.inspect(sandboxes.name(name))["Id"] for name in ("sesn_works", "sesn_idle")}
    for name in before:
        await newer.acquire(name)
    after = {name: sandboxes.inspect(sandboxes.name(name)) for name in before}
    assert after["sesn_works"]["Id"] == before["sesn_works"]
    assert after["sesn_idle"]["Id"] != before["sesn_idle"]
    assert after["sesn_idle"]["HostConfig"]["Memory"] == 256 << 20
    assert docker("exec", sandboxes.name("sesn_idle"), "cat", "file") == "kept"
    assert working.id == sandboxes.name("sesn_works")


async def test_a_container_whose_maker_was_killed_before_it_started_is_started(sandboxes: Sandboxes) -> None:
    sandbox = await sandboxes.provider.acquire("sesn_1")
    spec = sandboxes.provider._sandbox_spec("sesn_1", image=sandboxes.inspect(sandbox.id)["Image"])
    docker("rm", "-f", sandbox.id)
    assert await sandboxes.provider._create("sesn_1", spec)  # and no start
    found = await sandboxes.provider.acquire("sesn_1")
    assert not found.created
    assert sandboxes.inspect(found.id)["State"]["Running"]


async def test_files_whose_container_somebody_removed_are_listed_found_and_released(sandboxes: Sandboxes) -> None:
    await sandboxes.run("sesn_1", "echo kept > file")
    docker("rm", "-f", sandboxes.name("sesn_1"))
    (info,) = await sandboxes.infos()
    assert (info.session_id, info.running) == ("sesn_1", False)
    assert abs(info.last_used_at - time.time()) < 60  # not since nobody knows when
    assert await sandboxes.run("sesn_1", "cat file") == ["kept\n"]
    docker("rm", "-f", sandboxes.name("sesn_1"))
    await sandboxes.provider.release(info.sandbox_id)
    assert (await sandboxes.infos(), sandboxes.left()) == ([], [])


def test_each_sandbox_has_groups_of_its_own_that_every_user_namespace_has() -> None:
    groups = DOCKER.module("containers").groups
    pairs = [groups(f"sandbox-env_1-sesn_{number}") for number in range(2000)]
    assert len(set(pairs)) == 2000
    assert {len(pair) for pair in pairs} == {2}
    assert all(10_002 < group < 65_534 for pair in pairs for group in pair)


async def test_the_proxy_tells_a_sandbox_by_its_groups(sandboxes: Sandboxes) -> None:
    (said,) = await sandboxes.run("sesn_1", "python3 -c 'import os; print(*os.getgroups())'")
    groups = DOCKER.module("containers").groups(sandboxes.name("sesn_1"))
    assert set(map(int, said.split())) - {10_001} == set(groups)


# --- what ends --------------------------------------------------------------------------------------------------------


async def test_release_lets_the_runner_hand_over_and_leaves_nothing(sandboxes: Sandboxes) -> None:
    sandbox, _ = await sandboxes.begin("sesn_1", "true", linger=True)
    following = await asyncio.create_subprocess_exec("docker", "logs", "-f", sandbox.id, stdout=-1, stderr=-2)
    assert following.stdout is not None
    assert b'"ready"' in await following.stdout.readline()  # it follows
    await sandboxes.provider.release(sandbox.id)
    log = (await following.communicate())[0].decode()
    assert "ended with 143" in log  # what a runner says that was told, and followed
    assert sandboxes.left() == []
    await sandboxes.provider.release(sandbox.id)


async def test_a_release_that_breaks_off_is_found_again_by_the_next_sweep(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await sandboxes.provider.acquire("sesn_1")
    remove = sandboxes.provider._engine.remove_volume
    removed: list[str] = []

    async def remove_one(name: str) -> None:
        if removed:
            raise ConnectionResetError
        removed.append(name)
        await remove(name)

    with monkeypatch.context() as patch:
        patch.setattr(sandboxes.provider._engine, "remove_volume", remove_one)
        with pytest.raises(LaunchFailed, match="broke off"):
            await sandboxes.provider.release(sandbox.id)
    assert len(removed) == len(sandboxes.left()) == 1
    (info,) = await sandboxes.infos()
    await sandboxes.provider.release(info.sandbox_id)
    assert sandboxes.left() == []


async def test_an_engine_that_cannot_limit_something_is_told_of_once(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = type(sandboxes.provider._engine.docker.system)
    info = system.info

    async def weaker(self: Any) -> dict[str, Any]:
        return {**await info(self), "SwapLimit": False, "PidsLimit": False}

    monkeypatch.setattr(system, "info", weaker)
    for session in ("sesn_1", "sesn_2"):
        await sandboxes.provider.acquire(session)
    assert caplog.text.count("action=no_limit") == 1
    assert "this Engine cannot limit swap, processes" in caplog.text


async def test_a_runner_that_does_not_leave_is_ended_within_the_limit() -> None:
    sandboxes = Sandboxes(grace_seconds=1)
    try:
        sandbox, _ = await sandboxes.begin("sesn_1", "true", linger=True, stubborn=True)
        began = time.monotonic()
        await sandboxes.provider.release(sandbox.id)
        assert 1 <= time.monotonic() - began < support.PATIENCE_SECONDS  # by itself it would never
        assert sandboxes.left() == []
    finally:
        await sandboxes.close()


async def test_two_environments_do_not_see_each_other(sandboxes: Sandboxes) -> None:
    others = Sandboxes()
    try:
        theirs = await others.provider.acquire("sesn_1")
        ours = await sandboxes.provider.acquire("sesn_1")
        assert theirs.id != ours.id
        assert [info.sandbox_id for info in await sandboxes.infos()] == [ours.id]
        with pytest.raises(LaunchFailed, match="none of this environment's"):
            await sandboxes.provider.release(theirs.id)
        assert others.inspect(theirs.id)["State"]["Running"]
    finally:
        await others.close()


# --- the egress proxy's container -------------------------------------------------------------------------------------


async def test_a_change_of_the_allowed_hosts_reaches_running_sandboxes(sandboxes: Sandboxes) -> None:
    await sandboxes.run("sesn_1", "true")
    with _web_server() as (address, served):
        fetch = (
            f"python3 -c 'import urllib.request as u; print(u.urlopen(\"http://{address}/x\").read().decode())' 2>&1"
        )
        (refused,) = await sandboxes.run("sesn_1", fetch)
        assert "403" in refused
        assert served == []
        more = sandboxes.another(allowed_hosts=[address])
        await more.acquire("sesn_2")
        (allowed,) = await sandboxes.run("sesn_1", fetch, provider=more)
    assert allowed == "hello\n"
    assert served == ["GET /x"]
    log = docker("logs", f"sandbox-egress-{sandboxes.namespace}")
    assert address in log  # the new proxy's own list; what the old one refused went with it


async def test_a_proxy_that_ended_is_started_again(sandboxes: Sandboxes) -> None:
    await sandboxes.provider.acquire("sesn_1")
    docker("stop", "-t", "5", f"sandbox-egress-{sandboxes.namespace}")
    await sandboxes.run("sesn_1", "true")
    assert sandboxes.inspect(f"sandbox-egress-{sandboxes.namespace}")["State"]["Running"]
    refuse = "python3 -c 'import urllib.request as u; u.urlopen(\"http://127.0.0.1/\")' 2>&1 | tail -n 1"
    through = "HTTP_PROXY=$HTTP_PROXY NO_PROXY= no_proxy= "
    (answer,) = await sandboxes.run("sesn_1", through + refuse)
    assert "403" in answer  # it answers; this machine's loopback is nobody's


@contextlib.contextmanager
def _web_server() -> Iterator[tuple[str, list[str]]]:
    """A server of this machine that the proxy reaches; what it was asked for."""
    import http.server
    import threading

    served: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.append(f"GET {self.path}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((support.gateway(), 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"{support.gateway()}:{server.server_address[1]}", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- what fails -------------------------------------------------------------------------------------------------------


async def test_without_an_engine_work_waits_and_is_served_when_it_is_there(tmp_path: Path) -> None:
    engine = tmp_path / "docker.sock"

    def make(root: Path, settings: Any, **options: Any) -> Any:
        return support.make_provider(root, settings, engine_url=f"unix://{engine}", **options)

    with Emulator(host=support.gateway()) as emulator:
        world = World(emulator, DOCKER, make, tmp_path / "sandboxes")
        try:
            host = world.host(timing={"launch_seconds": 1.0})
            session = emulator.create_session()
            emulator.say(session, "!echo served")
            with pytest.raises(LaunchFailed, match=r"the Docker Engine does not answer: .*docker\.sock") as caught:
                await host.provider.acquire(session)
            assert caught.value.retriable
            await host.dispatcher.sweep()
            assert emulator.work(session)["state"] == "queued"
            engine.symlink_to("/var/run/docker.sock")  # the Engine is back
            emulator.advance(RECLAIM_SECONDS)
            healthy = world.host()
            await healthy.dispatcher.drain()
            assert await healthy.answer(session) == "served"
        finally:
            await world.close()
            support.remove_all(support.namespace(tmp_path / "sandboxes"))


async def test_a_missing_image_is_named_with_the_way_to_make_it(sandboxes: Sandboxes) -> None:
    with pytest.raises(LaunchFailed, match=r"docker build -t NAME \..*no-such-image") as caught:
        await sandboxes.another(image="no-such-image:1").acquire("sesn_1")
    assert not caught.value.retriable
    assert sandboxes.left() == []


async def test_an_image_of_another_kind_is_refused(sandboxes: Sandboxes) -> None:
    stranger = docker("image", "ls", "-q", "--filter", "reference=sandboxes-test-base").split()
    if not stranger:
        pytest.skip("no other image is on this Engine")
    with pytest.raises(LaunchFailed, match="DOCKER_IMAGE is none of this Dockerfile's") as caught:
        await sandboxes.another(image=stranger[0]).acquire("sesn_1")
    assert not caught.value.retriable


async def test_a_name_that_somebody_else_has_is_not_taken_from_him(sandboxes: Sandboxes) -> None:
    name = sandboxes.name("sesn_1")
    docker("create", "--name", name, "--label", "owner=somebody", support.image())
    try:
        with pytest.raises(LaunchFailed, match=re.escape(f"the name {name} is taken")) as caught:
            await sandboxes.provider.acquire("sesn_1")
        assert not caught.value.retriable
        with pytest.raises(LaunchFailed, match="is taken"):
            await sandboxes.provider.release(name)
        assert sandboxes.inspect(name)["State"]["Status"] == "created"
    finally:
        docker("rm", "-f", name)


@pytest.mark.parametrize("part", ["workspace", "home"])
async def test_a_volume_that_somebody_else_has_is_neither_mounted_nor_deleted(sandboxes: Sandboxes, part: str) -> None:
    name = f"{sandboxes.name('sesn_1')}-{part}"
    docker("volume", "create", "--label", "owner=somebody", name)
    try:
        with pytest.raises(LaunchFailed, match=re.escape(f"the name {name} is taken by a volume")) as caught:
            await sandboxes.provider.acquire("sesn_1")
        assert not caught.value.retriable
        with pytest.raises(LaunchFailed, match="is taken by a volume"):
            await sandboxes.provider.release(sandboxes.name("sesn_1"))
        assert docker("volume", "inspect", "--format", "{{.Name}}", name).strip() == name
    finally:
        docker("volume", "rm", name)


async def test_a_volume_without_labels_is_the_sessions_own(sandboxes: Sandboxes) -> None:
    """As an Engine leaves one whose disk was full, and as a person makes one to bring a session's files back."""
    name = f"{sandboxes.name('sesn_1')}-workspace"
    docker("volume", "create", name)
    sandbox = await sandboxes.provider.acquire("sesn_1")
    await sandboxes.provider.release(sandbox.id)
    assert docker("volume", "ls", "--quiet", "--filter", f"name={name}").strip() == ""


async def test_a_paused_sandbox_is_named_with_the_cure(sandboxes: Sandboxes) -> None:
    await sandboxes.provider.acquire("sesn_1")
    name = sandboxes.name("sesn_1")
    docker("pause", name)
    try:
        with pytest.raises(LaunchFailed, match=f"`docker unpause {re.escape(name)}`") as caught:
            await sandboxes.provider.acquire("sesn_1")
        assert not caught.value.retriable
    finally:
        docker("unpause", name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runtime": "no-such-runtime"}, "DOCKER_RUNTIME names no runtime"),
        ({"image": "No Name"}, "DOCKER_IMAGE is no name of an image"),
        ({"egress_network": "no-such-network"}, "DOCKER_EGRESS_NETWORK names no network"),
        ({"limits": {"cpus": 1000.0}}, "DOCKER_CPUS is more than the Engine has"),
        ({"limits": {"memory_mb": 1}}, "DOCKER_MEMORY_MB is not what the Engine takes"),
        ({"limits": {"disk_mb": 64}}, "DOCKER_DISK_MB needs storage with quotas"),
    ],
)
async def test_what_the_engine_cannot_do_is_said_by_the_settings_name(
    sandboxes: Sandboxes, options: dict[str, Any], said: str
) -> None:
    if limits := options.get("limits"):
        options = {"limits": DOCKER.module("containers").Limits(**limits)}
    with pytest.raises(LaunchFailed, match=said) as caught:
        await sandboxes.another(**options).acquire("sesn_1")
    assert not caught.value.retriable


async def test_a_session_id_that_is_no_name_is_refused(sandboxes: Sandboxes) -> None:
    for session_id in ("../x", "", "a b", "x" * 129):
        with pytest.raises(LaunchFailed, match="cannot be the name"):
            await sandboxes.provider.acquire(session_id)


def _opened(**settings: str) -> Any:
    environ = {"ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": "k", **settings}
    return DOCKER.sandbox.open_provider(environ, DOCKER.shared("settings").Settings.from_env(environ))


@pytest.mark.parametrize(
    "settings",
    [
        {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8000"},
        {"ANTHROPIC_BASE_URL": "http://localhost:8000"},
        {"ANTHROPIC_BASE_URL": "http://[::1]:8000"},
        {"ANTHROPIC_ENVIRONMENT_ID": "../x"},
        {"SANDBOX_ALLOWED_HOSTS": "https://example.com"},
        {"DOCKER_CPUS": "0"},
        {"DOCKER_MEMORY_MB": "much"},
        {"DOCKER_HOST": "/var/run/docker.sock"},
    ],
)
def test_a_setting_that_cannot_be_used_is_named(settings: dict[str, str]) -> None:
    (name,) = settings
    with pytest.raises(SettingsError, match=name):
        _opened(**settings)


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("https://api.anthropic.com", "api.anthropic.com:443"),
        ("http://172.17.0.1:8000", "172.17.0.1:8000"),
        ("https://[fd00::1]", "[fd00::1]:443"),
        ("https://localhost.example.com", "localhost.example.com:443"),
    ],
)
def test_the_api_can_always_be_reached(url: str, entry: str) -> None:
    provider = _opened(ANTHROPIC_BASE_URL=url, SANDBOX_ALLOWED_HOSTS="example.com, *.example.org")
    (argument,) = provider._egress_spec(image="x")["Cmd"]
    assert json.loads(argument)["allowed"] == [entry, "example.com", "*.example.org"]


_OCI = "OCI runtime create failed: runc create failed: unable to start container process: exec: "


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        # A newer Engine's words; this one's are tried above.
        (400, "unknown or invalid runtime name: runsc", "DOCKER_RUNTIME names no runtime"),
        (400, f'{_OCI}"/opt/venv/bin/python3": no such file or directory: unknown', "DOCKER_IMAGE is none of this"),
        (400, f'{_OCI}"/opt/venv/bin/python3": permission denied: unknown', "the Engine cannot run DOCKER_IMAGE"),
        (403, "Forbidden", "does not allow a call"),
    ],
)
def test_what_other_engines_say_is_understood(status: int, message: str, said: str) -> None:
    engine = DOCKER.module("engine")
    with pytest.raises(LaunchFailed, match=said) as caught, engine.mapped():
        raise engine.aiodocker.DockerError(status, message)
    assert not caught.value.retriable


def test_an_error_that_the_table_does_not_list_is_a_bug() -> None:
    engine = DOCKER.module("engine")
    error = engine.aiodocker.DockerError(418, "I'm a teapot")
    with pytest.raises(engine.aiodocker.DockerError), engine.mapped():
        raise error
