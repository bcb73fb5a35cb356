"""The settings of this provider. The README's table is made from them."""

from __future__ import annotations

from dataclasses import dataclass

from _shared.settings import count, credential, hosts, setting, url


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _volumes(value: str) -> tuple[tuple[str, str], ...]:
    volumes = tuple((name, path) for name, _, path in (entry.partition(":") for entry in _names(value)))
    if not all(name and path.startswith("/") for name, path in volumes):
        raise ValueError("expected name:/path, several separated by commas")
    return volumes


@dataclass(frozen=True, kw_only=True)
class Size:
    """The machine that a snapshot is baked for."""

    cpu: int | None = setting(
        "DAYTONA_CPU", "Cores of a sandbox. Takes effect with the next `bake.py`.", parse=count, default=None
    )
    memory_gib: int | None = setting(
        "DAYTONA_MEMORY_GIB", "Memory of a sandbox. Takes effect with the next `bake.py`.", parse=count, default=None
    )
    disk_gib: int | None = setting(
        "DAYTONA_DISK_GIB", "Disk of a sandbox. Takes effect with the next `bake.py`.", parse=count, default=None
    )


@dataclass(frozen=True, kw_only=True)
class DaytonaSettings(Size):
    """What this provider needs beside the shared settings."""

    api_key: str = setting(
        "DAYTONA_API_KEY", "The key of your Daytona organization (`dtn_...`).", parse=credential, secret=True
    )
    api_url: str = setting("DAYTONA_API_URL", "Daytona's API.", parse=url, default="https://app.daytona.io/api")
    target: str | None = setting("DAYTONA_TARGET", "The region. Unset: the organization's default.", default=None)
    snapshot: str | None = setting(
        "DAYTONA_SNAPSHOT",
        "The snapshot of new sandboxes. Unset: the one that `bake.py` bakes from this folder as it is.",
        default=None,
    )
    archive_minutes: int = setting(
        "DAYTONA_ARCHIVE_MINUTES",
        "How long a stopped sandbox stays quick to start; then it is archived, and the next message waits longer.",
        parse=count,
        default=24 * 60,
    )
    allowed_hosts: tuple[str, ...] = setting(
        "SANDBOX_ALLOWED_HOSTS",
        "What sandboxes may connect to beside the API: host names separated by commas, `*.example.com` for every name"
        " below one, or `*` for everything. Unset: nothing else.",
        parse=hosts,
        default=(),
    )
    volumes: tuple[tuple[str, str], ...] | None = setting(
        "DAYTONA_VOLUMES",
        "Volumes that every sandbox mounts, as `name:/path`, separated by commas. All sessions share them.",
        parse=_volumes,
        default=None,
    )
