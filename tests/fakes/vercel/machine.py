"""The machine behind a sandbox: a root file system of its own, and real processes in one process table.

bubblewrap makes it, process 1 only sleeps, and every command enters its namespaces. Names and paths are Vercel's: the
user `vercel-sandbox` with the working directory /vercel/sandbox, root by `sudo`, a Python under /vercel/runtimes. The
disk outlives the machine, /run does not. It takes root, because commands run as several users.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CWD = "/vercel/sandbox"
UID = 1000
PYTHON = "/vercel/runtimes/python"
_TOOLS = ("bwrap", "nsenter", "setpriv", "useradd", "flock")
_PATH = f"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{PYTHON}/bin"
# What a program needs of /etc, and what makes users. No passwords of this machine: only two accounts are written.
_ETC = ("alternatives", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "login.defs", "nsswitch.conf")
_ETC_READABLE = ("pip.conf", "resolv.conf", "ssl/certs", "ssl/openssl.cnf", "ca-certificates")
_SYSTEM = tuple(Path("/", name) for name in ("bin", "sbin", "lib", "lib64"))  # links into /usr, or directories


def missing() -> str | None:
    """Why there can be no machines here, or None."""
    if sys.platform != "linux":
        return "sandboxes of the Vercel double are Linux namespaces"
    if os.geteuid() != 0:
        return "the Vercel double runs commands as several users, which takes root"
    if lacking := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"the Vercel double needs {', '.join(lacking)}"
    return None


def make_disk(disk: Path) -> None:
    """A new disk, as the vendor's image has it."""
    for name in ("etc", "home", "mnt", "opt", "root", "tmp", "var/lib", "vercel/runtimes", CWD[1:]):
        (disk / name).mkdir(parents=True, exist_ok=True)
    disk.chmod(0o755)
    for path in _SYSTEM:
        if path.is_symlink():
            (disk / path.name).symlink_to(path.readlink())
    (disk / PYTHON[1:]).symlink_to(sys.base_prefix)
    (disk / "tmp").chmod(0o1777)
    os.chown(disk / CWD[1:], UID, UID)
    for name in _ETC:
        if (source := Path("/etc", name)).is_dir():
            shutil.copytree(source, disk / "etc" / name, symlinks=True)
        elif source.exists():
            shutil.copy2(source, disk / "etc" / name)
    accounts = {
        "passwd": f"root:x:0:0::/root:/bin/bash\nvercel-sandbox:x:{UID}:{UID}::{CWD}:/bin/bash\n",
        "group": f"root:x:0:\nvercel-sandbox:x:{UID}:\n",
        "shadow": "root:*:1::::::\nvercel-sandbox:*:1::::::\n",
        "gshadow": "root:*::\nvercel-sandbox:*::\n",
    }
    for name, content in accounts.items():
        (disk / "etc" / name).write_text(content)


def copy_disk(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)


class Machine:
    """One boot of a disk."""

    def __init__(self, disk: Path, shown: Sequence[Path] = ()) -> None:
        command = ["bwrap", "--bind", str(disk), "/", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1"]
        command += ["--die-with-parent", "--hostname", "sandbox", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run"]
        command += ["--ro-bind", "/usr", "/usr"]
        readable = {Path("/etc", name): Path("/etc", name) for name in _ETC_READABLE}
        readable |= {path: path for path in _SYSTEM if not path.is_symlink()}
        readable |= {path: path for path in (Path(sys.base_prefix), *shown)}  # at its own path: a shared libpython
        for source, target in readable.items():
            if source.exists():
                for parent in reversed(target.parents[:-1]):  # bwrap's own would be private
                    command += ["--dir", str(parent)]
                command += ["--ro-bind", str(source.resolve()), str(target)]
        ready, ready_end = os.pipe()
        command += ["bash", "-c", f"echo >&{ready_end}; exec {ready_end}>&-; exec sleep infinity"]
        self._process = subprocess.Popen(command, pass_fds=[ready_end], stdin=subprocess.DEVNULL)
        os.close(ready_end)
        booted = os.read(ready, 1)
        os.close(ready)
        if not booted:
            raise RuntimeError("a machine of the Vercel double did not start: see bubblewrap's words above")
        (self._init,) = children(self._process.pid)

    async def start(
        self, argv: Sequence[str], *, cwd: str, env: Mapping[str, str], root: bool, stdin: bool
    ) -> asyncio.subprocess.Process:
        """Starts a command in the machine, as root or as its user."""
        enter = ["nsenter", "--target", str(self._init), "--mount", "--pid", "--ipc", "--uts"]
        user = [] if root else ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--"]
        # `cd` inside: the directory is one of the machine's, which nsenter cannot name from outside.
        inside = ["sh", "-c", 'cd -- "$0" && exec "$@"', cwd, *argv]
        return await asyncio.create_subprocess_exec(
            *enter,
            *user,
            *inside,
            env={**_passed(), "PATH": _PATH, "HOME": "/root" if root else CWD, **env},
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    @staticmethod
    def kill(process: asyncio.subprocess.Process, number: int) -> None:
        """Signals the command: the child of nsenter, which passes nothing on."""
        for pid in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @staticmethod
    def leave(process: asyncio.subprocess.Process) -> None:
        """Ends nsenter: it stops itself when its command is stopped, and no machine ends whose dead nobody collects."""
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    def stop(self) -> None:
        """Switches it off: process 1 is killed, and everything with it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._process.wait()


def _passed() -> dict[str, str]:
    """How this machine reaches its package index."""
    return {name: os.environ[name] for name in ("PIP_CERT", "PIP_INDEX_URL", "SSL_CERT_FILE") if name in os.environ}


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
