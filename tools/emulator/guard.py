"""Web pages of others, in the browser of whoever runs the emulator, reach its port; they get nothing.

A page can make a browser ask any port of this machine. What it may not do unasked is read the answer, send JSON or hide
where it comes from; so a request that names another origin is refused. A name that its owner lets point to this machine
(DNS rebinding) would make the page of the same origin, so an emulator on loopback only answers to loopback's names.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from .errors import Forbidden


def check_origin(request: Request, *, is_local: bool) -> None:
    """Forbidden for a request that a foreign page has made; `is_local`: listening on loopback only."""
    host = request.headers.get("host", "")
    if is_local and not _is_loopback(host):
        raise Forbidden(f"host: {host!r} is no name of this machine's loopback; ask for http://127.0.0.1 or localhost")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden(f"origin: a page of {origin} may not ask this emulator for anything")


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
