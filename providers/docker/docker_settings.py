"""The settings of this provider. The README's table is made from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import containers
import egress
from _shared.settings import count, setting


def _hosts(value: str) -> tuple[str, ...]:
    """What `_shared.settings.hosts` takes, and addresses and ports, which our own proxy can tell apart."""
    entries = tuple(entry.strip() for entry in value.split(",") if entry.strip())
    if not entries:
        raise ValueError("expected hosts with commas between them")
    egress.parse(entries)
    return entries


def _cpus(value: str) -> float:
    number = float(value)
    if not 0.01 <= number <= 1024:
        raise ValueError("expected a number of CPUs, such as 0.5 or 2")
    return number


def _runner(value: str) -> str:
    if value not in containers.RUNNERS:
        raise ValueError(f"expected one of: {', '.join(containers.RUNNERS)}")
    return value


def _engine_url(value: str) -> str:
    if not re.match(r"(unix|tcp|https?)://.", value):
        raise ValueError("expected unix:///path/to/docker.sock, tcp://host:port or https://host:port")
    return value


@dataclass(frozen=True)
class DockerSettings:
    """What this provider needs beside the shared settings."""

    host: str = setting(
        "DOCKER_HOST",
        "The Docker Engine: `unix://`, `tcp://` or `https://`. With TLS as for Docker's own client: `tcp://`,"
        " `DOCKER_TLS_VERIFY=1` and `DOCKER_CERT_PATH`.",
        parse=_engine_url,
        default="unix:///var/run/docker.sock",
    )
    image: str = setting(
        "DOCKER_IMAGE", "The sandboxes' image, made by this folder's Dockerfile.", default="sandboxes-docker"
    )
    runner: str = setting(
        "DOCKER_RUNNER",
        "What serves a session: `python`, this project's runner, or `ant`, the vendor's, where the image has it.",
        parse=_runner,
        default="python",
    )
    runtime: str | None = setting(
        "DOCKER_RUNTIME",
        "An OCI runtime that the Engine knows, such as `runsc` (gVisor). Unset: the Engine's.",
        default=None,
    )
    memory_mb: int = setting(
        "DOCKER_MEMORY_MB", "Memory of one sandbox, `/tmp` included, in MiB.", parse=count, default=2048
    )
    cpus: float = setting("DOCKER_CPUS", "CPUs of one sandbox.", parse=_cpus, default=2.0)
    pids: int = setting("DOCKER_PIDS", "Processes and threads of one sandbox.", parse=count, default=256)
    file_mb: int = setting("DOCKER_FILE_MB", "The largest file a sandbox can write, in MiB.", parse=count, default=1024)
    disk_mb: int | None = setting(
        "DOCKER_DISK_MB",
        "Size of each of a session's two volumes, in MiB, where the Engine's storage has quotas (XFS with `pquota`)."
        " Unset: no limit.",
        parse=count,
        default=None,
    )
    allowed_hosts: tuple[str, ...] = setting(
        "SANDBOX_ALLOWED_HOSTS",
        "What sandboxes may connect to beside the API: host names separated by commas, `*.example.com` for every name"
        " below one, either with `:port`, or `*` for everything that is public. Unset: nothing else.",
        parse=_hosts,
        default=(),
    )
    egress_network: str = setting(
        "DOCKER_EGRESS_NETWORK", "The Engine's network that the egress proxy is in.", default="bridge"
    )
