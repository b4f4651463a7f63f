"""A network between two programs that can be cut: then nothing gets through, and data arrives later."""

import asyncio
import random
from contextlib import suppress


class Network:
    """A proxy on the loopback to another port."""

    def __init__(self, port: int, straggle: float = 0.5) -> None:
        """After a cut, every connection takes up to ``straggle`` seconds to go on, as TCP backs off."""
        self._to = port
        self._straggle = straggle
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Network":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        try:
            await asyncio.gather(self._carry(reader, back), self._carry(there, writer))
        finally:
            writer.transport.abort()
            back.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry data to the end, even if the sender has gone: what it sent still arrives."""
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if not self._whole.is_set():
                    await self._whole.wait()
                    await asyncio.sleep(random.uniform(0.0, self._straggle))
                writer.write(data)
                await writer.drain()
        writer.close()
