"""One runner per sandbox (R3): a file lock, and how a newcomer takes over from a runner that no longer serves.

The lock is `flock` on a file in the sandbox's state directory, so the kernel frees it with its holder. Its content
tells a newcomer about the holder: {phase, pid, last_heartbeat}. A newcomer never signals first. "A process holds the
lock" is not "a runner serves this item": only the control plane knows, so the newcomer asks it, with a heartbeat that
cannot match.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from . import runner_process

Phase = Literal["loading", "claimed", "leaving"]

WAIT_SECONDS = 60.0  # in all; below the host's launch budget of 90 s
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL of a holder whose item is queued again
PROBE_SECONDS = 2.0  # between two questions to the control plane
_LOOK_SECONDS = 0.2
_RECORD_BYTES = 512


@dataclass(frozen=True)
class Holder:
    """What the lock file says about its holder. Written by the holder, so it may be stale or absent."""

    phase: Phase
    pid: int
    last_heartbeat: str | None


@dataclass(frozen=True)
class LeaseState:
    """What the control plane says about the item: its state, and the last heartbeat it recorded."""

    state: str
    last_heartbeat: str | None


class LockHeld(Exception):
    """Another runner held the lock until the time to wait for it was over."""


class Lock:
    """The lock of one sandbox."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            _move_aside(directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        open_to_us(directory)
        self._path = directory / "runner.lock"
        self._descriptor: int | None = None

    def try_take(self) -> bool:
        """Takes the lock when it is free, and says `loading`."""
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)  # what a dead holder said is not said of us
        self._descriptor = descriptor
        self.say("loading", None)
        return True

    def _open(self) -> int:
        """The lock file. What else the agent may have put in its place nobody can hold a lock on: it is moved aside."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(self._path).st_mode):
                _move_aside(self._path)
            elif not os.access(self._path, os.R_OK | os.W_OK):
                self._path.chmod(0o600)
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)

    def say(self, phase: Phase, last_heartbeat: str | None) -> None:
        """Records what the holder is doing. One write over the old record, so it also works on a full disk; a reader
        sees the old one or the new one or, for an instant, half of one, which it reads again."""
        if self._descriptor is None:
            return
        record = json.dumps({"phase": phase, "pid": os.getpid(), "last_heartbeat": last_heartbeat})
        try:
            os.pwrite(self._descriptor, record.ljust(_RECORD_BYTES).encode(), 0)
        except OSError:
            return  # no room: a newcomer learns nothing and waits; the lock itself holds

    def holder(self) -> Holder | None:
        """What the file says, or None when it says nothing usable. The agent can write it: a pid is checked before
        anybody signals it."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                record = json.loads(file.read(_RECORD_BYTES))
            phase, pid, last_heartbeat = record["phase"], record["pid"], record["last_heartbeat"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        if phase not in get_args(Phase) or type(pid) is not int or pid <= 1 or pid == os.getpid():
            return None
        return Holder(phase, pid, last_heartbeat if isinstance(last_heartbeat, str) else None)

    def release(self) -> None:
        """Frees the lock. The file stays: removing it would let two runners lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def open_to_us(directory: Path) -> None:
    """Undoes that the agent, who is the same user, has shut a directory that the session needs."""
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        with contextlib.suppress(PermissionError):  # not ours
            directory.chmod(stat.S_IMODE(directory.stat().st_mode) | stat.S_IRWXU)


def _move_aside(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name(f"{path.name}.{os.urandom(8).hex()}"))


async def take_over(
    lock: Lock,
    probe: Callable[[], Awaitable[LeaseState | None]],
    *,
    wait_seconds: float = WAIT_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
    probe_seconds: float = PROBE_SECONDS,
) -> bool:
    """Waits for the lock. True: it is ours. False: a healthy runner serves the item, so none is needed.

    `probe` asks the control plane about the item (None: it did not answer). Raises `LockHeld` after `wait_seconds`,
    and `OSError` when the lock file is not one.
    """
    deadline = time.monotonic() + wait_seconds
    probe_at = 0.0
    told: int | None = None
    kill_at = deadline
    while not lock.try_take():
        now = time.monotonic()
        if now >= deadline:
            raise LockHeld(f"another runner held the lock for {wait_seconds:g} s")
        holder = lock.holder()
        if holder is not None and holder.phase != "loading" and now >= probe_at:
            probe_at = now + probe_seconds
            lease = await probe()
            if _serves(lock.holder(), lease):
                return False
            if lease is not None and lease.state == "queued" and told is None:
                # Nobody serves a queued item, whatever the holder believes.
                told, kill_at = holder.pid, time.monotonic() + grace_seconds
                runner_process.terminate(told)
        if holder is not None and holder.pid == told and now >= kill_at:
            runner_process.kill_tree(told)
        await asyncio.sleep(_LOOK_SECONDS)
    return True


def _serves(holder: Holder | None, lease: LeaseState | None) -> bool:
    """Whether the holder is the one whose heartbeats the control plane records, and means to go on."""
    return (
        holder is not None
        and lease is not None
        and holder.phase == "claimed"
        and lease.state == "active"
        and lease.last_heartbeat is not None
        and lease.last_heartbeat == holder.last_heartbeat
    )
