"""The suite: every attempt of the table, made by the agent through the real bash tool of the real runner.

A subclass says how its provider is made and which file of statements is about it. All attempts of a provider take two
sessions: in one the neighbour lives, in the other the agent is hostile for two turns. A verdict rests on evidence: what
was found, or the kernel's refusal; an attempt that saw neither fails the test. That the attempts work at all is shown
by running them against a runner that defends nothing (`tests/redteam/test_careless.py`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

from tests.redteam import statements
from tests.redteam.attempts import NAMES
from tests.world import HEALABLE_SECONDS, LAPSE_SECONDS, Core, Host, World
from tools.emulator import Emulator, call, end, say, tools

SABOTEUR = Path(__file__).with_name("sabotage.py")
_LEFT_SECONDS = 60.0  # that the call would go on after the deeds
HOSTILE = Path(__file__).with_name("hostile.py")
LATER = frozenset({"background", "next-runner", "replay"})
CRASH = ("lock", "journal", "core-dump")  # deeds in one session, the last ends the runner
HANG = ("stale-lock", "wreck", "window")  # and in another, the last stops it
STARVE = ("starve",)  # and in a third
SABOTAGE = frozenset({*CRASH, *HANG, *STARVE, "kill", "freeze"})
INSIDE = frozenset(NAMES) - LATER - SABOTAGE - {"file-tools", "file-races", "output"}
LEASE_SECONDS = 8.0  # so that a runner beats every four, and one that does not is known to be out of action soon
_RACE_SECONDS = 60.0
_RACE_CALLS = 480
_INSIDE = "rt-inside"
# renameat2 with RENAME_EXCHANGE: the directory and the link change places, again and again. With these pauses one read
# in fifteen or so is won, also on a busy machine.
_SWAP = """
import ctypes, os, random, time
os.path.lexists("rt-link") or os.symlink("/proc/self", "rt-link")
swap = ctypes.CDLL(None).renameat2
while not swap(-100, b"rt-swap", -100, b"rt-link", 2):
    time.sleep(random.random() / 20000)
"""
_OUTPUT_BYTES = 8_000_000
_MOST_CHARACTERS = 200_000  # of a tool's result; the SDK keeps the last 100 KiB of what a command prints


class Limits(NamedTuple):
    """What the provider is made with: small, so that reaching a limit is quick. What it does not limit is given too:
    it is what the attempt tries to get."""

    memory_mb: int = 192
    pids: int = 64
    file_mb: int = 16
    disk_mb: int = 64


class Verdict(NamedTuple):
    broke: bool
    evidence: str


@dataclass
class Marks:
    """What must not be found, by kind; known to the sandbox's agent by hash only."""

    own: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")
    neighbour: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")
    host: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")
    shared_memory: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")
    key: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")
    forged: str = field(default_factory=lambda: f"rt-{uuid.uuid4().hex}")


class Recorder:
    """The provider, with an ear at its launches: what the runners were given is what must not be found."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self.credentials: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    async def acquire(self, session_id: str) -> Any:
        return _RecordedSandbox(await self._provider.acquire(session_id), self.credentials)


class _RecordedSandbox:
    def __init__(self, sandbox: Any, credentials: set[str]) -> None:
        self._sandbox = sandbox
        self._credentials = credentials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sandbox, name)

    async def start(self, launch: Any) -> Any:
        secret = json.loads(launch.stdin)["ANTHROPIC_WORK_SECRET"]
        token = json.loads(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))["sessions_token"]
        self._credentials |= {secret, token}
        return await self._sandbox.start(launch)


class RedTeam:
    """Subclass as `class Test<Name>RedTeam(RedTeam)` in tests/providers/test_<name>_redteam.py."""

    core: ClassVar[Core]
    provider: ClassVar[str]
    """The name of the provider's file in tests/redteam/stated, without .toml."""
    isolated: ClassVar[bool] = True
    """Whether the sandboxes hide the machine's processes and files, also in a test. Where they do not, attempts look
    at the runner's processes and at `places` only, and what would be done to the machine must be `not_tried`."""
    limits: ClassVar[Limits] = Limits()
    emulator_host: ClassVar[str] = "127.0.0.1"
    """As in the contract suite."""

    def make_provider(self, root: Path, settings: Any, **options: Any) -> Any:
        """The provider with its sandboxes under `root`, and with `self.limits` as far as it has such limits."""
        raise NotImplementedError

    def places(self, root: Path) -> list[str]:
        """Where to search for what is left on storage, as the agent names it."""
        return ["/"] if self.isolated else [str(root)]

    def stated(self) -> dict[str, statements.Statement]:
        return statements.read(self.provider)

    # --- the test ----------------------------------------------------------------------------------------------------

    async def test_the_statements_are_true(self, attacked: dict[str, Verdict]) -> None:
        assert_true({name: each for name, each in self.stated().items() if name not in SABOTAGE}, attacked)

    async def test_the_statements_about_sabotage_are_true(self, tmp_path: Path) -> None:
        stated = {name: each for name, each in self.stated().items() if name in SABOTAGE}
        tried = {name for name, each in stated.items() if each.outcome != "not_tried"}
        if not tried:
            return
        with Emulator(host=self.emulator_host, lease_ttl=LEASE_SECONDS) as emulator:
            world = World(emulator, self.core, self._recorded, tmp_path / "sandboxes")
            verdicts = await Sabotage(world.host(), tried, self.isolated).run()
            await world.close()
        assert_true(stated, verdicts)

    # --- how it is done ----------------------------------------------------------------------------------------------

    @pytest.fixture
    def marks(self) -> Marks:
        return Marks()

    @pytest.fixture
    async def world(self, tmp_path: Path) -> AsyncIterator[World]:
        with Emulator(host=self.emulator_host) as emulator:
            world = World(emulator, self.core, self._recorded, tmp_path / "sandboxes")
            yield world
            await world.close()

    def _recorded(self, root: Path, settings: Any, **options: Any) -> Recorder:
        return Recorder(self.make_provider(root, settings, **options))

    @pytest.fixture
    async def attacked(self, world: World, marks: Marks, tmp_path: Path) -> dict[str, Verdict]:
        """Every attempt that is tried, made; the verdicts by name."""
        stated = self.stated()
        tried = [name for name in NAMES if name not in SABOTAGE and stated[name].outcome != "not_tried"]
        with bait(tmp_path, marks) as lures:
            neighbour = world.host(SANDBOX_MAX_IDLE_SECONDS="600")  # it stays while the other one is attacked
            await _settle_in(neighbour, marks)
            config = {
                "isolated": self.isolated,
                "places": self.places(tmp_path / "sandboxes"),
                "forged": marks.forged,
                "limits": self.limits._asdict(),
                "api": world.base_url,
                **lures,
            }
            # Two seconds: its first turns are one runner's.
            hostile = world.host(provider=neighbour.provider, SANDBOX_MAX_IDLE_SECONDS="2")
            campaign = Campaign(hostile, marks, config, world.emulator.environment_key)
            return await campaign.run(tried)


def assert_true(stated: dict[str, statements.Statement], verdicts: dict[str, Verdict]) -> None:
    tried = {name: each for name, each in stated.items() if each.outcome != "not_tried"}
    wrong = [
        f"{name} is stated to be {each.outcome}, but: {verdicts[name].evidence or 'no evidence'}"
        for name, each in tried.items()
        if verdicts[name].broke != (each.outcome == "not_defended")
    ]
    assert not wrong, "\n".join(wrong)
    assert verdicts.keys() == tried.keys()


async def _settle_in(host: Host, marks: Marks) -> None:
    """The session that must be left in peace: it has files wherever it may write, and a process."""
    session = host.emulator.create_session()
    sleeper = f"python3 -I -S -c 'import time; time.sleep(600)' {marks.neighbour} > /dev/null 2>&1 &"
    files = " ".join(f"{place}/neighbour" for place in (".", "~", "${TMPDIR:-/tmp}"))
    assert await host.ask(session, f"!echo {marks.neighbour} | tee {files}\n!{sleeper}") == "(no output)"


class Campaign:
    """Two turns of one hostile session."""

    def __init__(self, host: Host, marks: Marks, config: dict[str, Any], environment_key: str) -> None:
        self._host = host
        self._marks = marks
        self._session = host.emulator.create_session()
        self._config = {**config, "session": self._session}
        self._environment_key = environment_key

    async def run(self, tried: list[str]) -> dict[str, Verdict]:
        first = [name for name in tried if name in INSIDE]
        later = [name for name in tried if name in LATER]
        commands = {
            "plant": f"echo {self._marks.own} > rt-own; cat > rt-hostile.py <<'EOT'\n{HOSTILE.read_text()}\nEOT",
            "attack": self._hostile(*first, *(f"arm-{name}" for name in later)),
            **({"output": f"head -c {_OUTPUT_BYTES} /dev/zero | tr '\\0' x; echo END"} if "output" in tried else {}),
        }
        told = await self._turn(commands)
        verdicts: dict[str, Verdict] = {}
        # At once: what a runner is told in its last instant, it does not run.
        if "file-tools" in tried:
            verdicts["file-tools"] = await self._file_tools()
        if "file-races" in tried:
            verdicts["file-races"] = await self._file_races()
        verdicts |= await self._read(told["attack"], [*first, *(f"arm-{name}" for name in later)])
        if "output" in tried:
            size = len(told["output"])
            verdicts["output"] = Verdict(size > _MOST_CHARACTERS, f"{size} characters of {_OUTPUT_BYTES} arrived")
            assert told["output"].endswith("END")
        if later:
            await self._host.until_stopped(self._session)
            told = await self._turn({"look": self._hostile(*later)})
            verdicts |= await self._read(told["look"], later)
        return {name: verdicts[name] for name in tried}

    def _hostile(self, *names: str) -> str:
        # -I: in the second turn its own traps lie beside it.
        return f"python3 -I rt-hostile.py $PPID {shlex.quote(json.dumps(self._config))} {' '.join(names)}"

    async def _turn(self, commands: dict[str, str]) -> dict[str, str]:
        """Runs the commands in one turn; what each printed."""
        before = len(self._host.results(self._session))
        steps = [tools(call("bash", command=command)) for command in commands.values()]
        await self._play(steps)
        results = self._host.results(self._session)[before:]
        return {name: text for name, (_, text) in zip(commands, results, strict=True)}

    async def _play(self, steps: list[Any]) -> None:
        emulator = self._host.emulator
        emulator.set_script(self._session, [*steps, say("done"), end()])
        emulator.say(self._session, "go")
        await self._host.dispatcher.drain()
        assert await self._host.answer(self._session) == "done"

    async def _read(self, printed: str, names: list[str]) -> dict[str, Verdict]:
        """The verdicts in what `hostile.py` printed."""
        records = {}
        for line in printed.splitlines():
            if line.startswith('{"attempt": '):
                record = json.loads(line)
                records[record["attempt"]] = record
        missing = [name for name in names if name not in records]
        assert not missing, f"these attempts told nothing: {missing}; the end of the output: {printed[-2000:]}"
        failed = [f"{name}: {record['failed']}" for name, record in records.items() if "failed" in record]
        assert not failed, "\n".join(failed)
        return {name: await self._judge(name, record) for name, record in records.items()}

    async def _judge(self, name: str, record: dict[str, Any]) -> Verdict:
        broke, evidence, loot = record["broke"], record["evidence"], set(record["loot"])
        prizes = self._prizes(name)
        if name in ("storage", "other-sessions"):
            assert _hash(self._marks.own) in loot, f"{name} did not even find the agent's own file: {evidence}"
        if name == "forged-log":
            (info,) = [info async for info in self._host.provider.sandboxes() if info.session_id == self._session]
            log = await (await self._host.provider.acquire(info.session_id)).tail(1000)
            broke = self._marks.forged in log
            assert broke or '"claimed"' in log, f"this is no runner's log: {log[-500:]}"
        if broke is None:
            found = sorted(kind for kind, value in prizes.items() if _hash(value) in loot)
            broke, evidence = bool(found), f"{evidence}; found: {', '.join(found) or 'nothing'}"
        return Verdict(broke, evidence)

    def _prizes(self, name: str) -> dict[str, str]:
        """What an attempt is after."""
        marks = self._marks
        special = {
            "shared-memory": {"the host's segment": marks.shared_memory},
            "keyring": {"the host's key": marks.key},
            "other-sessions": {"the neighbour's file": marks.neighbour},
            "other-processes": {"the neighbour's process": marks.neighbour},
            "host-files": {"the host's file": marks.host},
        }
        credentials = {f"credential {at}": value for at, value in enumerate(self._host.provider.credentials)}
        return special.get(name, credentials | {"the environment key": self._environment_key})

    async def _file_tools(self) -> Verdict:
        """The five file tools, on paths that lead out. They run in the runner: `/proc/self` would be its own."""
        out = "/proc/self/environ"
        await self._turn({"links": f"ln -sfn /proc/self rt-self; ln -sfn {out} rt-environ; ln -sfn /etc rt-etc"})
        up = "../" * 12
        calls = [
            *(call("read", file_path=path) for path in (out, f"{up}{out[1:]}", "rt-environ", "rt-self/environ")),
            call("read", file_path="rt-etc/passwd"),
            call("write", file_path="rt-self/oom_score_adj", content="1000"),
            call("write", file_path="/tmp/../etc/rt-new", content="x"),
            call("edit", file_path="rt-etc/passwd", old_string="root", new_string="toor"),
            call("glob", pattern="*", path="rt-etc"),
            call("glob", pattern="rt-etc/pass*"),
            call("grep", pattern=".", path="rt-environ"),
            call("grep", pattern=".", path="/etc/passwd"),
        ]
        before = len(self._host.results(self._session))
        await self._play([tools(each) for each in calls])
        results = self._host.results(self._session)[before:]
        assert len(results) == len(calls)
        refusals = ("outside the session's working directory", "no matches")
        let_through = [
            f"{each.name} {each.input}" for each, (_, text) in zip(calls, results, strict=True)
            if not any(refusal in text for refusal in refusals)
        ]  # fmt: skip
        return Verdict(bool(let_through), f"{len(calls)} calls; not refused: {let_through or 'none'}")

    async def _file_races(self) -> Verdict:
        """Between a look at a path and its use lies a moment, in which a directory of the agent's becomes a link to the
        runner's own part of /proc. To win that race is easy; what counts is what lies there."""
        swap = f"timeout {_RACE_SECONDS:g} python3 -I -S -c {shlex.quote(_SWAP)} > /dev/null 2>&1 &"
        await self._turn(
            {"swap": f"mkdir -p rt-swap; for f in environ cmdline; do echo {_INSIDE} > rt-swap/$f; done\n{swap}"}
        )
        calls = [
            *(call("read", file_path=f"rt-swap/{name}") for name in ("environ", "cmdline") * 6),
            call("grep", pattern=".", path="rt-swap/environ"),
            call("glob", pattern="env*", path="rt-swap"),
            call("edit", file_path="rt-swap/environ", old_string="A", new_string="B"),
            call("write", file_path="rt-swap/cmdline", content=_INSIDE),
        ]
        told: list[str] = []
        won = 0
        while not won and len(told) < _RACE_CALLS:
            before = len(self._host.results(self._session))
            await self._play([tools(*calls) for _ in range(3)])
            results = self._host.results(self._session)[before:]
            told += [text for _, text in results]
            won = sum(
                each.name == "read" and not is_error and _INSIDE not in text
                for each, (is_error, text) in zip(calls * 3, results, strict=True)
            )
        held = self._prizes("file-races")
        found = sorted(kind for kind, value in held.items() if any(value in text for text in told))
        evidence = f"{len(told)} calls, {won} of them read what is the runner's; found: {', '.join(found) or 'nothing'}"
        return Verdict(bool(found), evidence)


class Sabotage:
    """Three sessions at the same time. Each must go on: what the deeds interrupted has an answer, and the next message
    finds a runner that works."""

    def __init__(self, host: Host, tried: set[str], isolated: bool) -> None:
        self._host = host
        self._saboteur = f"RT_EVERYONE={isolated:d} python3 -I rt-sabotage.py $PPID"
        self._emulator = host.emulator
        self._tried = tried
        # The last deed of each is what it takes to see the others' effect: another runner.
        needed = tried | {deeds[-1] for deeds in (CRASH, HANG) if tried & {*deeds, "kill", "freeze"}}
        groups = {"kill": CRASH, "freeze": HANG, "starve": STARVE}
        self._deeds = {group: [deed for deed in deeds if deed in needed] for group, deeds in groups.items()}
        self._sessions = {group: self._emulator.create_session() for group, deeds in self._deeds.items() if deeds}

    async def run(self) -> dict[str, Verdict]:
        plant = f"cat > rt-sabotage.py <<'EOT'\n{SABOTEUR.read_text()}\nEOT"
        for group, session in self._sessions.items():
            doing = f"{self._saboteur} {' '.join(self._deeds[group])}; sleep {_LEFT_SECONDS:g}"
            steps = [tools(call("bash", command=command)) for command in (plant, doing)]
            self._emulator.set_script(session, [*steps, say("told"), end()])
            self._emulator.say(session, "go")
        await self._host.dispatcher.drain()
        for session in self._sessions.values():
            await self._host.until(partial(self._is_over, session))
        self._emulator.advance(LAPSE_SECONDS)
        self._emulator.advance(HEALABLE_SECONDS)
        await self._host.dispatcher.sweep()
        verdicts = await asyncio.gather(*map(self._verdicts, self._sessions))
        return {name: verdict for each in verdicts for name, verdict in each.items() if name in self._tried}

    def _is_over(self, session: str) -> bool:
        """The call has an answer, or the lease lapsed: its runner has not been heard of for two beats."""
        if len(self._host.results(session)) == 2:
            return True
        beat = self._emulator.work(session)["latest_heartbeat_at"]
        silent = (self._emulator.now() - datetime.fromisoformat(beat)).total_seconds() if beat else 0.0
        return silent > LEASE_SECONDS

    async def _verdicts(self, group: str) -> dict[str, Verdict]:
        """Of every attempt in the group; the group's name is one of them."""
        session, names = self._sessions[group], [group, *self._deeds[group]]
        try:
            told = await self._aftermath(session)
        except TimeoutError:
            stranded = f"nobody serves the session: its item is {self._emulator.work(session)['state']}"
            return dict.fromkeys(names, Verdict(True, stranded))
        if told[0]:
            return dict.fromkeys(names, Verdict(True, f"the next command failed: {told[1][:300]}"))
        found = json.loads(told[1])
        assert "window" not in names or "its memory was" in found["notes"], f"no next runner was seen: {found['notes']}"
        prizes = {_hash(value) for value in self._host.provider.credentials}
        loot = {"core-dump": found["loot"], "window": re.findall(r"loot (\w+)", found["notes"])}
        evidence = f"the session goes on; {found}"
        return {name: Verdict(bool(prizes & set(loot.get(name, []))), evidence) for name in names}

    async def _aftermath(self, session: str) -> tuple[bool, str]:
        """What the next turn finds: (is an error, text). Raises `TimeoutError` when there is none."""
        await self._host.answer(session)
        first, second = self._host.results(session)
        assert not first[0], first
        assert second[0], f"the runner outlived what was done to it: {second}"
        await self._host.until_stopped(session)  # a message in a runner's last instant is told to the agent, not run
        self._emulator.set_script(session, [tools(call("bash", command=self._saboteur)), say("on"), end()])
        self._emulator.say(session, "go on")
        await self._host.dispatcher.drain()
        await self._host.answer(session)
        return self._host.results(session)[-1]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- what there is to be found on the host ----------------------------------------------------------------------------


@contextlib.contextmanager
def bait(directory: Path, marks: Marks) -> Iterator[dict[str, Any]]:
    """On this machine, outside of every sandbox: a file, services on loopback and on Unix sockets, a shared memory
    segment and a kernel key. Yields what an agent may know of them."""
    with contextlib.ExitStack() as stack:
        host_file = directory / "host-file"
        host_file.write_text(marks.host)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        _answer(tcp)
        abstract_socket, path_socket = f"rt-{uuid.uuid4().hex[:8]}", directory / "s"
        with contextlib.chdir(directory):  # a Unix address holds about a hundred bytes
            for address in (f"\0{abstract_socket}", path_socket.name):
                server = stack.enter_context(socket.socket(socket.AF_UNIX))
                server.bind(address)
                server.listen()
        path_socket.chmod(0o777)
        stack.enter_context(_segment(marks.shared_memory.encode()))
        _keep_key(marks.key.encode())
        yield {
            "host_file": str(host_file),
            "host_port": tcp.getsockname()[1],
            "hello": "hello",
            "abstract_socket": abstract_socket,
            "host_socket": str(path_socket),
            "host_network": Path("/proc/self/ns/net").readlink().name,
        }


def _answer(server: socket.socket) -> None:
    """Answers each connection until the server is closed."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(connection.recv(100))

    threading.Thread(target=serve, daemon=True).start()


@contextlib.contextmanager
def _segment(content: bytes) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    shmid = libc.shmget(0, 4096, 0o1666)  # IPC_PRIVATE, IPC_CREAT, for everybody
    assert shmid >= 0, os.strerror(ctypes.get_errno())
    at = libc.shmat(shmid, None, 0)
    ctypes.memmove(at, content, len(content))
    try:
        yield
    finally:
        libc.shmdt(ctypes.c_void_p(at))
        libc.shmctl(shmid, 0, None)  # IPC_RMID


def _keep_key(content: bytes) -> None:
    """A key in a session keyring of this process's own: what it starts can read it, unless it is given up."""
    libc = ctypes.CDLL(None, use_errno=True)
    keyctl, add_key = {"x86_64": (250, 248), "aarch64": (219, 217)}[os.uname().machine]
    assert libc.syscall(keyctl, 1, None) >= 0, os.strerror(ctypes.get_errno())  # KEYCTL_JOIN_SESSION_KEYRING
    serial = libc.syscall(add_key, b"user", b"redteam", content, len(content), -3)
    assert serial >= 0, os.strerror(ctypes.get_errno())
