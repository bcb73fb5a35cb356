"""The journal of begun calls (R5, P3): what a runner writes before it runs a call, so that no other runs it again.

It holds the event ids of the last calls that were begun, nothing else. Which of them were answered the session's own
event log knows, so an entry is never crossed out, and a journal restored from an old copy names calls that are
answered long since. Calls run one at a time: of the entries only the last can be open, or one whose answer was refused.

It lies on the session's storage (`.sandbox` in the working directory), beside files that the agent may change, remove
or replace. So it is opened anew for each entry, never through a link, is one block of fixed size that is written over
in place (a full disk has room for it once it is there), and is believed only where it names open calls of this session.
Without it a call may run again, as it may with a disk that is lost.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

DIRECTORY = ".sandbox"
NAME = "calls.json"
_BYTES = 4096
_ENTRIES = 24
_ID = re.compile(r"[!-~]{1,128}\Z")


class Journal:
    """The calls begun on this storage: by this runner, and by those before it as far as they are on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._begun = dict.fromkeys(self._read())

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._begun

    def begin(self, call_id: str) -> bool:
        """Writes the entry down, on the disk before this returns. False when the storage does not take it.

        The call is run all the same then: on a full disk only a command of the agent's can make room, and a session
        whose every call is refused would be lost for a promise about a second failure.
        """
        self._begun[call_id] = None
        try:
            self._write(json.dumps({"begun": list(self._begun)[-_ENTRIES:]}).encode())
        except (OSError, ValueError):
            return False
        return True

    def _open(self, flags: int) -> int:
        """A descriptor of the journal file; its directory and itself are real ones. Raises `OSError`."""
        above = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe in its place blocks nobody
            return os.open(NAME, flags, 0o600, dir_fd=above)
        finally:
            os.close(above)

    def _read(self) -> list[str]:
        try:
            with open(self._open(os.O_RDONLY), "rb") as file:
                record = json.loads(file.read(_BYTES))
            begun = record["begun"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return []  # none yet, or not one that we wrote
        if not isinstance(begun, list) or len(begun) > _ENTRIES:
            return []
        return [entry for entry in begun if isinstance(entry, str) and _ID.match(entry)]

    def _write(self, record: bytes) -> None:
        if len(record) > _BYTES:
            raise ValueError("the entries do not fit")
        self._directory.mkdir(mode=0o700, exist_ok=True)
        descriptor = self._open(os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(descriptor, record.ljust(_BYTES), 0)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
