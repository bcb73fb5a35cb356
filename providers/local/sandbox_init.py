"""The first process of a sandbox: starts runners on request, sweeps up after them, ends the sandbox in order.

Inside bubblewrap it is PID 1 of the sandbox's own process table; without bubblewrap it is an ordinary process that
adopts orphans. Host processes reach it on a listening socket it inherits (its path does not exist in the sandbox), so
several of them can share a sandbox. A request is one JSON line, for `start` followed by the files and the job: the job
is a credential and goes from the socket to the runner's stdin, nowhere else. Standard library only, no settings but
the JSON in its first argument.

It ends by itself when the host that started it is gone (the `life` pipe reads end-of-file, also after a kill -9), on
SIGTERM, on a `stop` request, or after `keep_warm` seconds without a runner; runners get SIGTERM and `grace` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import json
import os
import resource
import runpy
import signal
import site
import socket
import struct
import subprocess
import sys
import traceback
from io import FileIO
from pathlib import Path
from typing import Any, Final, NoReturn

LOG_BYTES = 1 << 20  # the log starts over when it is larger
_LINE_BYTES = 1 << 20
_UNREAD_BYTES = 1 << 20  # a host that stops reading is dropped rather than waited for
_KILL_ROUNDS = 200  # a process can fork while we look; each round kills what it sees
_ROUND_SECONDS = 0.02
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_CHILD_SUBREAPER: Final = 36
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWUSER = 0x1000_0000
_KEYCTL: Final = {"x86_64": 250, "aarch64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1
# What makes a user namespace, by the architecture that the kernel names to a filter: (clone, unshare, clone3).
_ARCHITECTURES: Final = {
    "x86_64": {0xC000_003E: (56, 272, 435), 0x4000_0003: (120, 310, 435)},
    "aarch64": {0xC000_00B7: (220, 97, 435), 0x4000_0028: (120, 337, 435)},
}


def confine(config: dict[str, Any]) -> None:
    """Gives up what the runner must not have. Everything here is inherited by, or hides us from, what we start."""
    for name in ("listen", "log", "life"):
        os.set_inheritable(config[name], False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the host has blocked, we and the runners hear
    if config["uid"]:  # started by root: become a user of the host that owns nothing but this session
        os.setgroups([])
        os.setgid(config["uid"])  # as root: the real, the effective and the saved one
        os.setuid(config["uid"])
    for name, value in config["rlimits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # Neither our descriptors nor our memory (a job passes through it) are for a shell of the same uid. After
        # setuid, because a change of uid resets it.
        if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) or libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl failed")
        # The keys of whoever started the host stay behind. Where the host's own container forbids keyctl, it forbids
        # it to what we start as well.
        if machine := _KEYCTL.get(os.uname().machine):
            libc.syscall(machine, _KEYCTL_JOIN_SESSION_KEYRING, None)
        if config["isolated"]:
            forbid_user_namespaces(libc)
    Path(config["state"]).mkdir(mode=0o700, exist_ok=True)


def forbid_user_namespaces(libc: ctypes.CDLL) -> None:
    """In a user namespace of its own an agent has every capability over it, and so a larger part of the kernel to
    find a hole in. bubblewrap's `--disable-userns` is not for a sandbox that root started, and not in old versions."""
    program = b""
    for audit, (clone, unshare, clone3) in _ARCHITECTURES.get(os.uname().machine, {}).items():
        # Jumps count instructions: if true, if false.
        block = [
            (0x20, 0, 0, 0),  # load the system call's number
            (0x35, 6, 0, 0x4000_0000),  # x32, a second name for each call: as if there was none
            (0x15, 5, 0, clone3),  # its flags lie in memory, where a filter does not see them; libc falls back on clone
            (0x15, 1, 0, clone),
            (0x15, 0, 2, unshare),
            (0x20, 0, 0, 16),  # load the first argument
            (0x45, 2, 0, _CLONE_NEWUSER),
            (0x06, 0, 0, 0x7FFF_0000),  # allow
            (0x06, 0, 0, 0x0005_0000 | errno.ENOSYS),
            (0x06, 0, 0, 0x0005_0000 | errno.EPERM),
        ]
        instructions = [(0x20, 0, 0, 4), (0x15, 0, len(block), audit), *block]  # load the architecture, compare
        program += b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF_0000)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP) failed")


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

    async def run(self) -> None:
        """Serves until something ends the sandbox, then ends every process in it."""
        life = self._config["life"]
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._stop, number.name)
        self._loop.add_reader(life, self._host_is_gone, life)
        # Listening again makes us, not the host, the peer whose pid a connecting host process sees (SO_PEERCRED).
        await asyncio.start_unix_server(
            self._serve, sock=socket.socket(fileno=self._config["listen"]), limit=_LINE_BYTES
        )
        self._keep_warm(self._config["hold"])
        await self._stopping.wait()
        for pid in self._runners:
            os.kill(pid, signal.SIGTERM)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._config["grace"])
        self._runners.clear()  # whoever is left has lost its protection
        await self._kill_leftovers()

    def _host_is_gone(self, life: int) -> None:
        self._loop.remove_reader(life)
        self._stop("the host that started this sandbox is gone")

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
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # the client left
                request = json.loads(await reader.readline() or b"{}")
                if request.get("do") == "start":
                    await self._start(request, reader, writer)
                elif request.get("do") in ("hold", "renew"):
                    if request["do"] == "hold" or not self._runners:  # a runner keeps the sandbox by itself
                        self._keep_warm(request["seconds"])
                    writer.write(json.dumps({"stopping": self._stopping.is_set()}).encode() + b"\n")
                elif request.get("do") == "stop":
                    self._stop("stopped by a host")
                    await reader.read()  # our end closes the connection: that is the answer
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
            pid, ended, stdin, stdout = await self._spawn(request["argv"], request["env"])
        except OSError as error:
            writer.write(f"the sandbox cannot start a runner: {error}\n".encode())
            return
        self._idle_until = self._loop.time()  # it was held for this start
        output = asyncio.StreamReader(limit=_LINE_BYTES)
        await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), stdout)
        sink, _ = await self._loop.connect_write_pipe(asyncio.BaseProtocol, stdin)
        sink.write(job)
        sink.close()  # after the job is flushed
        task = self._loop.create_task(self._attend(pid, ended, output, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await task

    async def _spawn(self, argv: list[str], env: dict[str, str]) -> tuple[int, asyncio.Future[int], FileIO, FileIO]:
        """Starts a runner: its pid, its exit code to come, its stdin, its stdout."""
        started: asyncio.Future[int] = self._loop.create_future()
        ended: asyncio.Future[int] = self._loop.create_future()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as unless_started:
            stdin_end, stdin = os.pipe()
            stdout, stdout_end = os.pipe()
            for descriptor in (stdin_end, stdout_end):
                theirs.callback(os.close, descriptor)
            for descriptor in (stdin, stdout):
                unless_started.callback(os.close, descriptor)

            def start() -> None:  # called by the loop: what is forked inside of a task would be inside of it for ever
                try:
                    pid = _START(argv, env, stdin_end, stdout_end)
                except OSError as error:
                    started.set_exception(error)
                else:
                    self._runners[pid] = ended  # at once: the reaper must know it
                    started.set_result(pid)

            self._loop.call_soon(start)
            pid = await started
            unless_started.pop_all()
        return pid, ended, FileIO(stdin, "w"), FileIO(stdout)  # the event loop closes them

    async def _attend(
        self, pid: int, ended: asyncio.Future[int], output: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Passes a runner's output on to the log and to the client, and tidies up when the runner has ended."""
        pump = self._loop.create_task(self._pump(output, writer))
        code = await ended
        await self._kill_leftovers()
        await asyncio.wait({pump}, timeout=1.0)  # with the leftovers gone, the pipe has no writer but a live runner's
        pump.cancel()
        if code < 0 and not writer.is_closing():
            writer.write(f"the runner was killed by {signal.Signals(-code).name}\n".encode())
        writer.close()
        self._note(f"runner {pid} ended with {code}")
        self._keep_warm(self._config["keep_warm"])

    async def _pump(self, output: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await output.read(1 << 16):
            self._log(chunk)
            if not writer.is_closing():
                writer.write(chunk)
                if writer.transport.get_write_buffer_size() > _UNREAD_BYTES:
                    writer.close()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # no children at all
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if waiting := self._runners.pop(ended[0], None):
                    waiting.set_result(os.waitstatus_to_exitcode(ended[1]))

    async def _kill_leftovers(self) -> None:
        """Ends every process that cannot belong to a living runner: all when there is none, else those that began
        before the oldest living one (a newer one may be its child, and is dealt with when that runner ends)."""
        for _ in range(_KILL_ROUNDS):
            table = _processes()
            since = min((table[pid][1] for pid in self._runners if pid in table), default=sys.maxsize)
            doomed = [pid for pid, (_, start) in table.items() if start < since and pid not in self._runners]
            if not doomed:
                return
            if os.getpid() == 1 and not self._runners:
                doomed = [-1]  # everything but us at one stroke: a fork bomb cannot outrun it
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_ROUND_SECONDS)  # the kernel takes them down; the next round looks again
        self._note("some processes did not end")

    def _note(self, reason: str) -> None:
        self._log(json.dumps({"event": "sandbox", "reason": reason}).encode() + b"\n")

    def _log(self, chunk: bytes) -> None:
        log = self._config["log"]
        if os.fstat(log).st_size + len(chunk) > LOG_BYTES:
            os.ftruncate(log, 0)
        with contextlib.suppress(OSError):  # a full disk must not end the sandbox
            os.write(log, chunk)


def _fork(argv: list[str], env: dict[str, str], stdin: int, stdout: int) -> int:
    """Starts a runner in a session of its own, with no descriptors but the two: its pid.

    Without an exec, after which a process can be looked into by its user until it hides itself: one that waited for
    that moment could keep the runner's memory open and read the job. A fork of ours is hidden like we are.
    """
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the loop's handlers are not for it
    try:
        pid = os.fork()
        if not pid:
            _become_runner(argv, env, stdin, stdout)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _become_runner(argv: list[str], env: dict[str, str], stdin: int, stdout: int) -> NoReturn:
    """What an interpreter does at its start, in one that has started: `python -I <file> <arguments>`."""
    code: object = 1
    try:
        gc.freeze()  # the loop and its connections are not ours to collect, that is, to close
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        for source, target in ((stdin, 0), (stdout, 1), (stdout, 2)):
            os.dup2(source, target)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(int(name))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.environ.clear()
        os.environ.update(env)
        site.main()  # we run without it: -S
        sys.argv = argv[2:]
        runpy.run_path(argv[2], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def _execute(argv: list[str], env: dict[str, str], stdin: int, stdout: int) -> int:
    """The same by an exec, for systems where nothing hides a process and a fork without an exec is none to rely on."""
    return os.posix_spawn(
        argv[0],
        argv,
        env,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, source, target) for source, target in ((stdin, 0), (stdout, 1), (stdout, 2))
        ],
        setsid=True,
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores them, and a child would inherit that
    )


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
    """Every living process below us: pid -> (parent, start; a later one has a larger number)."""
    table = processes_in_proc() if sys.platform == "linux" else processes_by_ps()
    below: dict[int, tuple[int, int]] = {}
    todo = [os.getpid()]
    while todo:
        parent = todo.pop()
        children = {pid: entry for pid, entry in table.items() if entry[0] == parent}
        below |= children
        todo += children
    return below


def processes_in_proc() -> dict[int, tuple[int, int]]:
    """Every living process: pid -> (parent, start in clock ticks since boot)."""
    table: dict[int, tuple[int, int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone since the listing
                fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] != "Z":
                    table[int(entry)] = (int(fields[1]), int(fields[19]))
    return table


def processes_by_ps() -> dict[int, tuple[int, int]]:
    """The same where there is no /proc; the start is minus the age in seconds. Without ps itself."""
    shown = subprocess.Popen(["ps", "-axo", "pid=,ppid=,stat=,etime="], stdout=subprocess.PIPE, text=True)
    table: dict[int, tuple[int, int]] = {}
    for line in shown.communicate()[0].splitlines():
        pid, parent, state, age = line.split()
        if not state.startswith("Z") and int(pid) != shown.pid:
            days, _, clock = age.rpartition("-")
            seconds = 0
            for part in clock.split(":"):
                seconds = seconds * 60 + int(part)
            table[int(pid)] = (int(parent), -seconds - int(days or 0) * 86400)
    return table


_START = _fork if sys.platform == "linux" else _execute


async def _main(config: dict[str, Any]) -> None:
    await Init(config).run()


if __name__ == "__main__":
    _config = json.loads(sys.argv[1])
    confine(_config)
    asyncio.run(_main(_config))
