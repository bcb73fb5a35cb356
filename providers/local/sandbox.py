"""The local provider: a sandbox is a directory per session and, while it runs, one bubblewrap on this machine.

The sandbox ends with the process that started it; the directory stays until `release`. Where bubblewrap does not run,
tools are plain processes of this user, and that is refused unless somebody allowed it.

Both halves of the seam are here, the provider and its sandbox: what one makes the other must find.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bubblewrap
import session
from _shared.errors import LaunchFailed, SettingsError
from _shared.log import line
from _shared.provider import Launch, SandboxInfo, Started, read_ready
from _shared.settings import Settings, count, flag, load, setting

_log = logging.getLogger(__name__)

Isolation = Literal["bubblewrap", "none"]

GRACE_SECONDS = 30.0  # for a runner to hand over once it is told to; it takes up to 20 s
ACQUIRED_SECONDS = 60.0  # an acquired sandbox waits at least this long for its `start`
_COLLECT_SECONDS = 5.0  # between init's end and bubblewrap's
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")
_PROCESSES_COUNT_PER_NAMESPACE = (5, 14)  # Linux; before, RLIMIT_NPROC would count all of the host user's processes

# What the operating system may refuse, and whether it may permit the same seconds later. Anything else is a bug.
_RETRIABLE = {
    errno.EAGAIN: True,
    errno.ECONNREFUSED: True,
    errno.ECONNRESET: True,
    errno.EMFILE: True,
    errno.ENFILE: True,
    errno.ENOMEM: True,
    errno.EPIPE: True,
    errno.EACCES: False,
    errno.EDQUOT: False,
    errno.ENOENT: False,
    errno.ENOSPC: False,
    errno.ENOTDIR: False,
    errno.EPERM: False,
    errno.EROFS: False,
}


def _paths(value: str) -> tuple[Path, ...]:
    paths = tuple(Path(name) for name in value.split(":") if name)
    if not all(path.is_absolute() for path in paths):
        raise ValueError("expected absolute paths separated by colons")
    return paths


@dataclass(frozen=True)
class LocalSettings:
    """What this provider needs beside the shared settings."""

    root: Path | None = setting(
        "LOCAL_ROOT",
        "Where the sessions' files are kept. Unset: `$XDG_STATE_HOME/sandboxes`, else `~/.local/state/sandboxes`.",
        parse=Path,
        default=None,
    )
    memory_mb: int = setting(
        "LOCAL_MEMORY_MB",
        "Private memory of each process, and the size of each of `/tmp`, `/run` and `/dev/shm`, in MiB.",
        parse=count,
        default=2048,
    )
    pids: int = setting("LOCAL_PIDS", "Processes and threads of one sandbox.", parse=count, default=256)
    file_mb: int = setting("LOCAL_FILE_MB", "The largest file a sandbox can write, in MiB.", parse=count, default=1024)
    readable: tuple[Path, ...] | None = setting(
        "LOCAL_READABLE",
        "More directories of this machine that every sandbox may read, separated by colons: custom tools, toolchains.",
        parse=_paths,
        default=None,
    )
    allow_unisolated: bool = setting(
        "ALLOW_UNISOLATED_TOOLS",
        "Where bubblewrap does not run, run the agent's tools as plain processes of this user, who can then read and"
        " change everything this user can. For demos on a machine you can lose.",
        parse=flag,
        default=False,
    )


SETTINGS = (LocalSettings,)  # this folder's own: what is wrong with them is told with the rest


def open_provider(environ: Mapping[str, str], settings: Settings) -> LocalProvider:
    """The provider as the environment describes it. Raises `SettingsError`, also where sandboxes cannot be isolated
    and nobody allowed that."""
    own = load(LocalSettings, environ)
    if not _ID.match(settings.environment_id):
        raise SettingsError("ANTHROPIC_ENVIRONMENT_ID is unusable: expected letters, digits, - and _")
    isolation: Isolation = "bubblewrap"
    if problem := bubblewrap.problem(sys.executable):
        if not own.allow_unisolated:
            raise SettingsError(f"{problem}; or set ALLOW_UNISOLATED_TOOLS=true to run tools without isolation")
        _log.warning(line("isolation", provider="local", reason=f"tools run without isolation: {problem}"))
        isolation = "none"
    state_home = environ.get("XDG_STATE_HOME") or f"{environ.get('HOME') or '~'}/.local/state"
    return LocalProvider(
        (own.root or Path(state_home, "sandboxes")).expanduser().absolute() / settings.environment_id,
        isolation=isolation,
        keep_warm_seconds=settings.keep_warm_seconds,
        memory_mb=own.memory_mb,
        pids=own.pids,
        file_mb=own.file_mb,
        readable=own.readable or (),
        certificates=environ.get("SSL_CERT_FILE", ""),
    )


class LocalProvider:
    """Sandboxes in the directories below `root`; all of them belong to one environment."""

    name = "local"

    def __init__(
        self,
        root: Path,
        *,
        isolation: Isolation = "bubblewrap",
        keep_warm_seconds: float = 300.0,
        runner: Path | None = None,
        python: str = sys.executable,
        memory_mb: int = 2048,
        pids: int = 256,
        file_mb: int = 1024,
        grace_seconds: float = GRACE_SECONDS,
        readable: Sequence[Path] = (),
        certificates: str = "",
    ) -> None:
        here = Path(__file__).resolve().parent
        self._root = root
        self._isolated = isolation == "bubblewrap"
        self._keep_warm_seconds = keep_warm_seconds
        self._grace_seconds = grace_seconds
        self._runner = (runner or here / "_shared" / "sandbox_runner.py").absolute()
        self._init = here / "sandbox_init.py"
        self._python = os.path.abspath(python)  # started as ../venv/bin/python, say: `..` leads elsewhere in a sandbox
        self._memory_bytes, self._pids, self._file_bytes = memory_mb << 20, pids, file_mb << 20
        self._readable = tuple(readable)
        self._certificates = certificates
        self._watchers: dict[threading.Thread, session.Session] = {}  # of the sandboxes this process started
        if self._isolated:
            _refuse_if_shown(
                [root, *here.glob(".env")], [Path("/usr"), *bubblewrap.python_prefixes(python), *self._readable]
            )

    async def acquire(self, session_id: str) -> LocalSandbox:
        """The session's sandbox, started if it does not run. Waits for one that is just ending."""
        place = self._session(session_id)
        if place is None:
            raise LaunchFailed("the session id cannot be the name of a directory", retriable=False)
        request = {"do": "hold", "seconds": ACQUIRED_SECONDS}
        with _mapped():
            async with place.locked(create=True) as created:
                answer = await place.ask(request)
                if answer and answer["stopping"]:
                    await place.end(self._grace_seconds)
                if answer is None or answer["stopping"]:
                    self._boot(place)
                    if await place.ask(request) is None:
                        raise await asyncio.to_thread(self._why, place)
                place.touch()
        return LocalSandbox(place, created, self._program(), self._environment(place))

    async def renew(self, sandbox_id: str, seconds: float) -> None:
        """Keeps the sandbox for `seconds` more, if it runs."""
        if place := self._session(sandbox_id):
            with _mapped():
                if await place.ask({"do": "renew", "seconds": seconds}):
                    place.touch()

    async def sandboxes(self) -> AsyncIterator[SandboxInfo]:
        """The sessions that have a directory; running is whose init answers."""
        with _mapped():
            for name in await asyncio.to_thread(self._names):
                place = self._session(name)
                if place and (times := place.times()):
                    running = await place.ask({"do": "renew", "seconds": 0.0}) is not None
                    yield SandboxInfo(name, name, *times, running)

    async def release(self, sandbox_id: str) -> None:
        """Lets the runner hand over, ends the sandbox and deletes its files."""
        place = self._session(sandbox_id)
        if place is None:
            return
        with _mapped():
            async with place.locked(create=False) as found:
                if not found:
                    return
                await place.end(self._grace_seconds)
                place.set_aside()
            for rubbish in await asyncio.to_thread(self._rubbish):  # ours, and what a killed host left half deleted
                await asyncio.to_thread(session.delete, rubbish)

    async def close(self) -> None:
        """Ends the sandboxes this process started; their runners hand over first. The files stay."""
        started = dict(self._watchers)
        with _mapped():
            await asyncio.gather(*(place.end(self._grace_seconds) for place in started.values()))
        for watcher in started:
            await asyncio.to_thread(watcher.join, _COLLECT_SECONDS)

    def _session(self, session_id: str) -> session.Session | None:
        return session.Session(self._root / session_id) if _ID.match(session_id) else None

    def _names(self) -> list[str]:
        return sorted(os.listdir(self._root)) if self._root.is_dir() else []

    def _rubbish(self) -> list[Path]:
        return list(self._root.glob(f"{session.RELEASED}*"))

    def _boot(self, place: session.Session) -> None:
        uid = bubblewrap.uid_for(place.directory.name) if self._isolated else 0
        place.make_parts(uid)
        limits = {"RLIMIT_CORE": 0, "RLIMIT_DATA": self._memory_bytes, "RLIMIT_FSIZE": self._file_bytes}
        if self._isolated and (uid or _kernel() >= _PROCESSES_COUNT_PER_NAMESPACE):
            limits["RLIMIT_NPROC"] = self._pids
        environment = self._environment(place)
        config: dict[str, Any] = {"uid": uid, "isolated": self._isolated, "rlimits": limits}
        config |= {"state": environment["SANDBOX_STATE_DIR"]}
        config |= {"keep_warm": self._keep_warm_seconds, "hold": ACQUIRED_SECONDS, "grace": self._grace_seconds}
        process, life = place.boot(self._init_command(place, uid), config, environment)
        watcher = threading.Thread(target=self._watch, args=(process, life), daemon=True)
        self._watchers[watcher] = place
        watcher.start()

    def _watch(self, process: subprocess.Popen[bytes], life: int) -> None:
        """Collects the process. Until then `life` stays open. A thread, so that neither depends on an event loop."""
        process.wait()
        os.close(life)
        self._watchers.pop(threading.current_thread(), None)

    def _init_command(self, place: session.Session, uid: int) -> list[str]:
        if not self._isolated:
            return [self._python, "-I", "-S", str(self._init)]
        shown = {self._runner.parent: Path(bubblewrap.RUNNER_DIRECTORY), self._init: Path(bubblewrap.INIT)}
        shown |= {path: path for path in (*self._readable, *([Path(self._certificates)] if self._certificates else ()))}
        wall = bubblewrap.arguments(
            place.directory, uid=uid, shown=shown, python=self._python, memory_bytes=self._memory_bytes
        )
        return [*wall, self._python, "-I", "-S", bubblewrap.INIT]

    def _program(self) -> list[str]:
        runner = Path(bubblewrap.RUNNER_DIRECTORY, self._runner.name) if self._isolated else self._runner
        return [self._python, "-I", str(runner)]

    def _environment(self, place: session.Session) -> dict[str, str]:
        """The whole environment of init and the runner: nothing of ours is inherited."""
        variables = {
            "HOME": bubblewrap.HOME if self._isolated else str(place.home),
            "LANG": "C.UTF-8",
            "PATH": f"/usr/local/bin:/usr/bin:/bin:{Path(self._python).parent}",
            "SANDBOX_STATE_DIR": bubblewrap.STATE if self._isolated else str(place.state),
            "SANDBOX_WORKDIR": bubblewrap.WORKSPACE if self._isolated else str(place.workspace),
        }
        return variables | ({"SSL_CERT_FILE": self._certificates} if self._certificates else {})

    def _why(self, place: session.Session) -> LaunchFailed:
        """Why a sandbox that was just started does not answer."""
        if self._isolated and (problem := bubblewrap.problem(self._python)):
            return LaunchFailed(problem, retriable=False)
        return LaunchFailed(f"the sandbox ended before it answered: {place.tail(1) or 'no output'}", retriable=True)


class LocalSandbox:
    """One session's sandbox."""

    def __init__(
        self, place: session.Session, created: bool, program: list[str], environment: Mapping[str, str]
    ) -> None:
        self.id = place.directory.name
        self.created = created
        self._place = place
        self._program = program
        self._environment = environment

    async def start(self, launch: Launch) -> Started:
        """Sends init the files and the job, and reads what the runner says until it is ready."""
        request: dict[str, Any] = {"do": "start", "argv": self._program, "env": self._environment}
        request["files"] = [(path, len(content)) for path, content in launch.files.items()]
        request["stdin"] = len(launch.stdin)
        with _mapped():
            try:
                async with self._place.connected() as (reader, writer):
                    writer.write(json.dumps(request).encode() + b"\n")
                    writer.write(b"".join(launch.files.values()) + launch.stdin)
                    await writer.drain()
                    return await read_ready(aiter(reader))
            except session.NOT_LISTENING as error:
                raise LaunchFailed("the sandbox has ended", retriable=True) from error

    async def tail(self, lines: int) -> str:
        """The end of the runner's log."""
        with _mapped():
            return await asyncio.to_thread(self._place.tail, lines)


def _refuse_if_shown(private: Sequence[Path], shown: Sequence[Path]) -> None:
    """Raises `SettingsError` when a directory that every sandbox can read holds what none may."""
    for path in private:
        for parent in shown:
            if path.resolve().is_relative_to(parent.resolve()):
                raise SettingsError(f"{path} is inside {parent}, which every sandbox can read: move it")


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Turns what the operating system refuses into our error."""
    try:
        yield
    except TimeoutError as error:
        raise LaunchFailed("the sandbox does not answer", retriable=True) from error
    except OSError as error:
        if error.errno not in _RETRIABLE:
            raise
        raise LaunchFailed(f"this machine refused: {error}", retriable=_RETRIABLE[error.errno]) from error


def _kernel() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
