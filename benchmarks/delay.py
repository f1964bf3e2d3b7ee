"""A TCP proxy that delivers everything some time later, as a network does: `with delayed(address, 0.02) as uri:`.

It runs in a process of its own, so that its work is not taken for the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

_BYTES_AT_ONCE = 1 << 20
_MOST_BYTES_UNDER_WAY = 64 << 20  # of one direction of one connection: as good as any


@contextlib.contextmanager
def delayed(address: str, seconds: float) -> Iterator[str]:
    """The uri of a proxy before `address` ("host:port") that holds each byte back for so long, in both directions."""
    command = [sys.executable, "-m", "benchmarks.delay", address, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


async def _deliver(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    room = asyncio.Semaphore(_MOST_BYTES_UNDER_WAY // _BYTES_AT_ONCE)

    async def send() -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(due - loop.time(), 0.0))
            if not data:
                break
            writer.write(data)
            await writer.drain()
            room.release()

    sending = asyncio.create_task(send())
    try:
        while data := await reader.read(_BYTES_AT_ONCE):
            await room.acquire()
            under_way.put_nowait((loop.time() + seconds, data))
        under_way.put_nowait((loop.time() + seconds, b""))
        await sending
    except ConnectionError:
        sending.cancel()
    finally:
        writer.close()


async def _serve(address: str, seconds: float) -> None:
    host, _, port = address.rpartition(":")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(
            _deliver(reader, their_writer, seconds), _deliver(their_reader, writer, seconds), return_exceptions=True
        )

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=_BYTES_AT_ONCE)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(sys.argv[1], float(sys.argv[2])))
