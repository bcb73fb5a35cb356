"""How a sandbox is closed off with bubblewrap, and whether this machine permits it.

Started by an ordinary user, the sandbox is a user namespace of its own, uid 10001 inside. Started by root there is
no user namespace: the files are root's to bind, and `sandbox_init.py` then becomes an unprivileged uid of the *host*.
Mapping root itself into a user namespace would be no isolation: to /proc/sys it is still the host's root, without any
capability, and /proc/sys/kernel/core_pattern is a way out.

The network is the host's. Nothing here limits where a sandbox can connect to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from _shared.errors import LaunchFailed

INSTALL_HINT = "install bubblewrap (`apt-get install bubblewrap`) and let it create namespaces"
RUNNER_DIRECTORY = "/opt/runner"
INIT = "/opt/sandbox_init.py"
WORKSPACE = "/workspace"
HOME = "/home/sandbox"
STATE = "/run/sandbox-runner"

_UID_INSIDE = 10001
_UIDS_OF_ROOT = range(10_001, 60_001)  # below 65536: what a container's root usually has
_PROBE_SECONDS = 20.0
_PROBE_BYTES = 1 << 20
_SCRATCH = ("/dev/shm", "/tmp", "/run")  # noqa: S108 - the sandbox's own
# Of the host's /etc: name resolution, certificates, the loader, time. No passwords, no keys, no host configuration.
_ETC = (
    "alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "crypto-policies", "gai.conf",
    "host.conf", "hosts", "inputrc", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "magic", "mime.types",
    "nsswitch.conf", "os-release", "pki/ca-trust", "pki/tls/certs", "profile", "protocols", "resolv.conf", "services",
    "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone",
)  # fmt: skip


def uid_for(session_id: str) -> int:
    """The uid of the host that a sandbox started by root runs as, 0 when we are not root. One for each session (two in
    50 000 may share it), so that the limit on processes counts one session's only."""
    return _UIDS_OF_ROOT[zlib.crc32(session_id.encode()) % len(_UIDS_OF_ROOT)] if os.geteuid() == 0 else 0


def python_prefixes(python: str) -> list[Path]:
    """The directories this process's Python lives in, by every name it is known under, unless /usr holds them."""
    names = [sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(python).resolve().parent.parent)]
    paths = {Path(os.path.abspath(name)) for name in names} | {Path(name).resolve() for name in names}
    return sorted(path for path in paths if not path.is_relative_to("/usr") and path != Path("/"))


def arguments(directory: Path, *, uid: int, shown: Mapping[Path, Path], python: str, memory_bytes: int) -> list[str]:
    """The bwrap command line up to the program, for the session in `directory`; `uid` as `uid_for` says. `shown` (host
    path -> path inside) can be read in the sandbox where it exists. Raises `LaunchFailed` when there is no bwrap."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise LaunchFailed(f"bwrap is not installed: {INSTALL_HINT}", retriable=False)
    command = [bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1"]
    command += ["--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    inside = uid or _UID_INSIDE
    if uid:
        # For init's first lines; its setresuid drops them.
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(inside), "--gid", str(inside)]
        command += ["--disable-userns"] if "--disable-userns" in _options(bwrap) else []
    command += ["--proc", "/proc", "--dev", "/dev"]
    # Before what is shown, which may lie below /tmp. It is memory, so it is bounded; root's is opened to `uid`.
    size = ["--size", str(memory_bytes)] if "--size" in _options(bwrap) else []
    for name in _SCRATCH:
        command += [*(["--perms", "1777"] if uid else []), *size, "--tmpfs", name]
    readable = {Path("/usr"): Path("/usr"), Path("/nix/store"): Path("/nix/store")}
    for path in (Path("/") / name for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32")):
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), str(path)]
        else:
            readable[path] = path
    readable |= {Path("/etc", name): Path("/etc", name) for name in _ETC}
    readable |= _identity(directory, inside)
    readable |= {path: path for path in python_prefixes(python)}
    for source, target in (readable | dict(shown)).items():
        if source.exists():
            for parent in reversed(target.parents[:-1]):  # made by us: bwrap would make a private file's parent private
                command += ["--dir", str(parent)]
            command += ["--ro-bind", str(source), str(target)]
    command += ["--bind", str(directory / "workspace"), WORKSPACE, "--dir", "/home"]
    command += ["--bind", str(directory / "home"), HOME, "--chdir", WORKSPACE]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/"]


def problem(python: str) -> str | None:
    """Why bubblewrap cannot be used here, or None. Runs it: installed is not permitted."""
    python = os.path.abspath(python)
    with tempfile.TemporaryDirectory(prefix="sandboxes-probe-") as name:
        directory = Path(name)
        for part in ("workspace", "home"):
            (directory / part).mkdir()
        uid = uid_for("probe")
        try:
            command = arguments(directory, uid=uid, shown={}, python=python, memory_bytes=_PROBE_BYTES)
        except LaunchFailed as error:
            return str(error)
        program = f"import os; os.setgroups([]); os.setresuid({uid}, {uid}, {uid})" if uid else "pass"
        try:
            done = subprocess.run(
                [*command, python, "-I", "-S", "-c", program],
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "bwrap is installed but did not finish a trial run"
    if done.returncode == 0:
        return None
    words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"bwrap is installed but does not work here ({words}): {INSTALL_HINT}"


def _identity(directory: Path, uid: int) -> dict[Path, Path]:
    """/etc/passwd and /etc/group of the sandbox: its user and nobody, none of the host's users."""
    lines = {
        "passwd": f"sandbox:x:{uid}:{uid}::{HOME}:/bin/bash\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
        "group": f"sandbox:x:{uid}:\nnogroup:x:65534:\n",
    }
    for name, content in lines.items():
        (directory / name).write_text(content)
        (directory / name).chmod(0o644)
    return {directory / name: Path("/etc", name) for name in lines}


@cache
def _options(bwrap: str) -> str:
    """What this bwrap understands: `--size` and `--disable-userns` came late (0.7, 0.8), and older ones are in use."""
    return subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False).stdout
