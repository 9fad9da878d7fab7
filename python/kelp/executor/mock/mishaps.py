"""What befalls a mock engine that computes a certain token: what happens then to everybody else is what is tested."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

from kelp.executor.batching.batch import Chunk, Launched, ModelRunner


def die() -> None:
    """End this process as a crash does: without a word, and without anybody's clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


class Hang:
    """Stays in the step for a time, once: a device that recovers."""

    def __init__(self, hang_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._hang_s = hang_s
        self._sleep = sleep
        self._is_over = False

    def __call__(self) -> None:
        """Hang, the first time."""
        if not self._is_over:
            self._is_over = True
            self._sleep(self._hang_s)


class MishapRunner:
    """Computes what another runner does, but for a certain token, before which something happens.

    See `batch.ModelRunner`.
    """

    def __init__(self, runner: ModelRunner, token_id: int, happen: Callable[[], None]) -> None:
        self._runner = runner
        self._token_id = token_id
        self._happen = happen

    def launch(self, chunks: Sequence[Chunk]) -> Launched:
        """See `batch.ModelRunner`."""
        if _compute(chunks, self._token_id):
            self._happen()
        return self._runner.launch(chunks)


class BreakableRunner:
    """Computes what another runner does, and fails for ever once it gets a certain token: a device that has faulted.

    See `batch.ModelRunner`.
    """

    def __init__(self, runner: ModelRunner, token_id: int) -> None:
        self._runner = runner
        self._token_id = token_id
        self._is_broken = False

    def launch(self, chunks: Sequence[Chunk]) -> Launched:
        """See `batch.ModelRunner`.

        Raises:
            RuntimeError: It is broken.
        """
        self._is_broken = self._is_broken or _compute(chunks, self._token_id)
        if self._is_broken:
            raise RuntimeError("the device has faulted")
        return self._runner.launch(chunks)


def _compute(chunks: Sequence[Chunk], token_id: int) -> bool:
    return any((chunk.tokens == token_id).any() for chunk in chunks)
