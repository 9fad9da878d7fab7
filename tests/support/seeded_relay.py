"""A TCP relay that loses packets as a bad network does, as its users see it: by stalls and resets, drawn by a seed.

Runs as a process in the network between two hosts (`Network.divert` brings it the connections):

    python -m support.seeded_relay SEED TARGET PORT...

It listens at every port, passes everything on to the same port of TARGET, says `ready`, and on SIGTERM what it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

IP_TRANSPARENT = 19
"""Of the kernel's linux/in.h; Python has no name for it: answer for an address that is another host's."""
_CHUNK_BYTES = 1024
_STALL_BYTES, _STALL_S = (128, 512), (0.05, 0.3)
_RESET_BYTES = (1024, 3 * 1024)


class _Relay:
    def __init__(self, seed: int, target: str) -> None:
        self._seed = seed
        self._target = target
        self.counts: Counter[str] = Counter(connections=0, stalls=0, resets=0)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("sockname")[1]
        draw = random.Random(f"{self._seed} {self.counts['connections']}")
        self.counts["connections"] += 1
        try:
            there, back = await asyncio.open_connection(self._target, port)
        except OSError:
            writer.transport.abort()
            return
        left = [draw.randint(*_RESET_BYTES)]
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, back, draw, left), self._pump(there, writer, draw, left))
        for end in (writer, back):
            with contextlib.suppress(OSError):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, draw: random.Random, left: list[int]
    ) -> None:
        until_stall = draw.randint(*_STALL_BYTES)
        while chunk := await source.read(_CHUNK_BYTES):
            left[0] -= len(chunk)
            until_stall -= len(chunk)
            if left[0] <= 0:
                self.counts["resets"] += 1
                raise ConnectionResetError
            if until_stall <= 0:
                self.counts["stalls"] += 1
                until_stall = draw.randint(*_STALL_BYTES)
                await asyncio.sleep(draw.uniform(*_STALL_S))
            sink.write(chunk)
            await sink.drain()
        raise ConnectionAbortedError


async def _serve(seed: int, target: str, ports: list[int]) -> None:
    relay, end = _Relay(seed, target), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    for port in ports:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        listener.bind(("0.0.0.0", port))
        await asyncio.start_server(relay.accept, sock=listener)
    print("ready", flush=True)
    await end.wait()
    print(json.dumps(relay.counts), flush=True)
    # The connections there are end with the process.
    os._exit(0)


class SeededRelay:
    """The process.

    Args:
        prefix: Where it runs.
    """

    def __init__(self, prefix: tuple[str, ...], seed: int, target: str, ports: list[int]) -> None:
        arguments = (str(seed), target, *map(str, ports))
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "support.seeded_relay", *arguments],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def stop(self) -> dict[str, int]:
        """What it has done: connections, stalls, resets."""
        self._process.terminate()
        said, _ = self._process.communicate(timeout=30)
        counts: dict[str, int] = json.loads(said)
        return counts

    def kill(self) -> None:
        """For a test that has failed; idempotent."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), sys.argv[2], [int(port) for port in sys.argv[3:]]))
