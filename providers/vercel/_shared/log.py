"""Logging: stdlib loggers, key=value with a fixed set of keys, and no secret in any of them (`runner_secrets`).

A vendor's exception is logged by its type (`error=`), never by its text: the text can embed requests and tokens. One
that no table maps is a bug, and is logged with its traceback. Values are redacted where a line is made, whoever writes
it then; everything else, tracebacks and other people's lines, by the formatter that `configure` installs.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import TextIO

from .runner_secrets import RedactingFormatter, guard_output, redact

KEYS = ("action", "provider", "session", "work", "sandbox", "attempt", "ms", "error", "reason")

_PLAIN = re.compile(
    r"[!#-<>-~]+\Z"
)  # printable ASCII without space, quote and equals sign: ends no line, moves no cursor


def line(action: str, **values: object) -> str:
    """One log line: `action=launched session=sesn_1 ms=812`. Raises `ValueError` for a key that is not in `KEYS`."""
    if unknown := values.keys() - set(KEYS):
        raise ValueError(f"unknown log keys: {', '.join(sorted(unknown))}")
    pairs = {"action": action, **values}
    return " ".join(f"{key}={_value(pairs[key])}" for key in KEYS if pairs.get(key) is not None)


def bug(logger: logging.Logger, action: str, error: BaseException, **values: object) -> None:
    """Logs an exception that nobody expected, with its traceback."""
    logger.error(line(action, **values, error=error), exc_info=error)


def ms(began: float) -> int:
    """Milliseconds since `began`, a moment of `time.monotonic`."""
    return round((time.monotonic() - began) * 1000)


def _value(value: object) -> str:
    text = type(value).__name__ if isinstance(value, BaseException) else redact(str(value))
    return text if _PLAIN.match(text) else json.dumps(text)


def configure(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Sends every logger of the process, and what Python itself writes of a failure, through `redact`. Called by entry
    points, never at import."""
    guard_output()
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
