"""The egress proxy: what it lets through, what it refuses, and that one sandbox cannot take it from the others.

It runs in this process on a Unix socket, as in its container; tests/providers/test_docker_sandbox.py tries it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.providers.docker_support import DOCKER, FOLDER

egress = DOCKER.module("egress")
Rule, Refused = egress.Rule, egress.Refused
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "host", "port", "allowed"),
    [
        ("example.com", "example.com", 443, True),
        ("example.com", "example.com", 80, True),
        ("example.com", "example.com", 22, False),
        ("example.com", "www.example.com", 443, False),
        ("example.com", "example.com.evil.net", 443, False),
        ("example.com", "evilexample.com", 443, False),
        ("Example.COM.", "example.com", 443, True),
        ("*.example.com", "www.example.com", 443, True),
        ("*.example.com", "a.b.example.com", 443, True),
        ("*.example.com", "example.com", 443, False),
        ("*.example.com", "evilexample.com", 443, False),
        ("example.com:8443", "example.com", 8443, True),
        ("example.com:8443", "example.com", 443, False),
        ("10.1.2.3:5000", "10.1.2.3", 5000, True),
        ("10.1.2.3:5000", "10.1.2.4", 5000, False),
        ("[fd00::1]:443", "fd00::1", 443, True),
        ("*", "www.example.com", 443, True),
        ("*", "93.184.215.14", 80, True),
        ("*", "example.com", 22, False),
        ("*:22", "example.com", 22, True),
    ],
)
def test_an_entry_allows_what_it_says(entry: str, host: str, port: int, allowed: bool) -> None:
    assert Rule.parse(entry).allows(host, port) is allowed


@pytest.mark.parametrize(
    "entry",
    ["", "**", "*.", "http://example.com", "example.com:0", "example.com:99999", "a b", "ex*.com", "a/b", "-a.b"],
)
def test_what_is_no_entry_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="expected hosts such as"):
        Rule.parse(entry)


# --- where a name may lead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "named_in_full", "below_a_domain"),
    [
        ("93.184.215.14", True, True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True, True),
        ("10.0.0.8", True, False),
        ("192.168.1.1", True, False),
        ("172.17.0.1", True, False),
        ("fd12:3456::1", True, False),
        ("fd00:ec2::254", False, False),  # AWS's metadata, in a private range
        ("168.63.129.16", False, False),  # Azure's, in a public one
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("0.0.0.0", False, False),  # noqa: S104 - nothing is bound
        ("::", False, False),
        ("169.254.169.254", False, False),
        ("fe80::1", False, False),
        ("100.100.100.200", False, False),  # one cloud's metadata, in the carriers' range
        ("224.0.0.1", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("64:ff9b::a9fe:a9fe", False, False),
        ("2002:a9fe:a9fe::", False, False),
        ("fe80::1%eth0", False, False),
        ("nonsense", False, False),
    ],
)
def test_where_a_name_may_lead(address: str, named_in_full: bool, below_a_domain: bool) -> None:
    assert egress.may_be_reached(address, True) is named_in_full
    assert egress.may_be_reached(address, False) is below_a_domain


# --- what a request asks for ------------------------------------------------------------------------------------------


def test_a_plain_request_goes_on_without_what_is_the_proxys() -> None:
    head = egress.parse_head(
        b"POST http://Example.com:8080/a/b?c=d HTTP/1.1\r\nHost: example.com:8080\r\nProxy-Connection: keep-alive\r\n"
        b"Proxy-Authorization: Basic x\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n"
    )
    assert (head.host, head.port, head.is_tunnel) == ("example.com", 8080, False)
    expected = b"POST /a/b?c=d HTTP/1.1\r\nHost: example.com:8080\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
    assert head.passed_on == expected


def test_a_plain_request_goes_to_the_site_that_was_allowed_and_not_to_another_of_its_server() -> None:
    head = egress.parse_head(b"GET http://Example.com:8080/ HTTP/1.1\r\nhost: evil.net\r\nHost: other.net\r\n\r\n")
    assert head.passed_on == b"GET / HTTP/1.1\r\nHost: example.com:8080\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "header", [b" Host: evil.net", b"Host : evil.net", b"X: y\nHost: evil.net", b"X: y\rHost: z", b"x"]
)
def test_a_header_that_hides_another_is_refused(header: bytes) -> None:
    with pytest.raises(Refused, match="hides another"):
        egress.parse_head(b"GET http://example.com/ HTTP/1.1\r\nAccept: */*\r\n" + header + b"\r\n\r\n")


@pytest.mark.parametrize(
    ("first", "host", "port"),
    [(b"CONNECT example.com:443", "example.com", 443), (b"CONNECT [fd00::1]:8443", "fd00::1", 8443)],
)
def test_a_tunnel_names_host_and_port(first: bytes, host: str, port: int) -> None:
    head = egress.parse_head(first + b" HTTP/1.1\r\nHost: elsewhere.com\r\n\r\n")
    assert (head.host, head.port, head.is_tunnel) == (host, port, True)


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET / HTTP/1.1",
        b"GET https://example.com/ HTTP/1.1",
        b"GET ftp://example.com/ HTTP/1.1",
        b"GET http:///x HTTP/1.1",
        b"GET http://example.com@evil.net/ HTTP/1.1",
        b"GET http://example.com:notaport/ HTTP/1.1",
        b"CONNECT example.com HTTP/1.1",
        b"CONNECT example.com:443/path HTTP/1.1",
        b"CONNECT example.com:443 HTTP/2",
        b"CONNECT user@example.com:443 HTTP/1.1",
        b"CONNECT exa mple.com:443 HTTP/1.1",
        b"CONNECT example.com:443\x00.evil.net:443 HTTP/1.1",
        b"CONNECT [::1:443 HTTP/1.1",
        "CONNECT exämple.com:443 HTTP/1.1".encode(),
        b"GET  http://example.com/ HTTP/1.1",
    ],
)
def test_what_is_no_proxy_request_is_refused(first: bytes) -> None:
    with pytest.raises(Refused):
        egress.parse_head(first + b"\r\nHost: example.com\r\n\r\n")


# --- connections ------------------------------------------------------------------------------------------------------


class Proxied:
    """A proxy on a Unix socket, and a server that it may lead to."""

    def __init__(self, path: Path, upstream: int) -> None:
        self.path = path
        self.upstream = upstream

    async def talk(self, request: bytes) -> bytes:
        """Everything that comes back until the connection ends."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return answer


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what it got, in upper case, until the other side has ended."""
    while chunk := await reader.read(1024):
        writer.write(chunk.upper())
        await writer.drain()
    writer.close()


async def _page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + head)
    writer.close()


@asynccontextmanager
async def _proxied(directory: Path, serve: Serve, *allowed: str, **share: Any) -> AsyncIterator[Proxied]:
    tasks: set[asyncio.Future[None]] = set()

    def followed(served: Serve) -> Serve:
        async def follow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(serving := asyncio.ensure_future(served(reader, writer)))
            await asyncio.shield(serving)

        return follow

    upstream = await asyncio.start_server(followed(serve), "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    rules = egress.parse([entry.format(port=port) for entry in allowed])
    served = followed(egress.Proxy(rules, **share).serve)
    proxy = await asyncio.start_unix_server(served, directory / "p", limit=egress.HEAD_BYTES)
    try:
        yield Proxied(directory / "p", port)
    finally:
        proxy.close()
        upstream.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)  # every connection ends when both its sides have


async def test_a_tunnel_carries_bytes_both_ways_until_both_sides_end(tmp_path: Path) -> None:
    async with _proxied(tmp_path, _echo, "127.0.0.1:{port}") as proxied:
        reader, writer = await asyncio.open_unix_connection(proxied.path)
        writer.write(f"CONNECT 127.0.0.1:{proxied.upstream} HTTP/1.1\r\n\r\nhello".encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 Connection established\r\n\r\n"
        assert await reader.readexactly(5) == b"HELLO"
        large = b"x" * 3_000_000
        sending = asyncio.create_task(_send(writer, large))
        assert await reader.readexactly(len(large)) == large.upper()
        await sending
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await writer.drain()


async def test_a_plain_request_is_served(tmp_path: Path) -> None:
    async with _proxied(tmp_path, _page, "127.0.0.1:{port}") as proxied:
        where = f"127.0.0.1:{proxied.upstream}"
        answer = await proxied.talk(f"GET http://{where}/x HTTP/1.1\r\nHost: {where}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"GET /x HTTP/1.1" in answer


async def test_what_is_not_allowed_is_refused_by_name_and_reaches_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with _proxied(tmp_path, _echo, "example.com") as proxied:
        for request in (f"CONNECT 127.0.0.1:{proxied.upstream}", f"GET http://127.0.0.1:{proxied.upstream}/"):
            answer = await proxied.talk(f"{request} HTTP/1.1\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 403 Forbidden")
            assert f"127.0.0.1:{proxied.upstream} is not in SANDBOX_ALLOWED_HOSTS".encode() in answer
    assert capfd.readouterr().out.count('"action": "refused"') == 2


async def test_an_allowed_name_that_leads_to_this_machine_is_refused(tmp_path: Path) -> None:
    async with _proxied(tmp_path, _echo, "localhost:{port}") as proxied:  # in /etc/hosts: 127.0.0.1
        answer = await proxied.talk(f"CONNECT localhost:{proxied.upstream} HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 Forbidden")
    assert b"leads to an address that no such name may lead to" in answer


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "[::1]", "[::ffff:10.0.0.1]"])
async def test_everything_is_everything_that_is_public(tmp_path: Path, address: str) -> None:
    async with _proxied(tmp_path, _echo, "*:{port}") as proxied:
        answer = await proxied.talk(f"CONNECT {address}:{proxied.upstream} HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 Forbidden")
    assert b"is not public" in answer


async def test_what_cannot_be_reached_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    async with _proxied(tmp_path, _echo, f"127.0.0.1:{port}", "no-such-host.invalid") as proxied:
        refused = await proxied.talk(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
        unknown = await proxied.talk(b"CONNECT no-such-host.invalid:443 HTTP/1.1\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 502 Bad Gateway")
    assert unknown.startswith(b"HTTP/1.1 502 Bad Gateway")


async def test_a_head_without_an_end_is_refused(tmp_path: Path) -> None:
    async with _proxied(tmp_path, _echo, "example.com") as proxied:
        answer = await proxied.talk(b"GET http://example.com/ HTTP/1.1\r\nX: " + b"x" * 2 * egress.HEAD_BYTES)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")


async def test_one_sandbox_has_no_more_than_its_share_of_connections(tmp_path: Path) -> None:
    makers = itertools.chain([(7,), (7,), (7,), (8,)], itertools.repeat((7,)))
    share: Any = {"connections_per_sandbox": 2, "sandbox_of": lambda connection: next(makers)}
    async with _proxied(tmp_path, _echo, "127.0.0.1:{port}", **share) as proxied:
        connect = f"CONNECT 127.0.0.1:{proxied.upstream} HTTP/1.1\r\n\r\n".encode()

        async def opened() -> tuple[bytes, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_unix_connection(proxied.path)
            writer.write(connect)
            return await asyncio.wait_for(reader.read(12), 60), writer

        answers = [await opened() for _ in range(4)]
        assert [answer for answer, _ in answers] == [b"HTTP/1.1 200", b"HTTP/1.1 200", b"", b"HTTP/1.1 200"]
        for _, writer in answers:
            writer.close()
        deadline = asyncio.get_running_loop().time() + 60
        while True:  # until the proxy has noticed that the first ones ended
            answer, writer = await opened()
            writer.close()
            if answer == b"HTTP/1.1 200":
                break
            assert asyncio.get_running_loop().time() < deadline


async def test_the_last_connections_of_a_sandbox_are_for_the_api(tmp_path: Path) -> None:
    other = await asyncio.start_server(_echo, "127.0.0.1", 0)
    elsewhere = other.sockets[0].getsockname()[1]
    share: Any = {"connections_per_sandbox": 3, "reserved_connections": 1, "sandbox_of": lambda connection: (7,)}
    async with _proxied(tmp_path, _echo, "127.0.0.1:{port}", f"127.0.0.1:{elsewhere}", **share) as proxied:
        answers, writers = [], []
        for port in (elsewhere, elsewhere, elsewhere, proxied.upstream):
            reader, writer = await asyncio.open_unix_connection(proxied.path)
            writer.write(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
            answers.append(await asyncio.wait_for(reader.read(12), 60))
            writers.append(writer)
        for writer in writers:
            writer.close()
    other.close()
    assert answers == [b"HTTP/1.1 200", b"HTTP/1.1 200", b"HTTP/1.1 503", b"HTTP/1.1 200"]


@pytest.mark.skipif(sys.platform != "linux", reason="the proxy runs on Linux")
def test_the_proxy_opens_as_many_files_as_it_may(tmp_path: Path) -> None:
    config = json.dumps({"socket": str(tmp_path / "p"), "allowed": ["example.com"]})
    argv = ["sh", "-c", 'ulimit -Sn 64 && exec "$@"', "sh", sys.executable, str(FOLDER / "egress.py"), config]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as proxy:
        assert proxy.stdout is not None
        try:
            assert b'"listening"' in proxy.stdout.readline()
            limits = Path(f"/proc/{proxy.pid}/limits").read_text(encoding="utf-8")
        finally:
            proxy.kill()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    soft, hard = line.split()[3:5]
    assert soft == hard


def test_a_connections_groups_are_those_of_its_maker() -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(f"\0sandboxes-test-{os.getpid()}")
        server.listen()
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            assert sorted(egress.groups(accepted)) == sorted(os.getgroups())


async def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an address that swallows what is sent to it, as a broken IPv6 route does."""
    with socket.create_server(("127.0.0.2", 0), backlog=0) as silent, contextlib.ExitStack() as theirs:
        port = silent.getsockname()[1]
        for _ in range(8):  # its queue is full: what comes now is dropped without an answer
            waiting = theirs.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.2", port))
        answering = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)

        async def resolve(*_: object, **__: object) -> list[str]:
            return ["127.0.0.2", "127.0.0.1"]

        monkeypatch.setattr(egress, "_resolve", resolve)
        monkeypatch.setattr(egress, "CONNECT_SECONDS", 4.0)
        async with answering:
            proxy = egress.Proxy([Rule.parse(f"example.com:{port}")])
            _, writer = await proxy._connect(egress.Head("example.com", port, True, b""), 1)
            assert writer.get_extra_info("peername")[0] == "127.0.0.1"
            writer.close()
