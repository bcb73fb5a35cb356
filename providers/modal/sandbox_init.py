"""What runs in a sandbox besides the runner, and as another user than the agent: root, where Modal starts us.

    sandbox_init.py wait SECONDS    the sandbox's own command: ends it in order, before Modal's time limit would kill it
    sandbox_init.py hold            says how long the sandbox still has, and how many runners are in it
    sandbox_init.py put             writes the files on stdin below the working directory, as the agent
    sandbox_init.py run             starts the runner, whose job is on stdin, and sweeps up after it

Modal runs a command in a sandbox as root and gives it no signal when the sandbox ends. So the runner gets a parent of
ours, which the agent can neither look into nor signal: it makes the runner an ordinary user's, passes SIGTERM on, ends
what the agent left behind and has the files committed. `wait` knows when the sandbox's time is over, and tells it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
WORKSPACE = Path("/workspace")
HOME = Path("/home/agent")
STATE = Path("/run/sandbox")  # ours; the agent can read it
RUNNER_STATE = Path("/run/sandbox-runner")  # the runner's, so the agent's user owns it
AGENT_ID = 10001  # user and group; the image has it, and so does a sandbox that was not started by root
GRACE_SECONDS = 40.0  # for a runner to hand over, which takes it up to 20 s, and for its files to be committed
LOG_BYTES = 1 << 20  # the log starts over when it is larger
_BOOT_SECONDS = 20.0  # `hold` waits this long for `wait`
_SYNC_SECONDS = 60.0
_CHUNK = 4096  # what a pipe that can be written takes without blocking (PIPE_BUF)
_DRAIN_SECONDS = 1.0
_MAX_FILES_BYTES = 256 << 20


def main(argv: list[str]) -> int:
    """The command line. Exit codes: the runner's own for `run`, else 0 done, 1 refused, 2 misused."""
    match argv:
        case ["wait", seconds]:
            return wait(float(seconds))
        case ["hold"]:
            return hold()
        case ["put"]:
            return put()
        case ["run", *rest] if len(rest) < 2:
            return run(Path(rest[0]) if rest else HERE / "_shared" / "sandbox_runner.py")
    sys.stderr.write(f"{__doc__}")
    return 2


# --- wait ------------------------------------------------------------------------------------------------------------


def wait(seconds: float) -> int:
    """Holds the sandbox for `seconds`, or until SIGTERM, then lets its runners hand over. What the runners say goes on
    to our own output, where Modal keeps it for people."""
    ends = time.monotonic() + seconds
    STATE.mkdir(mode=0o755, exist_ok=True)
    (STATE / "runs").mkdir(mode=0o755, exist_ok=True)
    for directory in (WORKSPACE, HOME, RUNNER_STATE):
        _give_to_agent(directory)
    os.mkfifo(STATE / "feed", 0o600)
    feed = os.open(STATE / "feed", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # for writing too: it never ends
    with _signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as (told, _):
        (STATE / "ends.new").write_text(json.dumps({"ends": ends}))
        (STATE / "ends.new").rename(STATE / "ends")  # from here on `hold` answers
        while (left := ends - time.monotonic()) > 0 and not _feed(feed, told, left):
            continue
        (STATE / "leaving").touch()
        for pid in _runs():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while _runs() and time.monotonic() < deadline:
            _feed(feed, told, 0.1)
        _feed(feed, told, 0.0)
    _commit()
    return 0


def _feed(feed: int, told: int, seconds: float) -> bool:
    """Passes on what there is to say. True when a signal came."""
    ready, _, _ = select.select([feed, told], [], [], seconds)
    if feed in ready:
        with contextlib.suppress(OSError):  # nobody reads: that is not what a sandbox ends for
            os.write(1, os.read(feed, 1 << 16))
    return bool(told in ready and os.read(told, 1))


def _give_to_agent(directory: Path) -> None:
    """The mode is set again each time: an agent that took it away would lock itself out."""
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        try:
            os.chown(directory, AGENT_ID, AGENT_ID)
        except PermissionError:  # a mount without owners
            directory.chmod(0o777)
            return
    directory.chmod(0o755)


def _runs() -> list[int]:
    """The pids of the living `run`s: each holds a lock on a file of its own, which ends with it."""
    living = []
    for path in (STATE / "runs").iterdir():
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            living.append(int(path.name))
        except FileNotFoundError:
            continue
    return living


# --- hold ------------------------------------------------------------------------------------------------------------


def hold() -> int:
    """One line: {"left": seconds, "runs": runners}. Waits for a sandbox that is just starting."""
    deadline = time.monotonic() + _BOOT_SECONDS
    while not (STATE / "ends").exists():
        if time.monotonic() > deadline:
            sys.stderr.write("the sandbox's own command does not run\n")
            return 1
        time.sleep(0.02)
    ends = json.loads((STATE / "ends").read_text())["ends"]
    left = 0.0 if (STATE / "leaving").exists() else ends - time.monotonic()
    sys.stdout.write(json.dumps({"left": left, "runs": len(_runs())}) + "\n")
    return 0


# --- put -------------------------------------------------------------------------------------------------------------


def put() -> int:
    """Stdin: a JSON line [[path, size], ...], then the contents. As the agent, so that a link it left leads nowhere
    that it could not write to itself."""
    os.umask(0o022)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(AGENT_ID)
        os.setuid(AGENT_ID)
    stdin = sys.stdin.buffer
    files = json.loads(stdin.readline())
    if sum(size for _, size in files) > _MAX_FILES_BYTES:
        sys.stderr.write(f"the files are larger than {_MAX_FILES_BYTES} bytes\n")
        return 1
    for name, size in files:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            sys.stderr.write("a file is not below the working directory\n")
            return 1
        target = WORKSPACE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
        fresh.write_bytes(stdin.read(size))
        fresh.replace(target)  # what the agent left there is replaced, never opened
    return 0


# --- run -------------------------------------------------------------------------------------------------------------


def run(runner: Path) -> int:
    """Starts the runner and stays until it and all that it started have ended."""
    if (STATE / "leaving").exists():
        sys.stdout.write("the sandbox is about to end\n")
        return 1
    sys.path.insert(0, str(HERE))  # root's, like this file
    from _shared import runner_process

    _give_to_agent(WORKSPACE)  # also back to one that an agent has shut
    runner_process.hide()  # the tools' secrets are in our environment
    runner_process.adopt_orphans()
    mine = STATE / "runs" / str(os.getpid())
    with mine.open("w") as lock, _signals(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD) as (told, came):
        fcntl.flock(lock, fcntl.LOCK_EX)
        output, theirs = os.pipe()
        child = _Runner(runner, theirs, runner_process.hide)
        os.close(theirs)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the job is the runner's alone
        _attend(child, output, told, came)
        runner_process.kill_descendants()
        _commit()
        mine.unlink()
    code = child.returncode or 0
    if code < 0:
        _write(1, f"the runner was killed by {signal.Signals(-code).name}\n".encode())
        return 128 - code
    return code


class _Runner:
    """The runner's process: a fork that becomes the agent's user, and never an exec. What is executed can be looked
    into by its user until it hides itself, and a process of the agent's that waited for that moment could keep its
    memory open and read the job. `hide` makes us unreadable; a fork of ours is, too."""

    def __init__(self, runner: Path, output: int, hide: Callable[[], object]) -> None:
        self.returncode: int | None = None
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # our handlers are not for it
        self._pid = os.fork()
        if not self._pid:
            self._become(runner, output, hide)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)

    def poll(self) -> int | None:
        """Its exit code once it has ended, negative for a signal."""
        if self.returncode is None and (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGTERM)

    def _become(self, runner: Path, output: int, hide: Callable[[], object]) -> NoReturn:
        """What `python -I <runner>` does at its start, in an interpreter that has started."""
        code: object = 1
        try:
            gc.freeze()  # our files are not its to collect, that is, to close
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            for target in (1, 2):
                os.dup2(output, target)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2:
                    with contextlib.suppress(OSError):  # the listing's own
                        os.close(int(name))
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(AGENT_ID)
                os.setuid(AGENT_ID)
            hide()  # again: a change of the user says anew who may look
            environment = _environment()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(WORKSPACE)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            sys.path.remove(str(HERE))
            sys.argv = [str(runner)]
            runpy.run_path(str(runner), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            with contextlib.suppress(OSError):  # nobody reads any more
                sys.stdout.flush()
            os._exit(code if isinstance(code, int) else 1)


def _attend(child: _Runner, output: int, told: int, came: Callable[[], set[int]]) -> None:
    """Passes the runner's words on and SIGTERM in, until the runner has ended."""
    say = _Sayer()
    open_ends = [output, told]
    while child.poll() is None:
        ready, _, _ = select.select(open_ends, [], [])
        if told in ready:
            os.read(told, 1 << 10)
            if came() & {signal.SIGTERM, signal.SIGINT}:
                child.terminate()
        if output in ready:
            if chunk := os.read(output, _CHUNK):
                say(chunk)
            else:
                open_ends.remove(output)
    deadline = time.monotonic() + _DRAIN_SECONDS  # what it said last; something it started may hold the pipe
    while output in open_ends and time.monotonic() < deadline and select.select([output], [], [], 0.05)[0]:
        if not (chunk := os.read(output, _CHUNK)):
            break
        say(chunk)


class _Sayer:
    """Where a runner's words go: the log, `wait`, and our own output for the host. None of them may hold it up."""

    def __init__(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._log = os.open(STATE / "runner.log", flags, 0o600)
        feed = STATE / "feed"
        is_fifo = feed.exists() and stat.S_ISFIFO(feed.stat().st_mode)
        self._feed = os.open(feed, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) if is_fifo else None

    def __call__(self, chunk: bytes) -> None:
        chunk = chunk.decode("utf-8", "replace").encode()  # Modal's client ends at a byte that is no text
        if os.fstat(self._log).st_size + len(chunk) > LOG_BYTES:
            os.ftruncate(self._log, 0)
        for descriptor in (self._log, self._feed, 1):
            if descriptor is not None:
                _write(descriptor, chunk)


def _write(descriptor: int, chunk: bytes) -> None:
    """Writes if that does not block."""
    look = select.poll()
    for start in range(0, len(chunk), _CHUNK):
        with contextlib.suppress(OSError):  # nobody reads, or the disk is full
            look.register(descriptor, select.POLLOUT)
            if look.poll(0):
                os.write(descriptor, chunk[start : start + _CHUNK])


def _environment() -> dict[str, str]:
    """The runner's: the image's and the tools' secrets, and nothing that Modal says about itself."""
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "SANDBOX_"))}
    ours = {"HOME": HOME, "SANDBOX_STATE_DIR": RUNNER_STATE, "SANDBOX_WORKDIR": WORKSPACE, "USER": "agent"}
    return theirs | {name: str(value) for name, value in ours.items()}


def _commit() -> None:
    """Asks the volume to commit what was written. A sandbox's regular end commits too, an irregular one does not."""
    with contextlib.suppress(subprocess.TimeoutExpired, FileNotFoundError):
        subprocess.run(["sync", str(WORKSPACE)], timeout=_SYNC_SECONDS, check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def _signals(*numbers: signal.Signals) -> Iterator[tuple[int, Callable[[], set[int]]]]:
    """A descriptor that becomes readable when one of them came, and the set of those that came since the last call."""
    told, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    came: set[int] = set()
    previous = {number: signal.signal(number, lambda number, frame: came.add(number)) for number in numbers}
    woken = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def since() -> set[int]:
        seen = set(came)
        came.difference_update(seen)
        return seen

    try:
        yield told, since
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(told)
        os.close(tell)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
