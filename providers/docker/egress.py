"""The egress proxy: the only way out of a sandbox, to the hosts that the operator has named and to no others.

    egress.py '{"socket": PATH, "allowed": [HOST, ...]}'

It runs in a container of its own and listens on a Unix socket in a volume that the sandboxes see; they have no network.
It serves CONNECT (https) and plain http. An allowed name is `host`, `*.domain` (every name below it), `*` (every host)
or one of them with `:port`; without a port, 443 and 80. Names are resolved here, and what they resolve to is checked
here: a name below a `*.domain`, or any with `*`, may be anybody's, and leads to public addresses only; one that was
named in full may also lead to a private network; none leads to a loopback or a link-local address, where clouds keep
their metadata. An address that was allowed as an address is allowed. Standard library only, and one file, since it is
all that this container runs.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ipaddress
import json
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from relay import Connection, join

DEFAULT_PORTS = frozenset({80, 443})
HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
CONNECT_SECONDS = 15.0
CONNECTIONS_PER_SANDBOX = 64
RESERVED_CONNECTIONS = 8  # of these, for the first host of the list: the API, which the sandbox's runner needs
QUIET_SECONDS = 1.0
_SO_PEERGROUPS = 59  # Linux, <asm-generic/socket.h>; Python has no name for it
_GROUPS = 32
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\Z")
_HEADER = re.compile(rb"[\w!#$%&'*+.^`|~-]+:[^\r\n\0]*")
_NOT_PASSED_ON = re.compile(rb"(?:host|connection|proxy-[a-z-]+|keep-alive|te|upgrade):", re.IGNORECASE)


class Refused(Exception):
    """The request cannot be served; the text is for whoever sent it."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Rule:
    """One entry of the allow-list."""

    name: str  # a host name, or the text of an IP address; empty for the root, which every host is below
    below: bool  # every name below it instead
    ports: frozenset[int]

    @classmethod
    def parse(cls, entry: str) -> Rule:
        """Raises `ValueError` for what is no host, address, `*.domain`, `*`, or one of them with a port."""
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", entry.strip())
        if not match or not 0 < int(match[2] or 443) < 65536:
            raise ValueError("expected hosts such as example.com, *.example.com or example.com:8443")
        name = match[1].strip("[]").rstrip(".").lower()
        if match[1] == "*":
            return cls("", True, frozenset({int(match[2])}) if match[2] else DEFAULT_PORTS)
        below = name.startswith("*.")
        name = name.removeprefix("*.")
        if _address(name) is None and not _NAME.match(name):
            raise ValueError("expected hosts such as example.com, *.example.com or example.com:8443")
        return cls(name, below, frozenset({int(match[2])}) if match[2] else DEFAULT_PORTS)

    def allows(self, host: str, port: int) -> bool:
        is_below = not self.name or host.endswith(f".{self.name}")
        return port in self.ports and (is_below if self.below else host == self.name)


def parse(entries: Iterable[str]) -> tuple[Rule, ...]:
    """The allow-list. Raises `ValueError`."""
    return tuple(Rule.parse(entry) for entry in entries)


def groups(connection: socket.socket) -> tuple[int, ...]:
    """The groups of whoever connected: each sandbox has one of its own, and cannot change it."""
    size = struct.calcsize("I")
    raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS * size)
    return struct.unpack(f"{len(raw) // size}I", raw)


class Proxy:
    """Serves connections on the socket until the process ends. The first of the rules is the API's."""

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        connections_per_sandbox: int = CONNECTIONS_PER_SANDBOX,
        reserved_connections: int = RESERVED_CONNECTIONS,
        sandbox_of: Callable[[socket.socket], tuple[int, ...]] = groups,
    ) -> None:
        self._rules = rules
        self._most = connections_per_sandbox
        self._most_elsewhere = connections_per_sandbox - reserved_connections
        self._sandbox_of = sandbox_of
        self._open: collections.Counter[tuple[int, ...]] = collections.Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its last."""
        try:
            with contextlib.suppress(ConnectionError), self._counted(writer.get_extra_info("socket")) as taken:
                try:
                    head = await _read_head(reader)
                    upstream = await self._connect(head, taken())
                except Refused as error:
                    _log(action="refused", reason=str(error))
                    writer.write(f"HTTP/1.1 {error.status}\r\nContent-Type: text/plain\r\n".encode())
                    writer.write(f"Connection: close\r\n\r\n{error}\n".encode())
                    await writer.drain()
                else:
                    if head.is_tunnel:
                        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    else:
                        upstream[1].write(head.passed_on)
                    await join((reader, writer), upstream)
        finally:
            writer.close()

    async def unused(self) -> None:
        """Returns once no connection has been open for a moment."""
        since = time.monotonic()
        while time.monotonic() - since < QUIET_SECONDS:
            await asyncio.sleep(QUIET_SECONDS / 10)
            if self._open:
                since = time.monotonic()

    @contextlib.contextmanager
    def _counted(self, connection: socket.socket) -> Iterator[Callable[[], int]]:
        """A bound for each sandbox, so that one cannot take the proxy away from the others. Yields what tells how many
        connections it has. Raises `ConnectionAbortedError` beyond the bound."""
        sandbox = self._sandbox_of(connection)
        if self._open[sandbox] >= self._most:
            raise ConnectionAbortedError
        self._open[sandbox] += 1
        try:
            yield lambda: self._open[sandbox]
        finally:
            self._open[sandbox] -= 1
            if not self._open[sandbox]:
                del self._open[sandbox]

    async def _connect(self, head: Head, taken: int) -> Connection:
        """With `taken` connections of the same sandbox, this one included. Raises `Refused`."""
        rules = [rule for rule in self._rules if rule.allows(head.host, head.port)]
        if not rules:
            raise Refused("403 Forbidden", f"{head.host}:{head.port} is not in SANDBOX_ALLOWED_HOSTS")
        if taken > self._most_elsewhere and not self._rules[0].allows(head.host, head.port):
            raise Refused("503 Service Unavailable", f"{self._most_elsewhere} connections are open")
        failure = "no address"
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                until = time.monotonic() + CONNECT_SECONDS
                addresses = await _resolve(head.host, head.port, private=not all(rule.below for rule in rules))
                for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
                    try:
                        share = (until - time.monotonic()) / left  # one that is silent leaves time for the others
                        async with asyncio.timeout(share):
                            return await asyncio.open_connection(address, head.port)
                    except TimeoutError:
                        failure = "no answer in time"
                    except OSError as error:
                        failure = error.strerror or type(error).__name__
        except TimeoutError:
            failure = "no answer in time"
        raise Refused("502 Bad Gateway", f"{head.host}:{head.port} cannot be reached: {failure}")


@dataclass(frozen=True)
class Head:
    """What a request asks for."""

    host: str
    port: int
    is_tunnel: bool
    passed_on: bytes


async def _read_head(reader: asyncio.StreamReader) -> Head:
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            raw = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.LimitOverrunError, asyncio.IncompleteReadError, TimeoutError):
        raise Refused("400 Bad Request", "no request of a sensible size arrived") from None
    return parse_head(raw)


def parse_head(raw: bytes) -> Head:
    """The head of a proxy request. Raises `Refused`."""
    first, *headers = raw[:-4].split(b"\r\n")
    try:
        method, target, version = first.decode("ascii").split(" ")
        is_tunnel = method == "CONNECT"
        url = urlsplit(f"//{target}" if is_tunnel else target)
        host, port = (url.hostname or "").rstrip("."), url.port or (0 if is_tunnel else 80)
    except ValueError:
        raise Refused("400 Bad Request", "this is no HTTP proxy request") from None
    usable = url.path in ("", "/") and not url.query if is_tunnel else url.scheme == "http"
    if not usable or not port or url.username is not None or not version.startswith("HTTP/1."):
        raise Refused("400 Bad Request", "expected CONNECT host:port, or an absolute http:// URL")
    if _address(host) is None and not _NAME.match(host):
        raise Refused("400 Bad Request", "the host is no name and no address")
    if not all(_HEADER.fullmatch(header) for header in headers):
        raise Refused("400 Bad Request", "a header is none, or hides another one")
    path = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
    kept = [header for header in headers if not _NOT_PASSED_ON.match(header)]
    # The Host that was allowed, whatever the request had: a server of many sites would serve another one.
    site = f"Host: {url.netloc.lower()}".encode()
    passed_on = b"\r\n".join([f"{method} {path} HTTP/1.1".encode(), site, *kept, b"Connection: close", b"", b""])
    return Head(host, port, is_tunnel, passed_on)


async def _resolve(host: str, port: int, *, private: bool) -> list[str]:
    """The addresses to try. Raises `Refused` when none may be."""
    if _address(host) is not None:
        if not private and not may_be_reached(host, False):  # only `*` allows an address that was not named
            raise Refused("403 Forbidden", f"{host} is not public, and not in SANDBOX_ALLOWED_HOSTS by itself")
        return [host]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Refused("502 Bad Gateway", f"{host} cannot be resolved: {error.strerror}") from None
    usable = [text for text in dict.fromkeys(str(entry[4][0]) for entry in found) if may_be_reached(text, private)]
    if not usable:
        raise Refused("403 Forbidden", f"{host} leads to an address that no such name may lead to")
    return usable


def may_be_reached(text: str, private: bool) -> bool:
    """Whether a name may lead to this address: a public one, or, with `private`, one of a private network."""
    address = _address(text)
    if address is None or address.is_multicast or address.is_loopback or address.is_link_local or address in _METADATA:
        return False
    if isinstance(address, ipaddress.IPv6Address) and _hides_ipv4(address):
        return False
    return address.is_global or (private and any(address in network for network in _PRIVATE))


def is_loopback(text: str) -> bool:
    """Whether this is an address of whoever uses it."""
    address = _address(text)
    return address is not None and address.is_loopback


def _hides_ipv4(address: ipaddress.IPv6Address) -> bool:
    return bool(address.ipv4_mapped or address.sixtofour or address.teredo) or address in _NAT64


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Where clouds hand out credentials at addresses that look like others: AWS, Google, Scaleway, Azure.
_METADATA = [ipaddress.ip_address(text) for text in ("fd00:ec2::254", "fd20:ce::254", "fd00:42::42", "168.63.129.16")]
_PRIVATE = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _log(**values: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, json.dumps({"event": "egress", **values}).encode() + b"\n")


def open_files_as_allowed() -> None:
    """Each connection takes two; the soft limit that newer Engines give is 1024, for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def main(config: dict[str, object]) -> None:
    """Serves until SIGTERM, and then whoever still needs it: an Engine that stops tells all containers at once, and the
    runners hand their sessions over through us."""
    path, allowed = config["socket"], config["allowed"]
    if not isinstance(path, str) or not isinstance(allowed, list):
        raise ValueError("expected a socket and a list of hosts")
    open_files_as_allowed()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    listener = socket.socket(socket.AF_UNIX)
    fresh = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    listener.bind(fresh)
    os.chmod(fresh, 0o666)  # noqa: S103 - the sandboxes are other users
    listener.listen(1024)
    os.rename(fresh, path)  # in place of one that an earlier proxy has left
    proxy = Proxy(parse(allowed))
    await asyncio.start_unix_server(proxy.serve, sock=listener, limit=HEAD_BYTES)
    _log(action="listening", reason=", ".join(allowed))
    await stop.wait()
    await proxy.unused()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
