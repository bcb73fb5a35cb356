"""Stands in for the networking sidecar that `wrangler dev` puts beside each container; that is in a registry.

The container shares its network. It brings workerd's connections to a port of the container. Once workerd says that
there is no internet, every address outside of Docker's network is this machine, and what is sent to port 80 or 443 of
any goes to workerd, which asks the Worker; TLS is decrypted for that, by a certificate authority of its own.

What the real one does beside that: it takes every TCP port, answers DNS, asks workerd about an open network too, and
lets TLS pass undecrypted where nobody wants to see it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

CUT = Path("/cut")  # while a test has this file here, a connection ends once the container has sent so much in it
CUT_BYTES = 1 << 20
REFUSED = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"
CONNECTED = b"HTTP/1.1 200 OK\r\n\r\n"
CA, CA_KEY = Path("/tmp/ca.crt"), Path("/tmp/ca.key")
LIMIT = 1 << 16


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
        method, target, _ = head.split("\r\n")[0].split(" ", 2)
        if method == "CONNECT":
            await tunnel(reader, writer, int(target.rpartition(":")[2]))
        elif (method, target) == ("GET", "/ca"):
            await reply(writer, authority())
        elif (method, target) == ("PUT", "/egress"):
            await egress.configure(json.loads(await reader.readexactly(length_of(head))))
            await reply(writer, b"{}")
        else:
            sys.stdout.write(f"not known here: {method} {target}\n")
            writer.write(REFUSED)
    writer.close()


async def reply(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


def length_of(head: str) -> int:
    return int(header(head, "content-length") or 0)


def header(head: str, name: str) -> str | None:
    lines = (line.partition(":") for line in head.split("\r\n")[1:])
    return next((value.strip() for key, _, value in lines if key.strip().lower() == name), None)


class Egress:
    """What the container sends out, once it has no internet."""

    def __init__(self) -> None:
        self._port = 0
        self._is_closed = False

    async def configure(self, wanted: dict[str, object]) -> None:
        self._port = int(str(wanted["port"]))
        internet = wanted.get("internet")
        if not isinstance(internet, dict) or internet["enabled"] or self._is_closed:
            return
        self._is_closed = True
        await asyncio.start_server(self._http, "0.0.0.0", 80, limit=LIMIT)  # noqa: S104
        await asyncio.start_server(self._tls, "0.0.0.0", 443, limit=LIMIT, ssl=tls_context())  # noqa: S104
        everything_is_here()

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            await self._ask(reader, writer, head, f"X-Hostname: {header(head.decode('latin1'), 'host') or ''}")
        writer.close()

    async def _tls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = getattr(writer.get_extra_info("ssl_object"), "asked_for", "")
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._ask(reader, writer, b"", f"X-Tls-Sni: {name}")
        writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, who: str) -> None:
        address, port = writer.get_extra_info("sockname")[:2]
        up_reader, up_writer = await asyncio.open_connection("host.docker.internal", self._port)
        up_writer.write(f"CONNECT {address}:{port} HTTP/1.1\r\nHost: {address}:{port}\r\n{who}\r\n\r\n".encode())
        answer = (await up_reader.readuntil(b"\r\n\r\n")).decode("latin1")
        if answer.split()[1] == "200":  # another: bytes as they are, and there is nobody for them
            up_writer.write(head)
            await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))
        up_writer.close()


egress = Egress()


def everything_is_here() -> None:
    """In place of the default route: each address that is not in Docker's network is one of this machine's."""
    lo = struct.pack("=HHI", 8, 4, socket.if_nametoindex("lo"))  # RTA_OIF
    # family, lengths of the addresses, tos; table main, by hand, host scope, local; no flags
    route = struct.pack("=8BI", socket.AF_INET, 0, 0, 0, 254, 4, 254, 2, 0) + lo
    replace = 0x001 | 0x004 | 0x100 | 0x400  # request, with an answer, replace or create
    message = struct.pack("=IHHII", 16 + len(route), 24, replace, 1, 0) + route  # RTM_NEWROUTE
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.sendto(message, (0, 0))
        error = struct.unpack_from("=i", netlink.recv(1 << 12), 16)[0]
    if error:
        raise OSError(-error, "the default route could not be replaced")


def tls_context() -> ssl.SSLContext:
    """Shows each client a certificate of the name that it asks for."""

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        connection.asked_for = name or ""  # type: ignore[attr-defined]
        connection.context = certified(name or "nameless")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = choose
    return context


def certified(name: str) -> ssl.SSLContext:
    with tempfile.TemporaryDirectory() as directory:
        certificate, key = Path(directory, "crt"), Path(directory, "key")
        authority()
        make_certificate(certificate, key, name, "-CA", str(CA), "-CAkey", str(CA_KEY))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
    return context


def authority() -> bytes:
    if not CA.exists():
        make_certificate(CA, CA_KEY, "a sidecar that stands in")
    return CA.read_bytes()


def make_certificate(certificate: Path, key: Path, name: str, *more: str) -> None:
    about = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv = ["openssl", "req", "-x509", *kind, *about, *more, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True)


async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    try:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.write(REFUSED)
        await writer.drain()
        return
    writer.write(CONNECTED)
    await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer, CUT))
    up_writer.close()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: Path | None = None) -> None:
    passed = 0
    with contextlib.suppress(OSError):
        while chunk := await reader.read(1 << 16):
            passed += len(chunk)
            if passed > CUT_BYTES and cut and cut.exists():  # noqa: ASYNC240 - a look at memory
                break
            writer.write(chunk)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--http-ingress-address", default="0.0.0.0:39001")
    options, _ = parser.parse_known_args()
    host, _, port = options.http_ingress_address.rpartition(":")
    server = await asyncio.start_server(serve, host, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
