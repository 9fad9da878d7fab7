"""Bandwidth of `kelp.transport.nixl` READs between two processes, in turn with numpy copies of the same bytes.

The module is also the reading process, which starts the owning one: both end with it, and whatever UCX does to a
process that loaded it stays out of the suite.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from kelp.core.types import BlockId
from kelp.transport.base import Region, TransferState
from perf.machine import REPOSITORY
from perf.stats import Pair
from perf.suite import BenchError

_TIMEOUT_S = 300.0
_POLL_S = 0.00005
_SAMPLE_S = 0.1
"""Each side of a pair is repeated for at least this long."""

_OWNERS_BYTE = 7


@dataclass(frozen=True, slots=True)
class ReadSpec:
    """What to measure."""

    block_bytes: int
    counts: tuple[int, ...]
    num_pairs: int


def measure_reads(spec: ReadSpec) -> dict[int, list[Pair]]:
    """GB/s of READ and of memcpy, as pairs by number of blocks.

    Raises:
        BenchError: The processes failed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "perf.serving.nixl_read"],
            input=json.dumps(dataclasses.asdict(spec)),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"nixl: silent for {_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BenchError(f"nixl: exit status {done.returncode}: {reason[:300]}")
    pairs = json.loads(done.stdout.splitlines()[-1])
    return {int(count): [Pair(value, reference) for value, reference in found] for count, found in pairs.items()}


def _pool(spec: ReadSpec, fill: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Region]:
    blocks = np.full((max(spec.counts), spec.block_bytes), fill, dtype=np.uint8)
    return blocks, Region(blocks.ctypes.data, len(blocks), spec.block_bytes, "cpu")


def _own(spec: ReadSpec, pipe: Connection) -> None:
    """The owning process: registers a pool, says where it is, and waits for the end."""
    from kelp.transport.nixl import NixlAgent

    blocks, region = _pool(spec, fill=_OWNERS_BYTE)
    agent = NixlAgent("bench-owner")
    agent.register(region, blocks)
    pipe.send((agent.metadata(), region.base_address))
    pipe.recv()
    agent.close()


def _gb_per_s(move: Callable[[], None], num_bytes: int) -> float:
    started_s = time.perf_counter()
    repeats = 0
    while (elapsed_s := time.perf_counter() - started_s) < _SAMPLE_S:
        move()
        repeats += 1
    return repeats * num_bytes / elapsed_s / 1e9


def _read_from_owner(spec: ReadSpec, pipe: Connection) -> dict[int, list[tuple[float, float]]]:
    from kelp.transport.nixl import NixlAgent

    target, region = _pool(spec, fill=0)
    source, _ = _pool(spec, fill=1)
    agent = NixlAgent("bench-reader")
    agent.register(region, target)
    metadata, base_address = pipe.recv()
    peer = agent.connect(metadata, Region(base_address, region.num_blocks, region.block_bytes, "cpu"))

    def read(count: int) -> None:
        block_ids = [BlockId(number) for number in range(count)]
        transfer = agent.start_read(peer, block_ids, block_ids)
        while transfer.poll() is TransferState.RUNNING:
            time.sleep(_POLL_S)
        transfer.release()

    def copy(count: int) -> None:
        np.copyto(target[:count], source[:count])

    found: dict[int, list[tuple[float, float]]] = {count: [] for count in spec.counts}
    for count, pairs in found.items():
        copy(count)
        read(count)
        if not (target[:count] == _OWNERS_BYTE).all():
            sys.exit(f"a READ of {count} blocks brought other bytes than the owner's")
        num_bytes = count * spec.block_bytes
        for _ in range(spec.num_pairs):
            pairs.append((_gb_per_s(partial(read, count), num_bytes), _gb_per_s(partial(copy, count), num_bytes)))
    agent.close()
    return found


def main() -> None:
    fields = json.load(sys.stdin)
    spec = ReadSpec(fields["block_bytes"], tuple(fields["counts"]), fields["num_pairs"])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=_own, args=(spec, theirs), daemon=True)
    owner.start()
    # Without this copy of the other end, a dead owner ends `recv` instead of leaving it waiting.
    theirs.close()
    found = _read_from_owner(spec, ours)
    ours.send("end")
    owner.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
