"""Speak TLS in front of a program that cannot: Debian's Orthanc ends with a fault where its own HTTPS is on.

Run as: python tls_relay.py PORT UPSTREAM_PORT CERTIFICATE KEY. It says "up" when it listens.
"""

from __future__ import annotations

import asyncio
import ssl
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()


async def main(port: int, upstream: int, certificate: str, key: str) -> None:
    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection("127.0.0.1", upstream)
        try:
            ways = [asyncio.ensure_future(pump(reader, there)), asyncio.ensure_future(pump(back, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            there.close()
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(carry, "127.0.0.1", port, ssl=context)
    print("up", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))
