"""Every error the core knows. Core code catches these and no others; anything else is a bug and propagates."""

from __future__ import annotations


class SandboxesError(Exception):
    """Something went wrong that the operator can act on."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class SettingsError(SandboxesError):
    """A setting is missing or unusable."""


class WebhookRejected(SandboxesError):
    """The request is not a webhook signed with one of our keys."""


class JobRefused(SandboxesError):
    """The work item cannot be handed to a sandbox."""


class FetchRefused(SandboxesError):
    """A file cannot be fetched, or must not be."""


class LaunchFailed(SandboxesError):
    """The sandbox did not get to a ready runner."""

    def __init__(self, message: str | None = None, *, retriable: bool) -> None:
        super().__init__(message)
        self.retriable = retriable
        """True when the same call may succeed within seconds: capacity, a timeout, a sandbox that just vanished.
        False when it will fail the same way until a person changes something: credentials, a missing image."""
