"""The first process of a sandbox container: starts runners on request, sweeps up after them, ends the sandbox in order.

    sandbox_init.py '{"keep_warm": 300, ...}'    as process 1

A runner that the Engine itself executed would have no parent that forwards a stop, keeps its log and knows when it has
ended. So what the host executes, `enter.py`, passes a request through to here: one JSON line, for `start` followed by
the files and the job. The job is a credential and goes from the Engine's stream to the runner's stdin, nowhere else.
All these processes are hidden from the agent's shell, which has the same user, by an interpreter that nobody may read
(the Dockerfile says how).

The control socket is abstract: it has no path that the agent could remove. Who connects to it must have come from
outside the container; such a process has no parent in here, and every process of the agent's has one.

A sandbox has no network. What it may reach, it reaches through the egress proxy's Unix socket; programs expect a proxy
at a TCP port, so process 1 listens at one and passes connections on. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from enter import CONTROL
from relay import join

PROXY = ("127.0.0.1", 3128)  # what HTTPS_PROXY names in a sandbox
_CHUNK_BYTES = 1 << 16
_LINE_BYTES = 1 << 20
_UNREAD_BYTES = 1 << 20  # a host that stops reading is dropped rather than waited for
_CONNECTIONS = 256  # to the proxy at a time; each holds two descriptors
_PROXY_SECONDS = 10.0  # the proxy may just be starting again
_PROXY_PAUSE_SECONDS = 0.1
_KILL_ROUNDS = 200  # a process can fork while we look; each round kills what it sees
_PATIENT_ROUNDS = 5
_ROUND_SECONDS = 0.02


class Init:
    """The sandbox's runners, and the clock that ends an unused sandbox."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._runners: dict[int, asyncio.Future[int]] = {}  # living ones, by pid
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._idle_until = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._connections = asyncio.Semaphore(_CONNECTIONS)

    async def run(self) -> None:
        """Serves until something ends the sandbox, then ends every process in it."""
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, number.name)
        control = socket.socket(socket.AF_UNIX)
        control.bind(CONTROL)
        await asyncio.start_unix_server(self._serve, sock=control, limit=_LINE_BYTES)
        await asyncio.start_server(self._pass_on, *PROXY)
        self._keep_warm(self._config["hold"])
        await self._stopping.wait()
        for pid in self._runners:
            os.kill(pid, signal.SIGTERM)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._config["grace"])
        self._runners.clear()  # whoever is left has lost its protection
        await self._kill_leftovers()

    def _stop(self, reason: str) -> None:
        if not self._stopping.is_set():
            self._note(reason)
            self._stopping.set()

    def _keep_warm(self, seconds: float) -> None:
        self._idle_until = max(self._idle_until, self._loop.time() + seconds)
        if self._idle_timer:
            self._idle_timer.cancel()
        self._idle_timer = self._loop.call_at(self._idle_until, self._idle)

    def _idle(self) -> None:
        if not self._runners:
            self._stop("unused")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not _is_from_outside(writer.get_extra_info("socket")):
                return
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # the client left
                request = json.loads(await reader.readline() or b"{}")
                if request.get("do") == "start":
                    await self._start(request, reader, writer)
                elif request.get("do") == "hold":
                    self._keep_warm(self._config["hold"])
                    state = {"stopping": self._stopping.is_set(), "runners": len(self._runners)}
                    writer.write(json.dumps(state).encode() + b"\n")
                    await writer.drain()
                elif request.get("do") == "wait" and self._tasks:
                    await asyncio.wait(list(self._tasks))  # our end closes the connection: that is the answer
        finally:
            writer.close()

    async def _start(self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        files = [(path, await reader.readexactly(size)) for path, size in request["files"]]
        job = await reader.readexactly(request["stdin"])
        if self._stopping.is_set():
            writer.write(b"the sandbox is stopping\n")
            return
        try:
            for path, content in files:
                _put(Path(path), content)
            process = _spawn(request["argv"])
        except OSError as error:
            writer.write(f"the sandbox cannot start a runner: {error}\n".encode())
            return
        self._runners[process.pid] = self._loop.create_future()  # before any await: the reaper must know it
        self._idle_until = self._loop.time()  # it was held for this start
        output = asyncio.StreamReader(limit=_LINE_BYTES)
        await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), process.stdout)
        sink, _ = await self._loop.connect_write_pipe(asyncio.BaseProtocol, process.stdin)
        sink.write(job)
        sink.close()  # after the job is flushed
        task = self._loop.create_task(self._attend(process, output, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await task

    async def _attend(
        self, process: subprocess.Popen[bytes], output: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Passes a runner's output on to the log and to the client, and tidies up when the runner has ended."""
        pump = self._loop.create_task(self._pump(output, writer))
        process.returncode = code = await self._runners[process.pid]  # `_reap` has collected it
        await self._kill_leftovers()
        await asyncio.wait({pump}, timeout=1.0)  # with the leftovers gone, the pipe has no writer but a live runner's
        pump.cancel()
        if code < 0 and not writer.is_closing():
            writer.write(f"the runner was killed by {signal.Signals(-code).name}\n".encode())
        writer.close()
        self._note(f"runner {process.pid} ended with {code}")
        self._keep_warm(self._config["keep_warm"])

    async def _pump(self, output: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await output.read(_CHUNK_BYTES):
            _log(chunk)
            if not writer.is_closing():
                writer.write(chunk)
                if writer.transport.get_write_buffer_size() > _UNREAD_BYTES:
                    writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to the egress proxy."""
        with contextlib.suppress(ConnectionError):
            async with self._connections:
                try:
                    proxy = await self._connect_to_proxy()
                except OSError:
                    writer.write(
                        b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\nthe egress proxy does not run\n"
                    )
                    writer.close()
                    return
                await join((reader, writer), proxy)

    async def _connect_to_proxy(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        deadline = self._loop.time() + _PROXY_SECONDS
        while True:
            try:
                return await asyncio.open_unix_connection(self._config["egress"])
            except (FileNotFoundError, ConnectionRefusedError):
                if self._loop.time() >= deadline:
                    raise
            await asyncio.sleep(_PROXY_PAUSE_SECONDS)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # no children at all
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if waiting := self._runners.pop(ended[0], None):
                    waiting.set_result(os.waitstatus_to_exitcode(ended[1]))

    async def _kill_leftovers(self) -> None:
        """Ends every process that cannot belong to a living runner: all when there is none, else those that began
        before the oldest living one (a newer one may be its child, and is dealt with when that runner ends). Processes
        from outside (a host's request, a person's `docker exec`) are not below us, and are spared."""
        for kill_round in range(_KILL_ROUNDS):
            table = _processes()
            since = min((table[pid][1] for pid in self._runners if pid in table), default=sys.maxsize)
            doomed = [pid for pid, (_, start) in table.items() if start < since and pid not in self._runners]
            if not doomed:
                return
            if kill_round >= _PATIENT_ROUNDS and not self._runners:
                doomed = [-1]  # everything but us at one stroke: a fork bomb cannot outrun it
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_ROUND_SECONDS)  # the kernel takes them down; the next round looks again
        self._note("some processes did not end")

    def _note(self, reason: str) -> None:
        _log(json.dumps({"event": "sandbox", "reason": reason}).encode() + b"\n")


def _is_from_outside(connection: socket.socket) -> bool:
    pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    try:
        return _stat(pid)[1] == 0
    except OSError:
        return False


def _spawn(argv: list[str]) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own, with the container's environment and no descriptors but two pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True)


def _put(path: Path, content: bytes) -> None:
    """Writes a file below the working directory. By rename: what the agent left at `path` (a pipe, a link) is
    replaced, never opened."""
    if path.is_absolute() or ".." in path.parts:
        raise PermissionError(f"{path} is not below the working directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    fresh.write_bytes(content)
    fresh.replace(path)


def _processes() -> dict[int, tuple[int, int]]:
    """Every living process of the container that descends from us: pid -> (parent, start in clock ticks)."""
    table: dict[int, tuple[int, int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone since the listing
                state, parent, start = _stat(int(entry))
                if state != "Z":
                    table[int(entry)] = (parent, start)
    below: dict[int, tuple[int, int]] = {}
    todo = [os.getpid()]
    while todo:
        above = todo.pop()
        children = {pid: entry for pid, entry in table.items() if entry[0] == above}
        below |= children
        todo += children
    return below


def _stat(pid: int) -> tuple[str, int, int]:
    """(state, parent, start in clock ticks since boot). Raises `OSError` for a process that is gone."""
    fields = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def _log(chunk: bytes) -> None:
    """Our standard output is the container's log: the Engine keeps it, and keeps it small."""
    with contextlib.suppress(OSError):
        os.write(1, chunk)


async def main(config: dict[str, Any]) -> None:
    await Init(config).run()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
