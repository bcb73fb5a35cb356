"""What Vercel's API and its SDK raise, and what we make of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import anyio
import httpx2
from vercel.sandbox import (
    SandboxApiError,
    SandboxCredentialsError,
    SandboxResponseError,
    SandboxStdinError,
    SandboxStreamError,
    SandboxTerminalStateError,
)

from _shared.errors import LaunchFailed

# What Vercel's API may answer: (what it means, whether the same call may succeed within seconds). Another status is a
# bug. 409, 404 and 410 are met where they are expected; elsewhere the sandbox changed under us.
_STATUSES = {
    400: ("refused the request", False),
    401: ("does not accept the credentials", False),
    402: ("asks for payment: the plan's allowance is used up", False),
    403: ("forbids it: check the token, the team and the project", False),
    404: ("does not know the sandbox or the snapshot", True),
    408: ("timed out", True),
    409: ("says that the sandbox is changing", True),
    410: ("says that the sandbox has stopped", True),
    413: ("says that the request is too large", False),
    422: ("refused the request", False),
    423: ("says that the sandbox is locked", True),
    425: ("is not ready", True),
    429: ("asks to slow down, or the plan's number of sandboxes is reached", True),
}
_MEANINGS: dict[type[Exception], tuple[str, bool]] = {
    SandboxCredentialsError: (
        "there are no Vercel credentials: in a function, turn on OIDC in the project's settings; elsewhere run"
        " `vercel env pull` and export what it wrote, or set VERCEL_TOKEN, VERCEL_TEAM_ID and VERCEL_PROJECT_ID",
        False,
    ),
    SandboxTerminalStateError: ("the sandbox ended while it was made", True),
    SandboxResponseError: ("Vercel's answer was not understood", True),
    SandboxStreamError: ("the sandbox's output ended early", True),
    SandboxStdinError: ("the job did not reach the runner", True),
    anyio.BrokenResourceError: ("the runner ended before it read its job", True),
    httpx2.TransportError: ("Vercel cannot be reached", True),
}
ERRORS: tuple[type[Exception], ...] = (SandboxApiError, *_MEANINGS)
# With a 422, like a request that is wrong for good; and over within seconds.
STOPPING = "is just stopping the sandbox"
_STOPPING = frozenset({"sandbox_stopping", "sandbox_snapshotting"})


@contextlib.contextmanager
def but_for(*statuses: int) -> Iterator[None]:
    """Lets these answers of Vercel's pass in silence, but none that says that the sandbox is just stopping."""
    try:
        yield
    except SandboxApiError as error:
        if error.status_code not in statuses or error.code in _STOPPING:
            raise


@contextlib.contextmanager
def creating(snapshot_id: str | None = None) -> Iterator[None]:
    """Names the settings that Vercel may have refused to make a sandbox for. Raises `LaunchFailed`."""
    try:
        yield
    except SandboxApiError as error:
        if snapshot_id and error.status_code in (404, 410):
            advice = "VERCEL_SNAPSHOT_ID names a snapshot that does not exist: run bake.py again"
        elif error.status_code in (400, 422) and error.code not in _STOPPING:
            advice = (
                "Vercel makes no such sandbox: check VERCEL_SANDBOX_VCPUS, VERCEL_SANDBOX_IMAGE, and that the plan lets"
                " one run for VERCEL_SANDBOX_SECONDS and SANDBOX_KEEP_WARM_SECONDS"
            )
        else:
            raise
        raise LaunchFailed(f"{advice} ({_answer(error)})", retriable=False) from error


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Turns what Vercel and its SDK raise into our error. Their texts can embed requests: of them only a code is
    repeated."""
    try:
        yield
    except SandboxApiError as error:
        if error.code in _STOPPING:
            meaning = STOPPING, True
        elif error.status_code >= 500:
            meaning = "has trouble", True
        elif error.status_code in _STATUSES:
            meaning = _STATUSES[error.status_code]
        else:
            raise
        raise LaunchFailed(f"Vercel {meaning[0]} ({_answer(error)})", retriable=meaning[1]) from error
    except tuple(_MEANINGS) as error:
        text, retriable = next(_MEANINGS[kind] for kind in type(error).__mro__ if kind in _MEANINGS)
        raise LaunchFailed(text, retriable=retriable) from error


def _answer(error: SandboxApiError) -> str:
    """The status and Vercel's code for it, where it looks like one."""
    code = error.code if error.code and re.fullmatch("[a-z_]{1,40}", error.code) else None
    return f"{error.status_code} {code}" if code else str(error.status_code)
