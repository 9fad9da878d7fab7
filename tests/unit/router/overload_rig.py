"""The router's own admission before the simulator's workers, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from router_rig import FakeWorkers, open_desk

from kelp.client.base import WorkerOutput
from kelp.core.config_replicas import QueueConfig
from kelp.core.errors import CapacityError
from kelp.core.messages import Progress, RequestTimings
from kelp.core.types import Role, WorkerKey
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.router.decision.request import RoutingRequest
from kelp.router.placement import Placement
from kelp.sim.fleet import FleetSpec, TruthSpec
from kelp.sim.sequence import SimSequence, Task
from kelp.sim.truth import NoiseTable, TrueSpeed
from kelp.sim.worker import SimWorker
from kelp.sim.worker_parts import WorkerParts
from kelp.timing.model import TimingModel
from support.virtual_time import run_in_virtual_time

MAX_RUNNING = 8
STEP_TOKENS = 512
NUM_BLOCKS = 4096
BLOCK_SIZE = 16
PLAIN = TruthSpec(bias=0.0, noise=0.05, drift=0.0)


class LoopAgenda:
    """The loop's time as the simulator's agenda."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    @property
    def now_s(self) -> float:
        return self._loop.time()

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ns(self) -> int:
        return int(self.now_s * 1e9)

    def at(self, due_s: float, action: Callable[[Any], None], subject: Any) -> None:
        self._loop.call_at(due_s, action, subject)


@dataclass(frozen=True)
class Asked:
    """One request; `deadline_s` is its time from arrival."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    deadline_s: float
    priority: int = 0
    tenant: str = ""


@dataclass(eq=False)
class Told:
    """What became of it."""

    asked: Asked
    placement: Placement | None = None
    submitted_ns: int = 0
    refusal: str = ""
    first_s: float = float("inf")
    end_s: float = float("inf")
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ttft_s(self) -> float:
        """From its arrival to its first token."""
        return self.first_s - self.asked.at_s

    @property
    def is_good(self) -> bool:
        """Answered to the end, in time."""
        return self.end_s <= self.asked.at_s + self.asked.deadline_s


class _Fleet:
    """Aggregated workers behind one router; a request that is late runs on, which is worse than what engines do."""

    def __init__(self, num_workers: int, queue: QueueConfig) -> None:
        self.agenda = LoopAgenda()
        spec = FleetSpec(num_workers, num_blocks=NUM_BLOCKS, max_step_tokens=STEP_TOKENS, max_running=MAX_RUNNING)
        records = [spec.record(number, 0, BLOCK_SIZE) for number in range(num_workers)]
        rng = np.random.default_rng(0)
        self.workers: dict[WorkerKey, SimWorker] = {}
        for each in records:
            parts = WorkerParts(
                agenda=self.agenda,  # type: ignore[arg-type]
                timing=TimingModel(),
                speed=TrueSpeed(PLAIN, rng),
                noise=NoiseTable(PLAIN.noise, rng),
                num_blocks=NUM_BLOCKS,
                limits=SchedulerLimits(STEP_TOKENS, MAX_RUNNING, enable_prefix_cache=True),
            )
            self.workers[each.key] = SimWorker(parts, self)
        self.desk = open_desk(FakeWorkers(*records), clock=self.agenda, queue=queue, policy="kelp")

    async def serve(self, number: int, asked: Asked) -> Told:
        told = Told(asked)
        await asyncio.sleep(asked.at_s)
        request = RoutingRequest(
            num_prompt_tokens=asked.num_prompt_tokens,
            block_hashes=(),
            request_id=str(number),
            max_tokens=1024,
            priority=asked.priority,
            deadline_s=asked.at_s + asked.deadline_s,
            tenant=asked.tenant,
        )
        try:
            told.placement = await self.desk.placer.place(request)
        except CapacityError as error:
            told.refusal = error.text
            return told
        told.submitted_ns = self.agenda.wall_ns()
        told.placement.sent()
        task = Task(Role.AGGREGATED, asked.num_prompt_tokens, asked.num_output_tokens, (), BLOCK_SIZE)
        self.workers[told.placement.decode.key].submit(task, told)
        await told.over.wait()
        return told

    def on_first_token(self, sequence: SimSequence) -> None:
        told: Told = sequence.owner  # type: ignore[assignment]
        told.first_s = self.agenda.now_s
        timings = RequestTimings(
            arrival_ns=told.submitted_ns,
            first_scheduled_ns=int(sequence.first_scheduled_s * 1e9),
            first_token_ns=self.agenda.wall_ns(),
        )
        self._heard(sequence, 1, Progress(timings=timings))

    def on_tokens(self, sequence: SimSequence, num_tokens: int) -> None:
        self._heard(sequence, num_tokens, None)

    def on_ended(self, sequence: SimSequence) -> None:
        told: Told = sequence.owner  # type: ignore[assignment]
        rest = (told.asked.num_output_tokens - 1) % 128
        if rest:
            self._heard(sequence, rest, None)
        assert told.placement is not None
        told.end_s = self.agenda.now_s
        told.placement.end(is_completed=True)
        told.over.set()

    def _heard(self, sequence: SimSequence, num_tokens: int, event: Progress | None) -> None:
        told: Told = sequence.owner  # type: ignore[assignment]
        assert told.placement is not None
        told.placement.heard(WorkerOutput((1,) * num_tokens, (0.0,) * num_tokens, event))


def play(asked: list[Asked], num_workers: int = 2, **queue: object) -> list[Told]:
    """What becomes of the requests; `queue` overrides `QueueConfig`."""

    async def scene() -> list[Told]:
        fleet = _Fleet(num_workers, QueueConfig.model_validate(queue))
        return list(await asyncio.gather(*(fleet.serve(*each) for each in enumerate(asked))))

    return run_in_virtual_time(scene())


def arrivals(per_s: float, seconds: float, seed: int = 0, deadline_s: float = 6.0, **fields: Any) -> list[Asked]:
    """A random stream of requests with answers of very different lengths."""
    rng = np.random.default_rng(seed)
    now_s, asked = 0.0, []
    while (now_s := now_s + float(rng.exponential(1.0 / per_s))) < seconds:
        num_output = int(np.clip(rng.lognormal(np.log(80), 0.6), 4, 400))
        asked.append(Asked(now_s, int(rng.integers(100, 900)), num_output, deadline_s, **fields))
    return asked
