"""The settings of this provider. The README's table is made from them."""

from __future__ import annotations

from dataclasses import dataclass

from _shared.settings import count, flag, hosts, seconds, setting, url


@dataclass(frozen=True)
class VercelSettings:
    """What this provider needs beside the shared settings."""

    snapshot_id: str | None = setting(
        "VERCEL_SNAPSHOT_ID",
        "The snapshot that `bake.py` has made. Without it, each new sandbox first installs what a runner needs.",
        default=None,
    )
    image: str | None = setting(
        "VERCEL_SANDBOX_IMAGE",
        "The image of new sandboxes where no snapshot is set. Unset: Vercel's default.",
        default=None,
    )
    vcpus: int = setting(
        "VERCEL_SANDBOX_VCPUS", "Virtual CPUs of a sandbox; memory goes with them.", parse=count, default=2
    )
    sandbox_seconds: float = setting(
        "VERCEL_SANDBOX_SECONDS",
        "How long a sandbox runs at least after each launch. A sweep extends it while a runner works; where sweeps do"
        " not run every minute, set it to the longest turn you expect.",
        parse=seconds,
        default=300.0,
    )
    allowed_hosts: tuple[str, ...] = setting(
        "SANDBOX_ALLOWED_HOSTS",
        "What sandboxes may connect to beside the API: host names separated by commas, `*.example.com` for every name"
        " below one, or `*` for everything. Unset: nothing else.",
        parse=hosts,
        default=(),
    )
    inject_credential: bool = setting(
        "VERCEL_INJECT_CREDENTIAL",
        "Let Vercel's firewall add the session's token to the runner's requests, on the session's own paths only, so"
        " that the sandbox never holds it. Not tried on Vercel itself.",
        parse=flag,
        default=False,
    )
    api_url: str | None = setting(
        "VERCEL_SANDBOX_API_URL", "Vercel's Sandbox API, where it is not the usual one.", parse=url, default=None
    )
