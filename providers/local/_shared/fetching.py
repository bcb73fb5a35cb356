"""Fetches a file from the public internet, for a session whose metadata names it (R12).

Whoever writes a session's metadata chooses the address, and the host may stand inside a network: so only https, only
public addresses, and no more than a few megabytes. The name is resolved once, every address it has must be public, and
the connection goes to the one that was checked: a name that says something else a moment later changes nothing. A
redirect is checked like the first address. Proxies of the environment are not used: they would resolve the name again.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

from .errors import FetchRefused

FETCH_SECONDS = 30.0  # for one file, redirects and all
_CALL_SECONDS = 10.0  # for one connect, one read
_REDIRECTS = 3
_NAT64, _LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_OF_CLOUDS = frozenset({"168.63.129.16", "192.0.0.192"})  # look public, and are a machine's own cloud's
_MOVED = (301, 302, 303, 307, 308)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: str) -> bool:
    """Whether this is an address of the public internet, in every way of writing an IPv4 address in IPv6 too."""
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64 or ip in _COMPATIBLE:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if ip.is_site_local or ip in _LOCAL_NAT64:
            return False
        if inside is not None:
            ip = inside
    return ip.is_global and not ip.is_multicast and str(ip) not in _OF_CLOUDS


class _Pinned(http.client.HTTPSConnection):
    """Connects to the address it was given, and asks for the name's certificate there."""

    def __init__(self, host: str, port: int, address: tuple[str, int], context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=_CALL_SECONDS, context=context)
        self._address = address
        self._context_of_name = context
        self._is_aborted = False

    def connect(self) -> None:
        plain = socket.create_connection(self._address, _CALL_SECONDS)
        try:
            self.sock = self._context_of_name.wrap_socket(plain, server_hostname=self.host)
        except OSError:
            plain.close()
            raise
        if self._is_aborted:  # meanwhile: there was nothing to shut down
            raise ConnectionAbortedError

    def abort(self) -> None:
        """Ends it from another thread: a socket's own timeout begins anew with every byte."""
        self._is_aborted = True
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class Fetcher:
    """Fetches with these checks. `is_allowed` and `context` are for tests: no server on this machine is public."""

    def __init__(
        self,
        *,
        is_allowed: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
        seconds: float = FETCH_SECONDS,
    ) -> None:
        self._seconds = seconds
        self._is_allowed = is_allowed
        self._context = context

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """The file behind `url`. Raises `FetchRefused`; its text never quotes the address, which may hold a key."""
        return await asyncio.to_thread(self._fetch, url, max_bytes)

    def _fetch(self, url: str, max_bytes: int) -> bytes:
        deadline = time.monotonic() + self._seconds
        context = self._context or ssl.create_default_context()
        for _ in range(_REDIRECTS + 1):
            try:
                connection, target = self._open(url, context)
            except (ValueError, UnicodeError):
                raise FetchRefused("it has no usable address") from None
            end = threading.Timer(max(0.0, deadline - time.monotonic()), connection.abort)
            end.start()
            try:
                connection.request("GET", target, headers={"accept": "*/*", "accept-encoding": "identity"})
                answer = connection.getresponse()
                if answer.status in _MOVED and (location := answer.getheader("location")):
                    url = urljoin(url, location)
                    continue
                if answer.status != 200:
                    raise FetchRefused(f"its server answered {answer.status}")
                return _read(answer, max_bytes)
            except (OSError, ValueError, http.client.HTTPException) as error:
                if time.monotonic() >= deadline:
                    raise FetchRefused(f"it did not arrive within {self._seconds:g} s") from None
                raise FetchRefused(_reason(error)) from None
            finally:
                end.cancel()
                connection.close()
        raise FetchRefused(f"its server redirects more than {_REDIRECTS} times")

    def _open(self, url: str, context: ssl.SSLContext) -> tuple[_Pinned, str]:
        parts = urlsplit(url)
        if parts.scheme != "https":
            raise FetchRefused("it is not https")
        if not parts.hostname or parts.username is not None or parts.password is not None:
            raise FetchRefused("its address has no host, or a password in it")
        port = parts.port or 443
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError:
            raise FetchRefused("its host is not known") from None
        addresses = [str(info[4][0]) for info in found]
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise FetchRefused("its host has an address that is not public")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Pinned(parts.hostname, port, (addresses[0], port), context), target


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return "its server has no certificate for that name"
    if isinstance(error, TimeoutError):
        return "its server did not answer in time"
    return f"its server could not be read: {type(error).__name__}"


def _read(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    content = answer.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise FetchRefused(f"it is larger than {max_bytes} bytes")
    if answer.length:
        raise http.client.IncompleteRead(content)
    return content
