"""Identifiers and credentials: right in their prefix, unmistakably not real."""

from __future__ import annotations

import base64
import secrets


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def new_api_key() -> str:
    return f"sk-ant-api03-emulator-{secrets.token_hex(16)}"


def new_environment_key() -> str:
    return f"sk-ant-oat01-emulator-{secrets.token_hex(16)}"


def new_sessions_token() -> str:
    return f"sk-ant-req-emulator-{secrets.token_hex(16)}"


def new_webhook_key() -> str:
    """32 bytes after `whsec_`, in characters that both base64 alphabets share.

    Real keys are URL-safe base64, which the common Python verifier silently shortens; pass such a key to the emulator
    to test for that, rather than meet it once in four runs.
    """
    while True:
        encoded = base64.b64encode(secrets.token_bytes(32)).decode()
        if "+" not in encoded and "/" not in encoded:
            return f"whsec_{encoded}"
