"""A mock engine that crashes: what happens then to everybody else is what faults are tested with."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

from kelp.executor.batching.batch import Chunk, Launched, ModelRunner


def die() -> None:
    """End this process as a crash does: without a word, and without anybody's clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


class FatalRunner:
    """Computes what another runner does, until a certain token is among it; see `batch.ModelRunner`."""

    def __init__(self, runner: ModelRunner, fatal_token_id: int, end: Callable[[], None] = die) -> None:
        self._runner = runner
        self._fatal_token_id = fatal_token_id
        self._end = end

    def launch(self, chunks: Sequence[Chunk]) -> Launched:
        """See `batch.ModelRunner`."""
        if any((chunk.tokens == self._fatal_token_id).any() for chunk in chunks):
            self._end()
        return self._runner.launch(chunks)
