"""How KV events get from a worker to a router: late, in order, and each of them once, even if messages are lost.

That is what `kv.events` makes of a lossy socket: a gap in the numbers shows with the next message, and what was
missed is asked for again while later messages wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kelp.core.kv_events import BlocksRemoved, BlocksStored, KVEvent
from kelp.sim.agenda import Agenda
from kelp.sim.fleet import NetworkSpec

_NUM_DRAWS = 1024


class LossDice:
    """Which messages are lost; one for all channels."""

    def __init__(self, share: float, generator: np.random.Generator) -> None:
        self._share = share
        self._generator = generator
        self._draws: list[float] = []

    def is_lost(self) -> bool:
        """Whether the next message is."""
        if not self._share:
            return False
        if not self._draws:
            self._draws = self._generator.random(_NUM_DRAWS).tolist()
        return self._draws.pop() < self._share


class EventChannel:
    """Messages of one worker to one router."""

    def __init__(
        self, agenda: Agenda, spec: NetworkSpec, dice: LossDice, deliver: Callable[[Sequence[KVEvent]], None]
    ) -> None:
        self._agenda = agenda
        self._spec = spec
        self._dice = dice
        self._deliver = deliver
        self._missed: list[KVEvent] = []
        self._ready_s = 0.0

    def send(self, events: Sequence[KVEvent]) -> None:
        """Send one message."""
        if self._dice.is_lost():
            self._missed += events
            return
        arrival_s = self._agenda.now_s + self._spec.events_delay_s
        if self._missed:
            events, self._missed = [*self._missed, *events], []
            arrival_s += self._spec.replay_s
        self._ready_s = max(self._ready_s, arrival_s)
        self._agenda.at(self._ready_s, self._deliver, events)


def merged(events: Iterable[KVEvent]) -> list[KVEvent]:
    """The same changes in fewer events: chains stored in one go, and removals in one go, become one each."""
    result: list[KVEvent] = []
    run: list[BlocksStored | BlocksRemoved] = []
    for event in events:
        assert isinstance(event, (BlocksStored, BlocksRemoved))
        if run and not _goes_on(run[-1], event):
            result.append(_as_one(run))
            run = []
        run.append(event)
    if run:
        result.append(_as_one(run))
    return result


def _goes_on(last: BlocksStored | BlocksRemoved, event: BlocksStored | BlocksRemoved) -> bool:
    if isinstance(event, BlocksRemoved):
        return isinstance(last, BlocksRemoved) and last.tier is event.tier
    return isinstance(last, BlocksStored) and last.tier is event.tier and event.parent == last.hashes[-1]


def _as_one(run: Sequence[BlocksStored | BlocksRemoved]) -> KVEvent:
    first = run[0]
    if len(run) == 1:
        return first
    hashes = tuple([sequence_hash for event in run for sequence_hash in event.hashes])
    if isinstance(first, BlocksStored):
        return BlocksStored(hashes, first.parent, first.tier)
    return BlocksRemoved(hashes, first.tier)
