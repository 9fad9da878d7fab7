"""Requests that may have killed their worker: told apart from those that only ran beside, and refused.

When a worker's process ends, each request that it ran is a suspect until another worker has brought it clearly past the
point where it stood. Of the suspects on a worker that ends too, the one that has outlived most workers is the culprit;
where there is no such one, all go on, and are then placed where no other suspect is. So the culprit is found sooner or
later, and nobody else is refused. That a worker has ended, and not the way to it, is for the registry to confirm; that
it had the request at all, for the worker itself, which acknowledges suspects.

Most requests that kill do so before their first token. So those that stood there are kept apart from all other suspects
from the first death on, for a while, and those that were under way keep clear of them without waiting.

Belongs to one event loop. Knows neither tokens nor the client.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kelp.core.errors import PoisonRequest
from kelp.core.types import WorkerKey
from kelp.router.placement import Placement, WorkersView, key_of

_PAST_TOKENS = 8
"""New tokens after which a request is past the point where its last worker ended: what a step or two sample at once."""
_KNOWN_DEATHS = 256
_CONFIRM_S = 0.1
_CONFIRM_TIMEOUT_S = 20.0
"""A dead worker's record has expired, or is its successor's, long before."""


@dataclass(eq=False, slots=True)
class Suspicion:
    """What speaks against one request; all its sequences share it.

    Attributes:
        deaths: Workers that ended under it since it last got on.
        had_begun: The latest of them had said tokens of it.
    """

    deaths: set[WorkerKey] = field(default_factory=set)
    had_begun: bool = False

    @property
    def is_grave(self) -> bool:
        """Whether other suspects are better off elsewhere."""
        return len(self.deaths) > 1 or bool(self.deaths) and not self.had_begun


class Stay:
    """A sequence on the workers of one placement; whoever got one must `end` it."""

    def __init__(self, suspects: Suspects, suspicion: Suspicion, workers: frozenset[WorkerKey]) -> None:
        self._suspects = suspects
        self.suspicion = suspicion
        self.workers = workers
        self._num_tokens = 0
        self._is_acknowledged = bool(suspicion.deaths)

    @property
    def is_watched(self) -> bool:
        """Whether `heard` wants to know of tokens."""
        return bool(self.suspicion.deaths)

    def heard(self, num_tokens: int) -> None:
        """A worker has sent tokens."""
        self._num_tokens += num_tokens
        if self._num_tokens >= _PAST_TOKENS and self.suspicion.deaths:
            self.suspicion.deaths.clear()
            self._suspects.wake()

    async def died(self, worker: WorkerKey, num_tokens: int, was_heard: bool) -> None:
        """One of the workers has ended.

        Args:
            worker: Which one.
            num_tokens: What all of them had said since the stay began.
            was_heard: Whether that one had said anything; suspects are acknowledged.

        Raises:
            PoisonRequest: This request is why; the registry says that all those workers have indeed ended.
        """
        if worker in self.suspicion.deaths or (self._is_acknowledged and not was_heard):
            return
        is_culprit = self._suspects.culprit_at(worker) is self.suspicion
        if num_tokens >= _PAST_TOKENS:
            self.suspicion.deaths.clear()
        self.suspicion.deaths.add(worker)
        self.suspicion.had_begun = num_tokens > 0
        if is_culprit and await self._suspects.are_dead(self.suspicion.deaths):
            names = ", ".join(sorted(worker_id for worker_id, _ in self.suspicion.deaths))
            raise PoisonRequest(
                f"{len(self.suspicion.deaths)} workers ended while they ran this request ({names}): not tried again"
            )

    def end(self) -> None:
        """Nothing runs there any more; idempotent."""
        self._suspects.leave(self)


class Suspects:
    """The suspects of one router.

    Args:
        view: Confirms deaths.
        wait_s: How long a request waits for a worker of its own after a single death.
    """

    def __init__(self, view: WorkersView, wait_s: float) -> None:
        self._view = view
        self._wait_s = wait_s
        self._stays: set[Stay] = set()
        self._culprits: dict[WorkerKey, Suspicion | None] = {}
        self._change = asyncio.Event()

    def stay(self, suspicion: Suspicion, placement: Placement) -> Stay:
        """A sequence begins on the workers of its placement."""
        stay = Stay(self, suspicion, _workers(placement))
        if stay.is_watched:
            self._stays.add(stay)
        return stay

    async def place(
        self, suspicion: Suspicion, find: Callable[[frozenset[WorkerKey]], Awaitable[Placement]]
    ) -> Placement:
        """Find a place; for a suspect, one without other suspects.

        After several deaths it waits for that as long as it takes, after one that came before its first token a while,
        and after any other not at all.

        Args:
            suspicion: Of the request.
            find: Gets workers to avoid, and returns a reserved place, on one of them if need be.
        """
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._patience_s(suspicion)
        while True:
            placement = await find(self._to_avoid(suspicion))
            avoided = self._to_avoid(suspicion)
            if not avoided or not _workers(placement) & avoided or loop.time() >= give_up_s:
                return placement
            placement.end(is_completed=False)
            await self._changed_by(give_up_s)

    def culprit_at(self, worker: WorkerKey) -> Suspicion | None:
        """The one of the suspects on a worker that has ended which has outlived most; None if there is no such one.

        The first answer stands: the suspects leave one after the other.
        """
        if worker not in self._culprits:
            here = {stay.suspicion for stay in self._stays if worker in stay.workers and stay.is_watched}
            most = max((len(suspicion.deaths) for suspicion in here), default=0)
            worst = [suspicion for suspicion in here if len(suspicion.deaths) == most]
            self._culprits[worker] = worst[0] if len(worst) == 1 else None
            while len(self._culprits) > _KNOWN_DEATHS:
                del self._culprits[next(iter(self._culprits))]
        return self._culprits[worker]

    async def are_dead(self, workers: set[WorkerKey]) -> bool:
        """Whether the registry says so; waits as long as it takes a record to expire. Drops those that live."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + _CONFIRM_TIMEOUT_S
        while alive := {worker for worker in workers if self._view.is_alive(*worker)}:
            if loop.time() >= give_up_s:
                workers -= alive
                return False
            await asyncio.sleep(_CONFIRM_S)
        return True

    def leave(self, stay: Stay) -> None:
        """See `Stay.end`."""
        if stay in self._stays:
            self._stays.discard(stay)
            self.wake()

    def wake(self) -> None:
        """Let those look again that wait for a worker without suspects."""
        self._change.set()
        self._change = asyncio.Event()

    async def _changed_by(self, time_s: float) -> None:
        timer = None if math.isinf(time_s) else asyncio.get_running_loop().call_at(time_s, self.wake)
        try:
            await self._change.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _patience_s(self, suspicion: Suspicion) -> float:
        if len(suspicion.deaths) > 1:
            return math.inf
        return self._wait_s if suspicion.is_grave else 0.0

    def _to_avoid(self, suspicion: Suspicion) -> frozenset[WorkerKey]:
        if not suspicion.deaths:
            return frozenset()
        others = (stay for stay in self._stays if stay.suspicion is not suspicion and stay.is_watched)
        near = (stay for stay in others if suspicion.is_grave or stay.suspicion.is_grave)
        return frozenset(worker for stay in near for worker in stay.workers)


def _workers(placement: Placement) -> frozenset[WorkerKey]:
    return frozenset(key_of(record) for record in (placement.prefill, placement.decode) if record is not None)
