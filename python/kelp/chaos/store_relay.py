"""A TCP relay in front of an object store: gone, silent, slow, refusing or lying for a while, and whole again.

It knows only as much of HTTP as it takes to refuse, and to tell the bytes of an object from heads and listings.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

from kelp.chaos.faults import FaultKind

_HOST = "127.0.0.1"
_CHUNK_BYTES = 64 * 1024
_SLOW_CHUNK_BYTES = 2048
_SLOW_PAUSE_S = 0.05
_SILENT_POLL_S = 0.05
_HEAD_START, _HEAD_END = b"HTTP/1.", b"\r\n\r\n"
_LISTING = b"xml"
_REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class StoreRelay:
    """Passes everything on until told otherwise, from a thread of its own.

    Args:
        host: Of the store.
        port: Of the store.
        own_port: Where to listen, on this host.

    Attributes:
        fault: What it suffers from now.
        num_hit: Pieces and connections that a fault has met,
        num_spoiled: and those of them that went on with other bytes of an object.
    """

    def __init__(self, host: str, port: int, own_port: int) -> None:
        self._target = (host, port)
        self._port = own_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kelp-chaos-store", daemon=True)
        self.fault: FaultKind | None = None
        self._server: asyncio.Server | None = None
        self._streams: set[asyncio.StreamWriter] = set()
        self._in_turn = asyncio.Lock()
        self.num_hit = 0
        self.num_spoiled = 0

    @property
    def endpoint(self) -> str:
        """What clients are told."""
        return f"http://{_HOST}:{self._port}"

    def start(self) -> None:
        """Begin.

        Raises:
            OSError: The port is taken.
        """
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def close(self) -> None:
        """Drop all connections and stop; idempotent."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def suffer(self, fault: FaultKind, seconds: float) -> None:
        """One of the store's faults for so long, once an earlier one has ended; from any event loop."""
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._suffer(fault, seconds), self._loop))

    async def _suffer(self, fault: FaultKind, seconds: float) -> None:
        async with self._in_turn:
            self.fault = fault
            try:
                if fault is FaultKind.STORE_GONE:
                    await self._drop()
                await asyncio.sleep(seconds)
            finally:
                self.fault = None
                if self._server is None:
                    await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, _HOST, self._port)

    async def _drop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.num_hit += len(self._streams)
        for writer in self._streams:
            writer.close()

    async def _end(self) -> None:
        await self._drop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A cancelled connection has ended, and asyncio would complain of it.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            from_store, to_store = await asyncio.open_connection(*self._target)
            self._streams |= {writer, to_store}
            both = [
                asyncio.ensure_future(self._pass(reader, to_store, writer)),
                asyncio.ensure_future(self._pass(from_store, writer, None)),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
                to_store.close()
                self._streams -= {writer, to_store}
        writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asking: asyncio.StreamWriter | None
    ) -> None:
        """Relay one direction to its end.

        Args:
            reader: Where it comes from.
            writer: Where it goes.
            asking: Whoever asks, in the direction of the requests.
        """
        is_object = False
        with contextlib.suppress(OSError):
            while chunk := await reader.read(self._chunk_bytes):
                is_object, num_body = object_bytes(chunk, is_object)
                is_spoiled = self.fault is FaultKind.STORE_CORRUPT and asking is None and num_body > 0
                self.num_spoiled += is_spoiled
                self.num_hit += is_spoiled or self.fault not in (None, FaultKind.STORE_CORRUPT)
                while self.fault is FaultKind.STORE_SILENT:
                    await asyncio.sleep(_SILENT_POLL_S)
                if self.fault is FaultKind.STORE_REFUSING:
                    if asking is not None:
                        asking.write(_REFUSAL)
                        await asking.drain()
                    return
                if self.fault is FaultKind.STORE_SLOW:
                    await asyncio.sleep(_SLOW_PAUSE_S)
                writer.write(spoiled(chunk) if is_spoiled else chunk)
                await writer.drain()

    @property
    def _chunk_bytes(self) -> int:
        return _SLOW_CHUNK_BYTES if self.fault is FaultKind.STORE_SLOW else _CHUNK_BYTES


def object_bytes(chunk: bytes, is_object: bool) -> tuple[bool, int]:
    """Whether an answer is an object, not a listing or an error, and how many of a chunk's bytes are the object's.

    Args:
        chunk: Of an answer.
        is_object: Whether the chunk before it was of an object.
    """
    if not chunk.startswith(_HEAD_START):
        return is_object, len(chunk) if is_object else 0
    head, _, body = chunk.partition(_HEAD_END)
    is_object = _LISTING not in head.lower()
    return is_object, len(body) if is_object else 0


def spoiled(chunk: bytes) -> bytes:
    """The same with its last byte turned over."""
    return chunk[:-1] + bytes([chunk[-1] ^ 0xFF])
