"""What the runner does to processes: hides itself (R11) and ends everything the agent started (R5, R6).

The agent's shell runs as the same user as the runner. A non-dumpable process keeps its memory, environment and open
files from its own uid; only root can still look, which is why an image of ours runs the runner as an ordinary user.
Until `hide` there is a window, the start of the interpreter: a process of the agent's that was there before us can open
our files and our memory in it, and keeps what it has opened. A runner that follows another in a sandbox kills nothing
at its start, so a sandbox that must close the window has it born hidden: by an interpreter that its user may execute
and not read (mode 0711), or forked, without an exec, from a process that is hidden. The job is read after `hide`.

Being a child subreaper keeps every process of the agent, also one that left its group and session, below us where we
find it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_DUMPABLE = 4
_PR_GET_DUMPABLE = 3
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"
_OOM_STEP, _OOM_MOST = 500, 1000
_KILL_ROUNDS = 50  # a process can fork while we look; each round kills what it sees


def hide() -> bool:
    """R11: makes this process unreadable to others of its user. False where there is no such thing (not Linux); raises
    `OSError` where there should be."""
    if not _LINUX:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0 or libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")
    return True


def hear_signals() -> None:
    """Unblocks the signals that end a runner: a process inherits what its starter had blocked, and would be deaf."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


class OomDescent:
    """When memory runs out, the kernel kills what the agent started before the runner: each child of ours gets a higher
    score than we have, and what it starts inherits that. A hidden process cannot write its own score and a child has
    its parent's at first; so it is written from outside, on the event loop's next turn after the start, before the
    child is told anything. A start from a thread may miss it."""

    def __init__(self) -> None:
        self._own = _oom_score("self")

    def install(self) -> None:
        """From now on, for as long as the process lives."""
        if self._own is not None:
            sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[object, ...]) -> None:
        if event != "subprocess.Popen":
            return
        with contextlib.suppress(RuntimeError):  # a start from a thread
            asyncio.get_running_loop().call_soon(self._raise_children)

    def _raise_children(self) -> None:
        me = os.getpid()
        for pid, parent, _ in _processes():
            if parent == me and self._own is not None and _oom_score(pid) == self._own:
                with contextlib.suppress(OSError):  # gone, or hidden by itself
                    Path(f"/proc/{pid}/oom_score_adj").write_text(str(min(self._own + _OOM_STEP, _OOM_MOST)))


def _oom_score(pid: int | str) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    except OSError:
        return None  # gone, or there is no such thing here


def adopt_orphans() -> None:
    """Makes every orphaned descendant our child instead of the sandbox's init's."""
    if _LINUX:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Every living process below `root`, parents first. Zombies are not living. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for pid, parent, state in _processes():
        if state != "Z":
            children.setdefault(parent, []).append(pid)
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill_descendants(root: int | None = None) -> int:
    """SIGKILLs everything below `root` (this process by default) until nothing is left. Returns how many it killed."""
    return _kill_all(lambda: descendants(os.getpid() if root is None else root))


def _kill_all(find: Callable[[], list[int]]) -> int:
    killed: set[int] = set()
    for _ in range(_KILL_ROUNDS):
        alive = find()
        if not alive:
            break
        for pid in alive:
            _signal(pid, signal.SIGKILL)
        killed.update(alive)
        time.sleep(0.005)  # the kernel needs a moment to take them down; the next round looks again
    return len(killed)


def kill_tree(pid: int) -> None:
    """SIGKILLs everything below `pid`, then `pid`. It is stopped first: it starts nothing new, and as the subreaper of
    its tree it keeps the orphans where they are found."""
    _signal(pid, signal.SIGSTOP)
    kill_descendants(pid)
    _signal(pid, signal.SIGKILL)


def terminate(pid: int) -> None:
    """SIGTERM, to a process that may be gone already, or that the agent has stopped."""
    _signal(pid, signal.SIGTERM)
    _signal(pid, signal.SIGCONT)


def mark() -> Callable[[], int]:
    """Notes every process below this one. What it returns kills those that came since, and spares what earlier ones
    started: a background server that begins a new worker meanwhile keeps it."""
    me = os.getpid()
    before = {pid: _started(pid) for pid in descendants(me)}

    def is_earlier(pid: int) -> bool:
        return pid in before and before[pid] == _started(pid)  # a number may be given away again

    def newcomers() -> list[int]:
        parents = {pid: parent for pid, parent, state in _processes() if state != "Z"}
        found = []
        for pid in parents:
            above = pid
            while above != me and above in parents and not is_earlier(above):
                above = parents[above]
            if above == me and pid != me:
                found.append(pid)
        return found

    return lambda: _kill_all(newcomers)


class OrphanReaper:
    """Collects adopted zombies, which nobody else waits for.

    A child that the SDK started is collected by the event loop at once, one of a custom tool when the tool looks. One
    that is still a zombie at the second look was adopted. Call `reap` once a minute.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def reap(self) -> None:
        me = os.getpid()
        zombies = {pid for pid, parent, state in _processes() if parent == me and state == "Z"}
        for pid in zombies & self._seen:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue
        self._seen = zombies


def _processes() -> list[tuple[int, int, str]]:
    """(pid, parent pid, state) of every process in /proc."""
    found: list[tuple[int, int, str]] = []
    if not _LINUX:
        return found
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(errors="replace")
        except OSError:
            continue  # gone since the listing
        state, parent = stat.rpartition(")")[2].split()[:2]  # the name before it may hold spaces and brackets
        found.append((int(entry), int(parent), state))
    return found


def _started(pid: int) -> str:
    """When it was started, in the kernel's ticks; empty when it is gone."""
    try:
        return Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
