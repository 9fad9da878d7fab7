"""A mock engine that crashes: what happens then to everybody else is what faults are tested with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

from kelp.executor.batching.batch import Chunk, Launched, ModelRunner

_LATE_S = 0.1


def die() -> None:
    """End this process as a crash does: without a word, and without anybody's clean-up.

    An accelerator's faults show some time after the launch; what the worker has said before is out by then.
    """
    time.sleep(_LATE_S)
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
