"""What the Engine is asked to run: the two kinds of container, as it takes them. All hardening is in this file.

A sandbox has no network at all, so that no firewall rule of the host has to hold: no other sandbox, no host, no
link-local address, no DNS. Its one way out is the Unix socket of the egress proxy, in a volume that both see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PYTHON = ["/opt/venv/bin/python3", "-E", "-s", "-S"]
INIT = "/opt/sandbox/sandbox_init.py"
ENTER = "/opt/sandbox/enter.py"
# What serves a session, by the name that DOCKER_RUNNER has for it.
RUNNERS = {
    "python": [PYTHON[0], "-I", "/opt/sandbox/_shared/sandbox_runner.py"],
    "ant": [PYTHON[0], "-E", "-s", "/opt/sandbox/ant_runner.py"],
}
EGRESS_DIRECTORY = "/run/egress"
EGRESS_SOCKET = f"{EGRESS_DIRECTORY}/proxy.sock"
ACQUIRED_SECONDS = 60.0  # an acquired sandbox waits at least this long for its `start`
FORCE_SECONDS = 5  # after the grace that process 1 gives its runners
_EGRESS_MEMORY_MB = 256
_EGRESS_PIDS = 64  # names are resolved on up to 32 threads
_EGRESS_STOP_SECONDS = 40  # while runners hand over; without them it ends at once
_SANDBOX_FILES = 4096
_GROUPS = (range(20_000, 40_000), range(40_000, 60_000))  # below 65536: a user namespace has no more
_PROXY_URL = "http://127.0.0.1:3128"
_NO_PROXY = "localhost,127.0.0.1,::1"

# Ours are found by their labels, and told apart by them.
NAMESPACE, SESSION, PART, CONFIG = "sandboxes.environment", "sandboxes.session", "sandboxes.part", "sandboxes.config"
WORKSPACE, HOME = "workspace", "home"


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use."""

    memory_mb: int = 2048
    cpus: float = 2.0
    pids: int = 256
    file_mb: int = 1024
    disk_mb: int | None = None
    """For each of its two volumes; only where the Engine's storage has quotas. None: no limit."""


@dataclass(frozen=True)
class Names:
    """What things are called on the Engine. A container's name is unique there: it is the lock of R10."""

    namespace: str

    def sandbox(self, session_id: str) -> str:
        return f"sandbox-{self.namespace}-{session_id}"

    @property
    def egress(self) -> str:
        return f"sandbox-egress-{self.namespace}"

    def volume(self, sandbox: str, part: str) -> str:
        return f"{sandbox}-{part}"

    def labels(self, part: str, session_id: str | None = None) -> dict[str, str]:
        return {NAMESPACE: self.namespace, PART: part} | ({SESSION: session_id} if session_id else {})


def sandbox(
    names: Names,
    session_id: str,
    *,
    image: str,
    runtime: str | None,
    limits: Limits,
    keep_warm_seconds: float,
    grace_seconds: int,
) -> dict[str, Any]:
    """The container of one session. `image` is an id: a name may mean another image tomorrow."""
    name = names.sandbox(session_id)
    config = {
        "egress": EGRESS_SOCKET,
        "keep_warm": keep_warm_seconds,
        "hold": ACQUIRED_SECONDS,
        "grace": grace_seconds,
    }
    # No LANG, HOME or PATH: the image's. The proxy is told to every program both ways that are in use.
    environment = {"HTTP_PROXY": _PROXY_URL, "HTTPS_PROXY": _PROXY_URL, "NO_PROXY": _NO_PROXY}
    environment |= {key.lower(): value for key, value in environment.items()}
    spec = {
        "Image": image,
        "Entrypoint": [*PYTHON, INIT],
        "Cmd": [json.dumps(config)],
        "User": "agent",
        "Env": [f"{key}={value}" for key, value in environment.items()],
        "Hostname": "sandbox",
        "StopTimeout": grace_seconds + FORCE_SECONDS,
        "HostConfig": _hardened(limits.memory_mb, limits.cpus, limits.pids, runtime)
        | {
            "Ulimits": _ulimits(core=0, nofile=_SANDBOX_FILES, fsize=limits.file_mb << 20),
            "NetworkMode": "none",
            "GroupAdd": [str(group) for group in groups(name)],
            "Tmpfs": {
                "/tmp": "rw,exec,nosuid,nodev,size=512m,mode=1777",  # noqa: S108 - the container's
                "/run/sandbox": "rw,noexec,nosuid,nodev,size=1m,mode=0700,uid=10001,gid=10001",
                "/mnt/memory": "rw,noexec,nosuid,nodev,size=64m,mode=0755,uid=10001,gid=10001",
            },
            "Mounts": [
                _volume(names.volume(name, WORKSPACE), "/workspace"),
                _volume(names.volume(name, HOME), "/home/agent"),
                _volume(names.egress, EGRESS_DIRECTORY, read_only=True),
            ],
        },
    }
    return _labelled(spec, names.labels("sandbox", session_id))


def groups(name: str) -> tuple[int, ...]:
    """A pair of groups, one of 400 million, by which the proxy tells a sandbox from others. They own nothing: two
    sandboxes with the same pair would share the number of connections that each may have."""
    digest = hashlib.sha256(name.encode()).digest()
    parts = (digest[:16], digest[16:])
    return tuple(some[int.from_bytes(part) % len(some)] for some, part in zip(_GROUPS, parts, strict=True))


def egress(names: Names, *, image: str, network: str, allowed: Sequence[str]) -> dict[str, Any]:
    """The container of the proxy that all sandboxes of an environment share."""
    spec = {
        "Image": image,
        "Entrypoint": [*PYTHON, "/opt/sandbox/egress.py"],
        "Cmd": [json.dumps({"socket": EGRESS_SOCKET, "allowed": list(allowed)})],
        "User": "egress",
        "Hostname": "egress",
        "WorkingDir": "/",
        "StopTimeout": _EGRESS_STOP_SECONDS,
        "HostConfig": _hardened(_EGRESS_MEMORY_MB, 1.0, _EGRESS_PIDS, None)
        | {
            "Ulimits": _ulimits(core=0),  # of open files the most that the Engine may give: the proxy takes it
            "NetworkMode": network,
            "RestartPolicy": {"Name": "unless-stopped"},  # it is back when the Engine is
            "Mounts": [_volume(names.egress, EGRESS_DIRECTORY)],
        },
    }
    return _labelled(spec, names.labels("egress"))


def volume(name: str, labels: dict[str, str], disk_mb: int | None = None) -> dict[str, Any]:
    """A named volume."""
    options = {"DriverOpts": {"size": f"{disk_mb}m"}} if disk_mb else {}
    return {"Name": name, "Labels": labels, **options}


def _labelled(spec: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """With a label that tells whether a container is what these settings and this image would make of it today."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return spec | {"Labels": labels | {CONFIG: digest}}


def _hardened(memory_mb: int, cpus: float, pids: int, runtime: str | None) -> dict[str, Any]:
    """What every container of ours gives up. Docker's own seccomp and AppArmor profiles stay as they are: on."""
    return {
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Memory": memory_mb << 20,
        "MemorySwap": memory_mb << 20,  # the same: none of it is swap
        "NanoCpus": int(cpus * 1e9),
        "PidsLimit": pids,
        "IpcMode": "private",
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "2"}},
        **({"Runtime": runtime} if runtime else {}),
    }


def _ulimits(**limits: int) -> list[dict[str, Any]]:
    """For each process. No core dumps: they would be files with a process's memory in them."""
    return [{"Name": name, "Soft": most, "Hard": most} for name, most in limits.items()]


def _volume(name: str, target: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"Type": "volume", "Source": name, "Target": target, "ReadOnly": read_only}
