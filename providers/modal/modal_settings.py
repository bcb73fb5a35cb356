"""The settings of this provider. The README's table is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from _shared.settings import hosts, seconds, setting

LONGEST_LIFETIME_SECONDS = 86_400  # Modal's limit
SHORTEST_LIFETIME_SECONDS = 600


def _names(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise ValueError("expected names with commas between them")
    return names


class Amount(NamedTuple):
    """What a sandbox is sure to get, and the most it may use."""

    request: float
    limit: float

    def __str__(self) -> str:
        return f"{self.request:g},{self.limit:g}"


def _amount(value: str) -> Amount:
    request, _, limit = value.partition(",")
    amount = Amount(float(request), float(limit or request))
    if not 0 < amount.request <= amount.limit < float("inf"):
        raise ValueError(
            "expected a number above 0, or two with a comma: the request, and a limit that is not below it"
        )
    return amount


def _mebibytes(value: str) -> Amount:
    amount = _amount(value)
    if not all(number.is_integer() for number in amount):
        raise ValueError("expected whole numbers of MiB")
    return amount


def _lifetime(value: str) -> float:
    number = seconds(value)
    if not SHORTEST_LIFETIME_SECONDS <= number <= LONGEST_LIFETIME_SECONDS:
        raise ValueError(f"expected {SHORTEST_LIFETIME_SECONDS} to {LONGEST_LIFETIME_SECONDS} seconds")
    return number


@dataclass(frozen=True)
class ModalSettings:
    """What this provider needs beside the shared settings."""

    cpu: Amount = setting(
        "SANDBOX_CPU",
        "Physical cores of a sandbox: what it is sure to get, and after a comma what it may use at most.",
        parse=_amount,
        default=Amount(0.5, 2),
    )
    memory_mb: Amount = setting(
        "SANDBOX_MEMORY_MB",
        "Memory of a sandbox in MiB: what it is sure to get, and after a comma its limit.",
        parse=_mebibytes,
        default=Amount(512, 2048),
    )
    gpu: str | None = setting(
        "SANDBOX_GPU", "A GPU for each sandbox, as Modal names them: `T4`, `A100:2`.", default=None
    )
    regions: tuple[str, ...] | None = setting(
        "SANDBOX_REGIONS",
        "Where sandboxes may run: Modal's region names separated by commas. Unset: wherever there is room.",
        parse=_names,
        default=None,
    )
    allowed_hosts: tuple[str, ...] = setting(
        "SANDBOX_ALLOWED_HOSTS",
        "What sandboxes may connect to beside the API: host names separated by commas, `*.example.com` for every name"
        " below one, or `*` for everything. Unset: nothing else.",
        parse=hosts,
        default=(),
    )
    proxy: str | None = setting(
        "SANDBOX_PROXY", "The name of a Modal Proxy through which sandboxes connect, for a fixed address.", default=None
    )
    lifetime_seconds: float = setting(
        "SANDBOX_LIFETIME_SECONDS",
        "How long one sandbox may run, at most a day. Then its runner hands over and the session goes on in a new one.",
        parse=_lifetime,
        default=float(LONGEST_LIFETIME_SECONDS),
    )
    tool_secrets: tuple[str, ...] | None = setting(
        "SANDBOX_TOOL_SECRETS",
        "Modal Secrets, separated by commas, that the runner gets as environment variables, for custom tools. What no"
        " tool takes out of the environment when it is loaded, the agent can read.",
        parse=_names,
        default=None,
    )
