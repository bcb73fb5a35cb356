"""What can go wrong in the control plane, and the one place where it becomes a status and an error body.

The state raises the classes; only `status_of` and `envelope` know HTTP. The envelope is the documented one; the typed
errors of the SDK key on `(status, error.details.error_code)`.
"""

from __future__ import annotations

from typing import Any


class EmulatorError(Exception):
    """The request was refused."""

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class Invalid(EmulatorError):
    """A field, a parameter or the state of the session does not allow the request."""


class Unauthenticated(EmulatorError):
    """No credential, or one this control plane never issued (message: recorded)."""

    def __init__(self, message: str = "OAuth access token is invalid") -> None:
        super().__init__(message)


class Forbidden(EmulatorError):
    """A known credential of the wrong kind, or for another environment or session."""


class NotFound(EmulatorError):
    """No such route or object."""


class MethodNotAllowed(EmulatorError):
    """The route exists with another method."""


class Conflict(EmulatorError):
    """The work item is already in, or past, the state asked for."""


class Injected(EmulatorError):
    """A fault that was asked for, with the status it was asked for with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"an injected fault: {status}")
        self.status = status


class HeartbeatPreconditionFailed(EmulatorError):
    """`expected_last_heartbeat` is not the stored value; the body tells the lease as the server has it (SDK types)."""

    def __init__(self, current_state: dict[str, Any]) -> None:
        super().__init__(
            "expected_last_heartbeat does not match the stored heartbeat; another worker may hold the lease",
            {"error_code": "heartbeat_precondition_failed", "current_state": current_state},
        )


# The error types of 405, 409 and 412 are inferred: no recording shows one and the SDK keys on the status alone.
_STATUS: dict[type[EmulatorError], tuple[int, str]] = {
    Invalid: (400, "invalid_request_error"),
    Unauthenticated: (401, "authentication_error"),
    Forbidden: (403, "permission_error"),
    NotFound: (404, "not_found_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    Conflict: (409, "invalid_request_error"),
    HeartbeatPreconditionFailed: (412, "invalid_request_error"),
}


_INJECTED = dict(_STATUS.values()) | {429: "rate_limit_error", 529: "overloaded_error"}


def status_of(error: EmulatorError) -> int:
    if isinstance(error, Injected):
        return error.status
    return _STATUS[type(error)][0]


def _type_of(error: EmulatorError) -> str:
    if isinstance(error, Injected):
        return _INJECTED.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return _STATUS[type(error)][1]


def envelope(error: EmulatorError, request_id: str) -> dict[str, Any]:
    """The documented error body; `details` is present only when the error has some."""
    body: dict[str, Any] = {"type": _type_of(error), "message": error.message}
    if error.details is not None:
        body["details"] = error.details
    return {"type": "error", "error": body, "request_id": request_id}
