"""The reference that is no engine: how fast this machine reads memory, and what that allows.

A step of decoding reads every weight once, whatever the batch: with nothing else in the way, as many steps fit into a
second as the weights fit into the bandwidth.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from perf.executor.engines import THREADS
from perf.stats import median

_NUM_BYTES = 512 * 2**20
_NUM_READS = 7


class Bandwidth:
    """Reads half a gigabyte again and again; close it."""

    def __init__(self) -> None:
        self._parts = np.array_split(np.ones(_NUM_BYTES // 4, dtype=np.float32), THREADS)
        self._threads = ThreadPoolExecutor(THREADS)

    def bytes_per_s(self) -> float:
        """Median of a few reads by all threads together; takes a tenth of a second."""
        return median([_NUM_BYTES / self._read_s() for _ in range(_NUM_READS)])

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _read_s(self) -> float:
        started_s = time.perf_counter()
        # Of what numpy offers, the dot product comes closest to the limit: two loads, no store, both from one place.
        list(self._threads.map(lambda part: np.dot(part, part), self._parts))
        return time.perf_counter() - started_s


def floor_tokens_per_s(bytes_per_s: float, weights_bytes: int, num_sequences: int) -> float:
    """Tokens per second of decoding if reading the weights were all there is to it."""
    return bytes_per_s / weights_bytes * num_sequences
