"""Stands in for the networking sidecar that `wrangler dev` puts beside each container; that is in a registry.

It does the one half that local requests need: connections from workerd to a port of the container, whose network it
shares. The other half, what a container sends out through the Worker, it does not do, and says so in its log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

CUT = Path("/cut")  # while a test has this file here, a connection ends once the container has sent so much in it
CUT_BYTES = 1 << 20
REFUSED = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"
CONNECTED = b"HTTP/1.1 200 OK\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
        method, target, _ = head.split("\r\n")[0].split(" ", 2)
        if method == "CONNECT":
            await tunnel(reader, writer, int(target.rpartition(":")[2]))
        else:  # how egress is to be treated
            sys.stdout.write(f"not done here: {method} {target}\n")
            writer.write(EMPTY)
            await writer.drain()
    writer.close()


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
