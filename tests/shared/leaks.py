"""Secrets of every shape, written in every way a program writes them; and a search that no way of writing escapes."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from urllib.parse import quote

TAIL = "Zq7RkWx2LmVb9TnPs4GhYc3JfDu8Ea6Q"
_TAIL_URL = f"{TAIL[:9]}-{TAIL[9:20]}_{TAIL[20:]}"
_TAIL_BASE64 = f"{TAIL[:9]}+{TAIL[9:20]}/{TAIL[20:]}="

SHAPED = {
    "environment key": f"sk-ant-oat01-{_TAIL_URL}",
    "API key": f"sk-ant-api03-{_TAIL_URL}",
    "session token": f"sk-ant-req-{_TAIL_URL}",
    "webhook key": f"whsec_{_TAIL_BASE64}",
    "JWT": f"eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.{_TAIL_URL}.{TAIL[::-1]}",
    "work secret": base64.urlsafe_b64encode(json.dumps({"sessions_token": f"sk-ant-req-{TAIL}"}).encode()).decode(),
}
"""What is known by its looks, in whatever process it turns up."""

SHAPELESS = {"vendor token": f"{TAIL}/{TAIL[::-1]}", "vendor password": f'p"a\\s: {TAIL}'}
"""What only its setting knows as a secret."""

WINDOW = 10  # so many characters of a secret in a row are a leak


def _lines(text: str) -> str:
    return "\n".join(text[at : at + 19] for at in range(0, len(text), 19))


WRITTEN: dict[str, Callable[[str], str]] = {
    "plain": lambda secret: f"the key {secret} was refused",
    "as a value": lambda secret: f"token={secret}, retry=1",
    "in JSON": lambda secret: json.dumps({"headers": {"x-key": secret}}),
    "in JSON in JSON": lambda secret: json.dumps({"body": json.dumps({"key": secret})}),
    "in JSON for JavaScript": lambda secret: json.dumps({"key": secret}).replace("/", "\\/"),
    "in a header": lambda secret: f"{{'Authorization': 'Bearer {secret}'}}",
    "in a query": lambda secret: f"GET https://host/path?a=1&key={quote(secret, safe='')}&b=2 failed",
    "as a password": lambda secret: f"cannot reach https://user:{quote(secret, safe='')}@host:6379/0",
    "in base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "in base64, one on": lambda secret: base64.b64encode(f"u{secret}".encode()).decode(),
    "in base64 for addresses, two on": lambda secret: base64.urlsafe_b64encode(f"u:{secret}".encode()).decode(),
    "over several lines": lambda secret: f"key:\n{_lines(secret)}\n",
    "over several lines, as repr shows it": lambda secret: repr({"key": _lines(secret)}),
    "over several lines, as JSON": lambda secret: json.dumps({"key": _lines(secret)}),
    "over several lines of base64": lambda secret: _lines(base64.b64encode(secret.encode()).decode()),
}


def found(secret: str, output: str) -> list[str]:
    """The pieces of `secret` in `output`, however it is written there. Its public beginning is no secret."""
    body = re.sub(r"^(sk-ant-\w+-|whsec_|eyJ\w+\.)", "", secret)
    pieces = {body[at : at + WINDOW] for at in range(len(body) - WINDOW + 1)}
    pieces |= {quote(piece, safe="") for piece in pieces} | {json.dumps(piece)[1:-1] for piece in pieces}
    flat = re.sub(r"\\+[nr]|\s", "", output).replace("\\/", "/")
    texts = [flat, *(text for run in re.findall(r"[\w+/\-]{16,}", flat) for text in _decodings(run))]
    return sorted(piece for piece in pieces if any(re.sub(r"\s", "", piece) in text for text in texts))


def _decodings(run: str) -> list[str]:
    standard = run.replace("-", "+").replace("_", "/")
    cut = [standard[start:] for start in range(4)]
    return [base64.b64decode(text[: len(text) // 4 * 4]).decode("latin-1") for text in cut]
