"""What Daytona's client raises, and what we make of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

from daytona import (
    AsyncDaytona,
    DaytonaAuthenticationError,
    DaytonaBadGatewayError,
    DaytonaBadRequestError,
    DaytonaConflictError,
    DaytonaConnectionError,
    DaytonaError,
    DaytonaForbiddenError,
    DaytonaGoneError,
    DaytonaInternalServerError,
    DaytonaNotFoundError,
    DaytonaRateLimitError,
    DaytonaServiceUnavailableError,
    DaytonaTimeoutError,
    DaytonaUnprocessableEntityError,
)
from daytona._utils.errors import intercept_errors
from daytona.common.snapshot import Snapshot

from _shared.errors import LaunchFailed

RETRY_AFTER_SECONDS = 20.0  # at most; the dispatcher's patience with one call is 30 s

# Vendor errors, whether the same call may succeed within seconds, and what to say. The first that fits counts.
_ERRORS: tuple[tuple[type[DaytonaError], bool, str], ...] = (
    (DaytonaAuthenticationError, False, "Daytona does not accept DAYTONA_API_KEY: check it, and DAYTONA_API_URL"),
    (DaytonaForbiddenError, False, "Daytona forbids it: give the key the right to write and delete sandboxes"),
    (DaytonaRateLimitError, True, "Daytona asks to slow down"),
    (DaytonaTimeoutError, True, "Daytona did not answer in time"),
    (DaytonaConnectionError, True, "Daytona cannot be reached"),
    (DaytonaNotFoundError, True, "the sandbox is gone"),
    (DaytonaConflictError, True, "the sandbox is changing its state"),
    (DaytonaGoneError, True, "the runner ended before it had its job"),
    (DaytonaBadRequestError, True, "the sandbox's state does not allow it"),
    (DaytonaUnprocessableEntityError, False, "Daytona cannot do this with the snapshot's class of sandboxes"),
    (DaytonaInternalServerError, True, "Daytona failed"),
    (DaytonaBadGatewayError, True, "the sandbox cannot be reached"),
    (DaytonaServiceUnavailableError, True, "Daytona is not available"),
)
PASSING = (
    DaytonaConnectionError,
    DaytonaTimeoutError,
    DaytonaInternalServerError,
    DaytonaBadGatewayError,
    DaytonaServiceUnavailableError,
    DaytonaRateLimitError,
)


@contextlib.asynccontextmanager
async def mapped() -> AsyncIterator[None]:
    """Turns the vendor's errors into ours, by the table. What it does not list propagates."""
    try:
        yield
    except DaytonaError as error:
        if isinstance(error, DaytonaRateLimitError):
            await asyncio.sleep(_retry_after(error))
        for kind, retriable, reason in _ERRORS:
            if isinstance(error, kind):
                raise LaunchFailed(reason, retriable=retriable) from error
        if (error.status_code or 0) >= 500:
            raise LaunchFailed("Daytona failed", retriable=True) from error
        raise


def _retry_after(error: DaytonaError) -> float:
    """How long the vendor asks to wait."""
    given = {name.lower(): value for name, value in error.headers.items()}.get("retry-after", "1")
    return min(float(given), RETRY_AFTER_SECONDS) if str(given).isdecimal() else 1.0


def said(error: DaytonaError) -> str:
    """What the API said about a sandbox it would not create or start; the request held nothing secret."""
    return (error.message.partition(": ")[2] or error.message).partition("\n")[0][:200]


async def activate(daytona: AsyncDaytona, snapshot: Snapshot | str) -> None:
    """Asks for a snapshot that was put away as unused. The client (0.226.1) turns every call's errors into its own but
    this one's: that is done here."""
    await intercept_errors("Failed to activate snapshot: ")(daytona.snapshot.activate)(snapshot)


def snapshot_state(error: DaytonaError) -> str | None:
    """The state for which the API refuses to make a sandbox from a snapshot, if that is why it refuses."""
    match = re.search(r"Snapshot \S+ is (\w+)", error.message)
    return match[1] if match else None
