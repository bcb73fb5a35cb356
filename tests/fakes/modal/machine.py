"""The machine of one sandbox: a bubblewrap with a process table, a root file system and mounts of its own.

Its commands are real processes. Started by root they are root inside, as at Modal, with the few capabilities that
`sandbox_init.py` needs; started by an ordinary user they are the agent's user throughout. The network is the host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GUEST = Path(__file__).with_name("guest.py")
AGENT_ID = 10001
OUT, ERR = 1, 2
_CAPABILITIES = ("SETUID", "SETGID", "CHOWN", "KILL", "DAC_OVERRIDE", "FOWNER")
_ETC = "alternatives ca-certificates hosts ld.so.cache ld.so.conf ld.so.conf.d localtime nsswitch.conf resolv.conf ssl"
_PASSWD = "root:x:0:0::/root:/bin/bash\nagent:x:10001:10001::/home/agent:/bin/bash\n"
_GROUP = "root:x:0:\nagent:x:10001:\n"
_LINGER_SECONDS = 0.5  # output that arrives after a command's end, when something it left holds the pipe


@functools.cache
def problem() -> str | None:
    """Why no machine can be started here, or None."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bwrap is not installed: apt-get install bubblewrap"
    with tempfile.TemporaryDirectory() as directory:
        trial = [*_wall(Path(directory), {}, {}), sys.executable, "-I", "-S", "-c", "pass"]
        done = subprocess.run(trial, capture_output=True, text=True, timeout=60, check=False)
    return None if done.returncode == 0 else f"bwrap does not work here: {done.stderr.strip()[-200:]}"


def python_paths() -> list[Path]:
    """Where this process's Python lives, unless /usr holds it."""
    names = [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)]
    paths = {Path(os.path.abspath(name)) for name in names} | {Path(name).resolve() for name in names}
    return sorted(path for path in paths if not path.is_relative_to("/usr") and path != Path("/"))


def path_variable() -> str:
    return f"{Path(os.path.abspath(sys.executable)).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def _wall(scratch: Path, files: Mapping[str, Path], mounts: Mapping[str, Path]) -> list[str]:
    root = os.geteuid() == 0
    command = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--new-session"]
    command += ["--die-with-parent"]
    command += ["--hostname", "modal", "--cap-drop", "ALL"]
    if root:
        command += [word for name in _CAPABILITIES for word in ("--cap-add", f"CAP_{name}")]
    else:
        command += ["--unshare-user", "--uid", str(AGENT_ID), "--gid", str(AGENT_ID)]
    command += ["--proc", "/proc", "--dev", "/dev"]
    for name in ("/tmp", "/run", "/var", "/home", "/root"):
        command += [*(["--perms", "1777"] if name == "/tmp" else []), "--tmpfs", name]
    for name in ("bin", "sbin", "lib", "lib64"):
        path = Path("/", name)
        command += ["--symlink", str(path.readlink()), str(path)] if path.is_symlink() else []
        command += ["--ro-bind", str(path), str(path)] if path.is_dir() and not path.is_symlink() else []
    for path in [Path("/usr"), *(Path("/etc", name) for name in _ETC.split()), *python_paths()]:
        command += _bind("--ro-bind", path, str(path)) if path.exists() else []
    for name, content in (("passwd", _PASSWD), ("group", _GROUP)):
        (scratch / name).write_text(content)
        (scratch / name).chmod(0o644)
        command += ["--ro-bind", str(scratch / name), f"/etc/{name}"]
    for inside, path in files.items():
        command += _bind("--ro-bind", path, inside)
    for inside, path in mounts.items():
        command += _bind("--bind", path, inside)
    return command


def _bind(how: str, source: Path, target: str) -> list[str]:
    above = [word for parent in reversed(Path(target).parents[:-1]) for word in ("--dir", str(parent))]
    return [*above, how, str(source), target]


class Process:
    """A command in a machine. Its output is kept, and can be read from any offset."""

    def __init__(self) -> None:
        self.output = {OUT: bytearray(), ERR: bytearray()}
        self.code: int | None = None
        self.stdin_offset = 0
        self.ended = asyncio.Event()
        self._changed = asyncio.Event()
        self._pipes: dict[int, asyncio.BaseTransport | None] = {OUT: None, ERR: None}
        self._stdin: int | None = None

    async def attach(self, stdin: int, outputs: Mapping[int, int]) -> None:
        """Takes over our ends of its pipes."""
        self._stdin = stdin
        for descriptor, source in outputs.items():
            make = functools.partial(_Output, self, descriptor)
            self._pipes[descriptor], _ = await asyncio.get_running_loop().connect_read_pipe(
                make, os.fdopen(source, "rb", 0)
            )

    async def feed(self, offset: int, data: bytes, eof: bool) -> None:
        """Writes to its stdin what has not been written yet: a client may send the same bytes twice."""
        fresh = data[self.stdin_offset - offset :] if offset <= self.stdin_offset else b""
        if self._stdin is not None and fresh:
            self.stdin_offset += len(fresh)
            with contextlib.suppress(BrokenPipeError):
                await asyncio.to_thread(_write_all, self._stdin, fresh)
        if eof:
            self.close_stdin()

    def close_stdin(self) -> None:
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None

    async def read(self, descriptor: int, offset: int) -> AsyncIterator[bytes]:
        """What it writes, from `offset`, until its end."""
        while True:
            data = bytes(self.output[descriptor][offset:])
            if data:
                offset += len(data)
                yield data
            elif descriptor in self._pipes:
                await self._changed.wait()
            else:
                return

    def say(self, descriptor: int, data: bytes) -> None:
        self.output[descriptor] += data
        self._notify()

    def close(self, descriptor: int) -> None:
        if pipe := self._pipes.pop(descriptor, None):
            pipe.close()
        self._notify()

    def end(self, code: int) -> None:
        self.code = code
        self.ended.set()
        self.close_stdin()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Output(asyncio.Protocol):
    """One of a command's outputs."""

    def __init__(self, process: Process, descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor

    def data_received(self, data: bytes) -> None:
        self._process.say(self._descriptor, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._process.close(self._descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class Machine:
    """A running sandbox. `files` (path inside -> path here) are its image's, `mounts` its volumes'."""

    def __init__(self, scratch: Path, files: Mapping[str, Path], mounts: Mapping[str, Path]) -> None:
        self._scratch = scratch
        self._files = files
        self._mounts = mounts
        self._processes: dict[str, Process] = {}
        self._started: dict[str, asyncio.Future[str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._bwrap: asyncio.subprocess.Process | None = None
        self._link: socket.socket | None = None
        self.gone = asyncio.Event()

    async def boot(self) -> None:
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.setblocking(False)
        files = {**self._files, "/.guest.py": GUEST}
        command = [*_wall(self._scratch, files, self._mounts), sys.executable, "-I", "-S", "/.guest.py"]
        self._bwrap = await asyncio.create_subprocess_exec(
            *command,
            str(theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            env={"PATH": path_variable()},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._spawn(self._listen())
        self._spawn(self._watch(self._bwrap))

    async def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: str) -> Process:
        """Runs a command. Raises `OSError` when it cannot be run."""
        if self._link is None or self.gone.is_set():
            raise ProcessLookupError("the machine is gone")
        process, name = Process(), uuid.uuid4().hex
        self._processes[name] = process
        self._started[name] = asyncio.get_running_loop().create_future()
        stdin, out, err = os.pipe(), os.pipe(), os.pipe()
        theirs = [stdin[0], out[1], err[1]]
        request = {"id": name, "argv": list(argv), "env": dict(env), "cwd": cwd}
        socket.send_fds(self._link, [json.dumps(request).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        await process.attach(stdin[1], {OUT: out[0], ERR: err[0]})
        if (error := await self._started[name]) is not None:
            process.end(127)
            process.close(OUT)
            process.close(ERR)
            raise OSError(error)
        return process

    async def kill(self) -> None:
        """Ends every process at once, as the loss of the machine would."""
        if self._bwrap is not None and self._bwrap.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._bwrap.pid, signal.SIGKILL)
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.shutdown(socket.SHUT_RDWR)  # the guest reads the end, and takes everything along
        await self.gone.wait()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self) -> None:
        assert self._link is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                message = await loop.sock_recv(self._link, 1 << 16)
            except OSError:
                return
            if not message:
                return
            answer = json.loads(message)
            started, process = self._started[answer["id"]], self._processes[answer["id"]]
            if "code" in answer:
                process.end(answer["code"])
                self._spawn(self._let_go(process))
            elif not started.done():
                started.set_result(answer.get("error"))
            if "code" in answer and not started.done():
                started.set_result(None)

    async def _let_go(self, process: Process) -> None:
        await asyncio.sleep(_LINGER_SECONDS)
        for descriptor in (OUT, ERR):
            process.close(descriptor)

    async def _watch(self, bwrap: asyncio.subprocess.Process) -> None:
        await bwrap.wait()
        for name, process in self._processes.items():
            if process.code is None:
                process.end(-signal.SIGKILL)
            if not self._started[name].done():
                self._started[name].set_result("the machine is gone")
            for descriptor in (OUT, ERR):
                process.close(descriptor)
        if self._link is not None:
            self._link.close()
        self.gone.set()
