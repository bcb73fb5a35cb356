"""Two connections made one: what process 1 of a sandbox and the egress proxy both do. Standard library only."""

from __future__ import annotations

import asyncio

CHUNK_BYTES = 1 << 16

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def join(one: Connection, other: Connection) -> None:
    """Passes bytes between two connections, both ways, until both directions have ended or one has broken."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()

    pumps = [asyncio.ensure_future(pump(one[0], other[1])), asyncio.ensure_future(pump(other[0], one[1]))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in pumps:
            task.cancel()
        one[1].close()
        other[1].close()
        await asyncio.gather(*pumps, return_exceptions=True)
