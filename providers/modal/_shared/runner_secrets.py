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
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import quote

REDACTED = "[redacted]"
_SHORTEST = 8  # a shorter value is a word that other texts have too,
_SHORTEST_CLOSED = 5  # also when what stands `_BETWEEN` is taken out of it
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
_BETWEEN = re.compile(r"\\+[rn]|[\s\\|]")  # what breaks, indents and escapes put between the characters of a secret


@dataclass(frozen=True)
class _Spellings:
    """How a secret may be written: as it is, and with all that stands `_BETWEEN` taken out."""

    open: frozenset[str]
    closed: frozenset[str]

    @classmethod
    def of(cls, secret: str) -> _Spellings:
        found = {secret, quote(secret, safe=""), *_in_base64(secret)}
        # After a backslash that is not its own, a first n or r is taken out too.
        closed = {re.sub(r"\A[nr]", "", _BETWEEN.sub("", spelling)) for spelling in found}
        return cls(frozenset(found), frozenset(text for text in closed if len(text) >= _SHORTEST_CLOSED))


_known: dict[str, _Spellings] = {}


def hide(secret: str | None) -> None:
    """From now on `redact` knows this value as a secret, whatever it looks like. Too short a one it cannot tell from
    ordinary text."""
    if secret and len(secret) >= _SHORTEST and secret not in _known:
        _known[secret] = _Spellings.of(secret)
        while len(_known) > _MOST_KNOWN:
            del _known[next(iter(_known))]


def redact(text: str) -> str:
    """`text` without any secret."""
    return _NAMED.sub(rf"\1{REDACTED}", _SHAPES.sub(REDACTED, _without_known(text)))


def _without_known(text: str) -> str:
    """`text` without what `hide` was told. Searched for, not matched: a pattern of all spellings takes 50 ms to make,
    and every runner is a new process with secrets of its own."""
    found = {place for each in _known.values() for place in _places(text, each.open)}
    gaps = [gap.span() for gap in _BETWEEN.finditer(text)] if _known else []
    if gaps:
        starts, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), len(text)]
        kept = [at for start, end in zip(starts, ends, strict=True) for at in range(start, end)]
        closed = "".join(text[at] for at in kept)
        places = {place for each in _known.values() for place in _places(closed, each.closed)}
        found |= {(kept[start], kept[end - 1] + 1) for start, end in places}
    parts, done = [], 0
    for start, end in sorted(found):
        if start >= done:
            parts += [text[done:start], REDACTED]
        done = max(done, end)
    return "".join((*parts, text[done:]))


def _places(text: str, spellings: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Where they stand in it, from and to."""
    for spelling in spellings:
        start = text.find(spelling)
        while start >= 0:
            yield start, start + len(spelling)
            start = text.find(spelling, start + 1)


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
