"""Process 1 of a sandbox of the double: starts what it is told to, in the sandbox's namespaces, and collects zombies.

Its one argument is the number of a socket; the double sends `{"id", "argv", "env", "cwd"}` with three descriptors, and
reads `{"id", "pid"}` or `{"id", "error"}`, and later `{"id", "code"}`. When the double is gone the sandbox ends.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys
from typing import Any


def main(number: int) -> None:
    link = socket.socket(fileno=number)
    link.set_inheritable(False)
    told, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, str] = {}
    watched: list[Any] = [link, told]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if told in ready:
            os.read(told, 4096)
        if link in ready:
            message, ancillary, _, _ = link.recvmsg(1 << 20, socket.CMSG_SPACE(3 * 4))
            if not message:
                return
            descriptors: array.array[int] = array.array("i")
            for _, _, data in ancillary:
                descriptors.frombytes(data)
            request = json.loads(message)
            try:
                pid = start(request, descriptors)
                running[pid] = request["id"]
                link.send(json.dumps({"id": request["id"], "pid": pid}).encode())
            except OSError as error:
                link.send(json.dumps({"id": request["id"], "error": error.strerror}).encode())
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid in running:
                answer = {"id": running.pop(pid), "code": os.waitstatus_to_exitcode(status)}
                link.send(json.dumps(answer).encode())


def start(request: dict[str, Any], descriptors: array.array[int]) -> int:
    os.chdir(request["cwd"])
    try:
        return os.posix_spawnp(
            request["argv"][0],
            request["argv"],
            request["env"],
            file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, target) for target, descriptor in enumerate(descriptors)],
            setsid=True,
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD),
        )
    finally:
        os.chdir("/")


if __name__ == "__main__":
    main(int(sys.argv[1]))
