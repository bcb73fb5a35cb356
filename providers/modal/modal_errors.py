"""What Modal's client raises, and what we make of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import modal.exception

from _shared.errors import LaunchFailed
from _shared.log import line

_log = logging.getLogger(__name__)
_LOG_CHARACTERS = 300

# What Modal's client raises: whether the same call may succeed within seconds, and what to do where it will not. The
# first that fits decides. What is not here is a bug and propagates.
_ERRORS: tuple[tuple[type[Exception], bool, str], ...] = (
    (
        modal.exception.AuthError,
        False,
        "Modal does not accept the token: there is none, or it is void: `modal setup`",
    ),
    (modal.exception.PermissionDeniedError, False, "Modal's token may not do this"),
    (modal.exception.ResourceExhaustedError, True, "Modal's limit for this workspace is reached"),
    (modal.exception.AlreadyExistsError, True, "the session's name is taken by a sandbox that cannot be found yet"),
    (modal.exception.NotFoundError, True, "the sandbox is gone"),
    (modal.exception.ConflictError, True, "the sandbox has ended"),
    (modal.exception.InvalidError, False, "Modal refuses what the SANDBOX_* settings ask for: see the log"),
    (modal.exception.RemoteError, False, "the sandboxes' image cannot be built: see `modal app logs`"),
    (modal.exception.VersionError, False, "Modal no longer serves this version of its client"),
    (modal.exception.UnimplementedError, False, "Modal does not know this call"),
    (modal.exception.SandboxTerminatedError, True, "the sandbox was terminated"),
    (modal.exception.ClientClosed, True, "the connection to the sandbox is closed"),
    (modal.exception.TimeoutError, True, "Modal did not answer in time"),
    (modal.exception.ConnectionError, True, "Modal cannot be reached"),
    (modal.exception.ServiceError, True, "Modal is unavailable"),
    (modal.exception.InternalError, True, "Modal has an internal error"),
    (modal.exception.DataLossError, True, "Modal lost data of this call"),
    (TimeoutError, True, "Modal did not answer in time"),
    (ConnectionError, True, "Modal cannot be reached"),
)


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Turns what Modal's client raises into our error. Its text may hold parts of a request, so it stays the cause;
    but what an `InvalidError` says first is logged, redacted: it names the argument, and with it the setting."""
    try:
        yield
    except LaunchFailed:
        raise
    except tuple(kind for kind, _, _ in _ERRORS) as error:
        if isinstance(error, modal.exception.InvalidError):
            words = str(error).strip().partition("\n")[0][:_LOG_CHARACTERS]
            _log.warning(line("refused", provider="modal", error=error, reason=words))
        _, retriable, reason = next(row for row in _ERRORS if isinstance(error, row[0]))
        raise LaunchFailed(reason, retriable=retriable) from error
