"""Settings: one frozen dataclass, read from a mapping in one go, every problem reported at once.

The only module (with the runner) that knows environment variables exist. A provider's own settings are a second
dataclass in its folder, declared with the same `setting()` and read with the same `load()`; the tables in the READMEs
are generated from both (`make sync`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar
from urllib.parse import urlsplit

from .errors import SettingsError
from .runner_secrets import hide

_log = logging.getLogger(__name__)

T = TypeVar("T")
_LABEL = "[a-z0-9_][a-z0-9_-]{0,62}"
# What ends with a number is an address, or nothing.
_HOST = re.compile(rf"(?=.{{1,253}}\Z)(\*\.)?({_LABEL}\.)*(?![0-9]+\Z){_LABEL}")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def text(value: str) -> str:
    """Any non-empty text."""
    return value


def credential(value: str) -> str:
    """A key that fits an HTTP header: an HTTP library would quote another in its error."""
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("expected one word of ASCII: copy it again")
    return value


def flag(value: str) -> bool:
    """`true` or `false`."""
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise ValueError("expected true or false")


def count(value: str) -> int:
    """A whole number, 1 or more."""
    number = int(value)
    if number < 1:
        raise ValueError("expected 1 or more")
    return number


def port(value: str) -> int:
    """A port to listen on, 0 for a free one."""
    number = int(value)
    if not 0 <= number <= 65535:
        raise ValueError("expected 0 to 65535")
    return number


def seconds(value: str) -> float:
    """A number of seconds, 0 or more."""
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError("expected 0 or more seconds")
    return number


def names(value: str) -> tuple[str, ...]:
    """Names with commas between them."""
    found = tuple(name for part in value.split(",") if (name := part.strip()))
    if not all(re.fullmatch(r"[\w.\-]{1,128}", name, re.ASCII) for name in found):
        raise ValueError("expected names with commas between them")
    return found


def hosts(value: str) -> tuple[str, ...]:
    """What a sandbox may connect to beside the API: host names with commas between them, `*.example.com` for every name
    below one, or `*` for everything. Addresses are none: platforms have other lists for those."""
    found = tuple(entry.lower() for part in value.split(",") if (entry := part.strip()))
    if not found or not all(entry == "*" or _HOST.fullmatch(entry) for entry in found):
        raise ValueError("expected host names such as example.com or *.example.com with commas between them, or *")
    return found


def url(value: str) -> str:
    """An http or https URL, without a trailing slash."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("expected a URL that starts with https:// or http://")
    return value.rstrip("/")


def setting(
    name: str,
    help: str,
    *,
    parse: Callable[[str], Any] = text,
    default: Any = MISSING,
    secret: bool = False,
    old_name: str | None = None,
) -> Any:
    """Declares one setting. Without a default it is required; a secret never prints; `old_name` still works, with a
    warning."""
    metadata = {"name": name, "help": help, "parse": parse, "secret": secret, "old_name": old_name}
    if default is MISSING:
        return field(repr=not secret, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


def load(cls: type[T], environ: Mapping[str, str], known_problems: Sequence[str] = ()) -> T:
    """Reads `cls` (a dataclass of `setting()` fields) from `environ`. An empty value counts as unset. What is read as a
    secret no log line shows.

    Raises `SettingsError` naming every missing and every unusable setting beside what the caller has found; values are
    never quoted.
    """
    values, problems = _read(cls, environ)
    if problems := [*known_problems, *problems]:
        raise SettingsError("; ".join(problems))
    return cls(**values)


def _read(cls: type, environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for declared in fields(cls):
        raw = _raw(declared, environ)
        if raw is None:
            if declared.default is MISSING:
                problems.append(f"{declared.metadata['name']} is not set: {declared.metadata['help']}")
            continue
        if declared.metadata["secret"]:
            hide(raw)
        try:
            values[declared.name] = declared.metadata["parse"](raw)
        except ValueError as error:
            # Only our own parsers' messages are shown; int() and float() would quote the value.
            reason = str(error) if str(error).startswith("expected") else "expected a number"
            problems.append(f"{declared.metadata['name']} is unusable: {reason}")
    return values, problems


def _raw(declared: Field[Any], environ: Mapping[str, str]) -> str | None:
    name, old_name = declared.metadata["name"], declared.metadata["old_name"]
    if value := environ.get(name, "").strip():
        return value
    if old_name and (value := environ.get(old_name, "").strip()):
        _log.warning("action=settings reason=%s", f'"{old_name} is the old name: set {name} instead"')
        return value
    return None


@dataclass(frozen=True)
class Settings:
    """What every host needs. Durations are seconds."""

    environment_id: str = setting("ANTHROPIC_ENVIRONMENT_ID", "The self-hosted environment to serve (`env_...`).")
    environment_key: str = setting(
        "ANTHROPIC_ENVIRONMENT_KEY",
        "The environment's key, from the Console. It stays on the host and never enters a sandbox.",
        parse=credential,
        secret=True,
    )
    base_url: str = setting(
        "ANTHROPIC_BASE_URL",
        "The API, as the host and the sandboxes reach it.",
        parse=url,
        default="https://api.anthropic.com",
    )
    webhook_signing_key: str | None = setting(
        "ANTHROPIC_WEBHOOK_SIGNING_KEY",
        "The webhook endpoint's signing key (`whsec_...`). A host that only polls needs none.",
        default=None,
        secret=True,
        old_name="ANTHROPIC_WEBHOOK_SECRET",
    )
    webhook_signing_key_next: str | None = setting(
        "ANTHROPIC_WEBHOOK_SIGNING_KEY_NEXT",
        "A second signing key that is also accepted, for the time of a rotation.",
        default=None,
        secret=True,
    )
    allow_environment_key_in_sandbox: bool = setting(
        "ALLOW_ENVIRONMENT_KEY_IN_SANDBOX",
        "Serve work items that carry no secret by giving the sandbox the environment key. Any prompt injection can then"
        " read every session's work. Off: such items are refused.",
        parse=flag,
        default=False,
    )
    max_live: int = setting(
        "SANDBOX_MAX_LIVE",
        "At most this many running sandboxes; more work waits in the queue. Several host processes that launch at once"
        " may go beyond it.",
        parse=count,
        default=100,
    )
    launch_concurrency: int = setting(
        "SANDBOX_LAUNCH_CONCURRENCY",
        "At most this many launches at once, in each host process.",
        parse=count,
        default=10,
    )
    max_idle_seconds: float = setting(
        "SANDBOX_MAX_IDLE_SECONDS",
        "How long a runner stays for the next message: after a turn has ended, or before there was any.",
        parse=seconds,
        default=60.0,
    )
    max_wait_seconds: float = setting(
        "SANDBOX_MAX_WAIT_SECONDS",
        "How long a runner stays while only somebody else can go on: a person's confirmation, another client's tool."
        " What comes later gets a runner again.",
        parse=seconds,
        default=1800.0,
    )
    keep_warm_seconds: float = setting(
        "SANDBOX_KEEP_WARM_SECONDS",
        "How long a sandbox keeps running without a runner; its files stay.",
        parse=seconds,
        default=300.0,
    )
    retention_seconds: float = setting(
        "SANDBOX_RETENTION_SECONDS",
        "How long the files of an unused session are kept.",
        parse=seconds,
        default=7 * 86400.0,
    )
    tools: str | None = setting(
        "SANDBOX_TOOLS", "Custom tools for the runner: `module:function`, importable in the sandbox.", default=None
    )
    tool_names: tuple[str, ...] = setting(
        "SANDBOX_TOOL_NAMES",
        "The names of the tools behind SANDBOX_TOOLS, with commas between them. Their calls are answered, too, when a"
        " sandbox is lost; to the host they otherwise look like those of another client.",
        parse=names,
        default=(),
    )

    stage_files: bool = setting(
        "SANDBOX_STAGE_FILES",
        "Look at each session before its launch, and bring what its runner cannot fetch: skills that the session's"
        " token may not read, and the files that metadata `input:<name>` = `https://...` names, into `inputs/`.",
        parse=flag,
        default=False,
    )

    @property
    def webhook_keys(self) -> tuple[str, ...]:
        """The accepted signing keys, the current one first."""
        return tuple(key for key in (self.webhook_signing_key, self.webhook_signing_key_next) if key)

    @classmethod
    def from_env(cls, environ: Mapping[str, str], *others: type) -> Settings:
        """Reads the settings, and refuses an organisation API key on the host: nothing here needs one, and a leak of
        it would cost more than this host is worth. What is wrong with `others`, the settings of a folder, is told in
        the same error."""
        problems = []
        if environ.get("ANTHROPIC_API_KEY", "").strip():
            problems.append("ANTHROPIC_API_KEY is set: remove it, a sandbox host works with the environment key only")
        for other in others:
            problems += _read(other, environ)[1]
        return load(cls, environ, problems)
