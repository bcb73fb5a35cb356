"""What the host executes in a sandbox: passes a request on to process 1 (`sandbox_init.py`) and its answer back.

A job passes through it, from the Engine's stream to process 1. It starts with every request, so it imports little.
Standard library only.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time

CONTROL = "\0sandbox-init"
EXIT_CANNOT_RUN = 69
_CHUNK_BYTES = 1 << 16
_START_SECONDS = 60.0  # on a very busy machine; within the launch's budget
_START_PAUSE_SECONDS = 0.02


def enter() -> int:
    """Passes our input on to process 1 and its answer back, until either ends: the host has what it wanted, or is gone,
    or process 1 has said all. Exit codes: 0, and 69 when process 1 takes no connection."""
    connection = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            connection.connect(CONTROL)
            break
        except OSError:
            if time.monotonic() >= deadline:
                return EXIT_CANNOT_RUN
        time.sleep(_START_PAUSE_SECONDS)  # process 1 is just starting
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ, (0, connection.fileno()))
        ready.register(connection, selectors.EVENT_READ, (connection.fileno(), 1))
        while True:
            for key, _ in ready.select():
                source, sink = key.data
                chunk = os.read(source, _CHUNK_BYTES)
                if not chunk:
                    return 0
                while chunk:
                    chunk = chunk[os.write(sink, chunk) :]


if __name__ == "__main__":
    sys.exit(enter())
