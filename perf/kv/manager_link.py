"""A KV block manager in a process of its own, without Triton: batches over a Unix socket, KV over NIXL.

As a program (`python -m perf.kv.manager_link SOCKET key=value ...`) it is the manager.
"""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from kelp.build.kv_manager import build_kv_manager
from kelp.client.base import WorkerAddress
from kelp.core.config import load_config
from kelp.core.errors import DeadlineExceeded, WorkerLost
from kelp.core.kv_manager_messages import Operation, Result, decode_results, encode_batch
from kelp.core.metrics import Metrics
from perf.machine import REPOSITORY
from perf.suite import BenchError

_FRAME = struct.Struct("<II")
"""Number of the call, bytes of the batch."""
_START_S = 60.0
_STOP_S = 30.0
_POLL_S = 0.1


class SocketManagerClient:
    """Implements `client.base.KvManagerClient` for one manager."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0
        self._reading = asyncio.ensure_future(self._read_forever())

    async def call(self, address: WorkerAddress, operations: Sequence[Operation], timeout_s: float) -> list[Result]:
        """See `KvManagerClient`."""
        self._number += 1
        answer = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        raw = encode_batch(operations)
        self._writer.write(_FRAME.pack(self._number, len(raw)) + raw)
        try:
            return decode_results(await asyncio.wait_for(answer, timeout_s))
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"manager: no answer within {timeout_s} s") from None

    async def ask(self, operation: Operation, timeout_s: float = 60.0) -> Result:
        """One operation."""
        return (await self.call(WorkerAddress("", ""), [operation], timeout_s))[0]

    async def close(self) -> None:
        """See `KvManagerClient`."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _read_forever(self) -> None:
        try:
            while True:
                number, length = _FRAME.unpack(await self._reader.readexactly(_FRAME.size))
                answer = self._waiting.pop(number)
                raw = await self._reader.readexactly(length)
                if not answer.done():
                    answer.set_result(raw)
        except (asyncio.IncompleteReadError, OSError):
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(WorkerLost("manager: the connection was closed"))


@asynccontextmanager
async def running(work: Path, settings: dict[str, object]) -> AsyncIterator[SocketManagerClient]:
    """A manager with these settings while the block runs.

    Raises:
        BenchError: It does not start.
    """
    path = work / "manager.sock"
    path.unlink(missing_ok=True)
    arguments = [f"{name}={value}" for name, value in settings.items()]
    with (work / "manager.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "perf.kv.manager_link", str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
        )
    try:
        client = SocketManagerClient(*await _connect(process, path, work / "manager.log"))
        try:
            yield client
        finally:
            await client.close()
    finally:
        await asyncio.to_thread(_stop, process)


async def _connect(
    process: subprocess.Popen[bytes], path: Path, log: Path
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(int(_START_S / _POLL_S)):
        if process.poll() is not None:
            break
        with suppress(OSError):
            return await asyncio.open_unix_connection(str(path), limit=2**24)
        await asyncio.sleep(_POLL_S)
    last = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    raise BenchError(f"KV block manager: does not start: {last[-1][:300]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def _serve(path: str, parameters: dict[str, str]) -> None:
    manager = build_kv_manager(load_config(parameters), "bench-manager", Metrics())

    async def answer(number: int, raw: bytes, writer: asyncio.StreamWriter) -> None:
        results = await manager.handle(raw)
        writer.write(_FRAME.pack(number, len(results)) + results)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                number, length = _FRAME.unpack(await reader.readexactly(_FRAME.size))
                task = asyncio.ensure_future(answer(number, await reader.readexactly(length), writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    server = await asyncio.start_unix_server(converse, path, limit=2**24)
    # Ends with whoever started it, however that ends.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()
    await manager.stop()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], dict(argument.split("=", 1) for argument in sys.argv[2:])))
