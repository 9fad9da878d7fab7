"""The fleet as it is at the moment: who is there, what routers have been told of it, what everybody has done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kelp.core.kv_events import KVEvent
from kelp.core.types import WorkerKey
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.registry.base import WorkerRecord
from kelp.sim.agenda import Agenda
from kelp.sim.fleet import FleetSpec
from kelp.sim.network import EventChannel, LossDice
from kelp.sim.result import FleetTable, Ints
from kelp.sim.routing import Routing
from kelp.sim.truth import NoiseTable, TrueSpeed
from kelp.sim.worker import SimWorker
from kelp.sim.worker_parts import RequestSink, WorkerParts


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One incarnation of a worker; `index` is its position in the fleet."""

    index: int
    record: WorkerRecord
    worker: SimWorker


class Members:
    """Incarnations by position, and the registry that routers look into.

    Attributes:
        speeds: How slow each worker is, by position; it is the same after it has left and come back.
    """

    def __init__(
        self,
        agenda: Agenda,
        fleet: FleetSpec,
        block_size: int,
        routers: Sequence[Routing],
        seeds: np.random.SeedSequence,
    ) -> None:
        noise_seed, loss_seed, *speed_seeds = seeds.spawn(2 + fleet.size)
        self._agenda = agenda
        self._fleet = fleet
        self._block_size = block_size
        self._routers = routers
        self._noise = NoiseTable(fleet.truth.noise, np.random.default_rng(noise_seed))
        self._dice = LossDice(fleet.network.events_loss, np.random.default_rng(loss_seed))
        self.speeds = [TrueSpeed(fleet.truth, np.random.default_rng(seed)) for seed in speed_seeds]
        self._incarnations: list[list[Member]] = [[] for _ in range(fleet.size)]
        self._by_key: dict[WorkerKey, Member] = {}

    def find(self, key: WorkerKey) -> Member | None:
        """The incarnation of this name, if it is there."""
        return self._by_key.get(key)

    def current(self, index: int) -> Member | None:
        """Who is at this position now, if anybody."""
        incarnations = self._incarnations[index]
        return self.find(incarnations[-1].record.key) if incarnations else None

    def join(self, index: int, sink: RequestSink, may_skip: bool) -> None:
        """Put a fresh worker into an empty position; routers are told by `publish`."""
        fleet = self._fleet
        record = fleet.record(index, len(self._incarnations[index]), self._block_size)
        parts = WorkerParts(
            agenda=self._agenda,
            timing=fleet.timing,
            speed=self.speeds[index],
            noise=self._noise,
            num_blocks=fleet.num_blocks,
            limits=SchedulerLimits(fleet.max_step_tokens, fleet.max_running, enable_prefix_cache=True),
            may_skip=may_skip,
        )
        member = Member(index, record, SimWorker(parts, sink, self._events_sink(record.key)))
        self._incarnations[index].append(member)
        self._by_key[record.key] = member

    def leave(self, member: Member) -> None:
        """Take a worker out; routers are told by `publish`."""
        member.worker.leave()
        del self._by_key[member.record.key]

    def publish(self, _: object = None) -> None:
        """Tell the routers who is there."""
        records = [member.record for member in self._by_key.values()]
        for router in self._routers:
            router.set_workers(records)

    def totals(self) -> FleetTable:
        """What all incarnations have done, by position."""
        by_position = [[member.worker for member in members] for members in self._incarnations]
        return FleetTable(
            busy_s=np.array([sum(worker.totals.busy_s for worker in workers) for workers in by_position], np.float64),
            num_steps=_sums(by_position, lambda worker: worker.totals.num_steps),
            num_requests=_sums(by_position, lambda worker: worker.totals.num_requests),
            num_prompt_tokens=_sums(by_position, lambda worker: worker.totals.num_prompt_tokens),
            num_cached_tokens=_sums(by_position, lambda worker: worker.totals.num_cached_tokens),
            num_preemptions=_sums(by_position, lambda worker: worker.num_preemptions),
            speed=np.array([speed.bias for speed in self.speeds]),
        )

    def _events_sink(self, key: WorkerKey) -> Callable[[list[KVEvent]], None]:
        channels = [
            EventChannel(self._agenda, self._fleet.network, self._dice, partial(router.apply, key))
            for router in self._routers
        ]

        def send(events: list[KVEvent]) -> None:
            for channel in channels:
                channel.send(events)

        return send


def _sums(by_position: list[list[SimWorker]], count: Callable[[SimWorker], int]) -> Ints:
    return np.array([sum(count(worker) for worker in workers) for workers in by_position], np.int64)
