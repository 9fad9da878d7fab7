"""`kelp drain` ends whatever becomes of the worker that it drains."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kelp.client.base import WorkerAddress
from kelp.core.errors import WorkerLost
from kelp.supervisor import scale


class SilentClient:
    """Takes the place of a `GrpcWorkerClient` whose worker has died with the command: Triton never says so."""

    made: list[SilentClient] = []

    def __init__(self, _: object) -> None:
        self.is_cancelled = self.is_closed = False
        self.made.append(self)

    async def control(self, *_: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise

    async def close(self) -> None:
        self.is_closed = True


def test_a_worker_that_dies_while_it_drains_is_a_lost_worker_once_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scale, "GrpcWorkerClient", SilentClient)
    monkeypatch.setattr(scale, "_ANSWER_MARGIN_S", 0.0)
    with pytest.raises(WorkerLost, match=r"decode_1: no answer within 0 s, its process has died or hangs"):
        asyncio.run(scale._drain(WorkerAddress("127.0.0.1:1", "decode_1"), None, 0.01))
    (client,) = SilentClient.made
    assert client.is_cancelled and client.is_closed
