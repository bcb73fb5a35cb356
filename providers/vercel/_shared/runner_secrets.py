"""Keeps secrets out of whatever is written: the one place that does, for the host's log and for the runner's.

Two ways lead to a secret. Some have a shape: our control plane's keys, JSON in base64, a JWT, a password in an address.
Others do not, such as a vendor's token, so whoever reads a secret says what it is (`hide`). Both are found plain, in
base64, percent-encoded and JSON-escaped, and where a line break goes through them.
"""

from __future__ import annotations

import base64
import logging
import re
import sys
import traceback
from types import TracebackType
from urllib.parse import quote

REDACTED = "[redacted]"
_SHORTEST = 8  # a shorter value is a word that other texts have too
_MOST_KNOWN = 32  # a process has a handful
_BREAK = r"(?:\\+[rn]|[\r\n])[ \t|]*"  # a line's end, as it is or as JSON and repr write it, and an indent
_CHARACTER = r"(?:[\w.+/=%\-]|\\+/)"  # of a credential, in any of its spellings
_PREFIXES = (
    *("sk-ant-", "whsec_"),
    *("eyJhbGciOi", "eyJ0eXAiOi", "eyJraWQiOi", "eyJzZXNzaW9uc190b2tlbi"),  # a JWT, a work item's secret
)


def _in_base64(text: str) -> set[str]:
    """The characters that stand for all of `text` in the base64 of whatever contains it."""
    found = set()
    for before in range(3):
        size = before + len(text.encode())
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(b"\0" * before + text.encode() + b"\0\0").decode()
            found.add(encoded[-(-before * 8 // 6) : size * 8 // 6])
    return found


_MARKS = {mark for prefix in _PREFIXES for mark in (prefix, prefix.encode().hex(), *_in_base64(prefix))}
_SHAPES = re.compile(
    # What begins like a credential, up to its end, and the lines that are nothing but more of it.
    rf"(?:{'|'.join(f'(?:{_BREAK})*'.join(map(re.escape, mark)) for mark in sorted(_MARKS))}|\beyJ(?=[\w\-]{{6}}))"
    rf"{_CHARACTER}*"
    rf"(?:(?:{_BREAK})+{_CHARACTER}+(?=[\r\n\\\"']|\Z))*"
    r"|(?<=://)[^\s/@\"'\\]+(?=@)"  # a name and a password in an address
)
_NAMED = re.compile(
    r"(?i)((?:\bbearer\s+|\bbasic\s+|\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?|\bx-api-key[\"']?\s*[:=]\s*[\"']?"
    r"|[?&;][\w.\-]*(?:sig|token|secret|key|password|credential)[\w.\-]*=)(?:bearer\s+|basic\s+)?)[^\s\"'&#;,]+"
)
_known: dict[str, re.Pattern[str] | None] = {}  # with its pattern, once something was to be redacted


def hide(secret: str | None) -> None:
    """From now on `redact` knows this value as a secret, whatever it looks like. Too short a one it cannot tell from
    ordinary text."""
    if secret and len(secret) >= _SHORTEST and secret not in _known:
        _known[secret] = None
        while len(_known) > _MOST_KNOWN:
            del _known[next(iter(_known))]


def redact(text: str) -> str:
    """`text` without any secret."""
    for secret, pattern in _known.items():
        if pattern is None:
            pattern = _known[secret] = _spellings(secret)
        text = pattern.sub(REDACTED, text)
    return _NAMED.sub(rf"\1{REDACTED}", _SHAPES.sub(REDACTED, text))


def _spellings(secret: str) -> re.Pattern[str]:
    found = {secret, quote(secret, safe=""), *_in_base64(secret)}
    gap = f"(?:{_BREAK})*"
    longest_first = sorted(found, key=lambda text: (-len(text), text))
    return re.compile("|".join(gap.join(map(_escaped, spelling)) for spelling in longest_first))


def _escaped(character: str) -> str:
    """One character of a secret, with what JSON, repr and their like put before it."""
    if character == "\n":
        return _BREAK
    if character == "\\":
        return r"\\+"
    return rf"\\*{re.escape(character)}" if character in "\"'/" else re.escape(character)


class RedactingFormatter(logging.Formatter):
    """Formats as usual, tracebacks included, then redacts the whole."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def guard_output() -> None:
    """What Python itself would write about a failure nobody caught, and about warnings, is redacted too."""
    sys.excepthook = _write_failure
    logging.captureWarnings(True)


def _write_failure(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
