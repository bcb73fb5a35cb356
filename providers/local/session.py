"""A session's directory, and how the host reaches the sandbox in it. The only place that knows what lies where:

    <root>/<session>/  workspace  home  runner.log  control.sock  lock  passwd  group  (state, without bubblewrap)

Several host processes (a webhook server and a poller) may share one root. They meet at `lock` (flock), and at
`control.sock`, where the sandbox's first process (`sandbox_init.py`) answers as long as it runs. The log's time says
when the sandbox was last used.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 15.0  # init answers within milliseconds; a busy machine may take seconds to start Python
FORCE_SECONDS = 5.0  # after the grace init gives its runners
RELEASED = ".released-"  # how the name of a directory starts that is being deleted
_TOOLS = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
_POLL_SECONDS = 0.05
_LINE_BYTES = 1 << 20
_SOL_LOCAL, _LOCAL_PEERPID = 0, 2  # macOS, <sys/un.h>
_BACKLOG = 128
NOT_LISTENING = (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError)


@dataclass(frozen=True)
class Session:
    """One session's directory. Nothing is remembered here: what is true is what lies on the disk and who answers."""

    directory: Path

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"

    @property
    def home(self) -> Path:
        return self.directory / "home"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def _log(self) -> Path:
        return self.directory / "runner.log"

    @contextlib.asynccontextmanager
    async def locked(self, *, create: bool) -> AsyncIterator[bool]:
        """Holds the lock, against this process and others. With `create`, yields whether this call made the directory;
        without, whether there is one (an absent one is not locked)."""
        made = False
        while True:
            if create:
                self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    self.directory.mkdir(mode=0o700)
                    made = True
            elif not self.directory.is_dir():
                yield False
                return
            if (descriptor := _try_lock(self.directory / "lock", os.O_RDWR | os.O_CREAT)) is not None:
                try:
                    yield made or not create
                finally:
                    os.close(descriptor)
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Init's answer, None when no sandbox runs. Raises `TimeoutError`."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self.connected() as (reader, writer):
                writer.write(json.dumps(request).encode() + b"\n")
                answer = await reader.readline()
        except NOT_LISTENING:
            return None
        return json.loads(answer) if answer.endswith(b"\n") else None

    async def end(self, grace_seconds: float) -> None:
        """Ends the sandbox: in order, or by force when it does not follow. Returns when it has ended."""
        with contextlib.suppress(*NOT_LISTENING):
            async with self.connected() as (reader, writer):
                writer.write(b'{"do": "stop"}\n')
                try:
                    async with asyncio.timeout(grace_seconds + FORCE_SECONDS):
                        await reader.read()  # init's end closes the connection
                except TimeoutError:
                    _kill_init(writer.get_extra_info("socket"))
                    async with asyncio.timeout(ANSWER_SECONDS):
                        await reader.read()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        with self._address() as address:
            reader, writer = await asyncio.open_unix_connection(address, limit=_LINE_BYTES)
        try:
            yield reader, writer
        finally:
            writer.close()

    def boot(
        self, command: Sequence[str], config: Mapping[str, Any], environment: Mapping[str, str]
    ) -> tuple[subprocess.Popen[bytes], int]:
        """Starts init and returns it with a descriptor: the sandbox ends when that is closed, so also with us.

        Called with the lock held. Does not block, and is not interrupted between its steps."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as unless_booted:
            life_end, life = os.pipe()
            unless_booted.callback(os.close, life)
            ours.callback(os.close, life_end)
            log = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            ours.callback(os.close, log)
            listener = ours.enter_context(socket.socket(socket.AF_UNIX))
            with self._address() as address:
                (self.directory / "control.sock").unlink(missing_ok=True)
                listener.bind(address)
            listener.listen(_BACKLOG)  # from here a connection waits for init, and is closed if init fails
            inherited = {"life": life_end, "log": log, "listen": listener.fileno()}
            process = subprocess.Popen(
                [*command, json.dumps({**config, **inherited})],
                env=environment,
                cwd=self.workspace,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we end it
                pass_fds=list(inherited.values()),
            )
            unless_booted.pop_all()
        return process, life

    def make_parts(self, uid: int) -> None:
        """The directories the sandbox may write to, owned by `uid` of the host unless that is 0. Their parent keeps
        other users out; the mode is set again each time, since an agent that took it away would lock itself out."""
        for part in (self.workspace, self.home):
            part.mkdir(exist_ok=True)
            part.chmod(0o755)
            if uid:
                os.chown(part, uid, uid)

    def touch(self) -> None:
        """Marks the session as used now."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._log)

    def times(self) -> tuple[float, float] | None:
        """When the session was created and last used; None when it is gone."""
        try:
            created_at = (self.directory / "lock").stat().st_mtime
            return created_at, self._log.stat().st_mtime if self._log.exists() else created_at
        except (FileNotFoundError, NotADirectoryError):
            return None

    def tail(self, lines: int) -> str:
        """The last lines of the log; init keeps it small."""
        try:
            text = self._log.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:]) if lines > 0 else ""

    def set_aside(self) -> None:
        """Takes the directory out of the root at one stroke, so that nobody finds half a session. To be deleted."""
        rubbish = self.directory.with_name(f"{RELEASED}{uuid.uuid4().hex}")
        self.directory.rename(rubbish)

    def _address(self) -> contextlib.AbstractContextManager[str]:
        """A short name for the socket's path: a Unix address holds about a hundred bytes, the path may be longer."""
        return by_descriptor(self.directory) if sys.platform == "linux" else by_link(self.directory)


@contextlib.contextmanager
def by_descriptor(directory: Path) -> Iterator[str]:
    """The socket's path by way of a descriptor of its directory (Linux)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/control.sock"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def by_link(directory: Path) -> Iterator[str]:
    """The socket's path by way of a link in a directory that only we can enter (where there is no /proc)."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as short:  # not $TMPDIR: macOS has a long one
        link = Path(short, "d")
        link.symlink_to(directory)
        yield f"{link}/control.sock"


def delete(directory: Path) -> None:
    """Deletes a tree in which nothing runs any more. Leaves it to whoever is deleting it already.

    With rm and find, which manage what an agent may leave: trees deeper than a path can be long (Python's rmtree does
    not), directories that nobody may read, links to elsewhere (not followed). Raises `OSError` when something stays."""
    descriptor = _try_lock(directory, os.O_RDONLY | os.O_DIRECTORY)
    if descriptor is None:
        return
    one_file_system = ["--one-file-system"] if sys.platform == "linux" else ["-x"]
    remove = ["rm", "-rf", *one_file_system, "--", str(directory)]
    open_up = ["find", str(directory), "-type", "d", "!", "-perm", "-700", "-execdir", "chmod", "u+rwx", "{}", ";"]
    try:
        for command in (remove, open_up, remove):
            done = subprocess.run(command, env=_TOOLS, capture_output=True, text=True, errors="replace", check=False)
            if not directory.exists():
                return
    finally:
        os.close(descriptor)
    raise OSError(errno.EACCES, (done.stderr.strip().splitlines() or ["not deleted"])[-1], str(directory))


def _try_lock(path: Path, flags: int) -> int | None:
    """A descriptor that holds the lock, or None: it is held, or the session was released meanwhile."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def peer(connection: socket.socket) -> int:
    """The pid of the process that listens at the other end."""
    if sys.platform == "linux":
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])
    return connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID)


def _kill_init(connection: socket.socket) -> None:
    """SIGKILLs the process at the other end, if that is an init: its sandbox goes with it."""
    pid = peer(connection)
    with contextlib.suppress(ProcessLookupError):
        if "sandbox_init.py" in _command_line(pid):
            os.kill(pid, signal.SIGKILL)


def _command_line(pid: int) -> str:
    if sys.platform == "linux":
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        return ""
    shown = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)
    return shown.stdout
