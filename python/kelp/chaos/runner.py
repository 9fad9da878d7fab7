"""One run: start a fleet, ask it, break it by schedule, let it heal, look at what is left, stop it, look again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kelp.chaos.course import Course
from kelp.chaos.done import Done, Victimless
from kelp.chaos.faults import CLIENT_SIDE, Fault
from kelp.chaos.fleet import ServedFleet
from kelp.chaos.fleet_spec import HOST, FleetSpec
from kelp.chaos.injector import Injector
from kelp.chaos.leaks import SHARED_MEMORY, Footprint, Leak, held, left_after, left_in_life, take_footprint
from kelp.chaos.load import Answered, Load
from kelp.chaos.manager_desk import ManagerDesk
from kelp.chaos.questions import DEADLINE_S, MockReference, Questions, RecordedReference, Reference
from kelp.chaos.report import Report
from kelp.chaos.schedule import ScheduleSpec, make_schedule, spare_faults
from kelp.chaos.scrape import Increase, read_page
from kelp.client.grpc import LlmClient
from kelp.core.errors import ConfigError
from kelp.core.metrics import QUEUE_LENGTH, RETRIES
from kelp.supervisor.kv_manager import arena_folder_of
from kelp.supervisor.ports import is_free

_WATCH_S = 0.5
_HEAL_S = 120.0
_QUIET_S = 40.0
_NUM_PROBES = 4
_RECORDED_AT_ONCE = 4
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What a run is.

    Attributes:
        num_users: Clients that ask again once answered.
        pool_size: Different questions.
        deadline_s: Of requests that are to be answered.
        slack_s: A request that has not ended so long after its deadline hangs.
        chosen: Faults instead of those that the schedule draws.
    """

    schedule: ScheduleSpec
    num_users: int = 6
    pool_size: int = 200
    deadline_s: float = DEADLINE_S
    slack_s: float = 5.0
    chosen: tuple[Fault, ...] | None = None

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What happens; ConfigError for a schedule that makes no sense."""
        return make_schedule(self.schedule) if self.chosen is None else self.chosen

    @property
    def spare(self) -> Iterable[Fault]:
        """What happens where nothing else hits; nothing where the faults were chosen."""
        return spare_faults(self.schedule) if self.chosen is None else ()

    @property
    def seed(self) -> int:
        """Of everything."""
        return self.schedule.seed


class Run:
    """See the module docstring.

    Args:
        fleet: None to ask a server that is not ours.
        reference: None to take for right what is said before the first fault.
        on_answered: Told of every request that has ended.
    """

    def __init__(
        self,
        spec: RunSpec,
        endpoint: str,
        fleet: ServedFleet | None,
        reference: Reference | None,
        say: Say,
        on_answered: Callable[[Answered], None] = lambda _: None,
    ) -> None:
        self._spec = spec
        self._endpoint = endpoint
        self._fleet = fleet
        self._reference = reference
        self._say = say
        self._on_answered = on_answered
        self.seen_memory: set[str] = set()
        self._retries = Increase()

    async def play(self, faults: Sequence[Fault], options: dict[str, Any]) -> Report:
        """Ask and break for the schedule's duration, then look at what is left in the living fleet."""
        questions = Questions(self._spec.seed, self._spec.pool_size, self._spec.deadline_s)
        client = LlmClient(self._endpoint)
        load = Load(client, await self._known(client, questions), self._spec.slack_s, self._on_answered)
        injector = Injector(self._fleet, load, questions, self._spec.seed)
        watching = asyncio.ensure_future(self._watch())
        started_s = time.monotonic()
        course = Course(injector.do, self._spec.schedule.duration_s, lambda done: self._say(_line(done, started_s)))
        try:
            self._say(f"{len(faults)} faults in {self._spec.schedule.duration_s:.0f} s")
            users = load.run_users(questions, self._spec.num_users, lambda: course.is_over)
            _, done = await asyncio.gather(users, course.play(faults, self._spec.spare))
            unhealed = await self._heal()
            await load.ask_all([questions.next() for _ in range(_NUM_PROBES)])
            leaks = await self._look()
        finally:
            watching.cancel()
            await injector.close()
            await client.close()
        return Report(
            options, load.tally, round(self._retries.total), started_s, done, load.troubles, leaks, unhealed,
            ended_s=started_s + self._spec.schedule.duration_s,
        )  # fmt: skip

    async def _known(self, client: LlmClient, questions: Questions) -> Reference:
        if self._reference is not None:
            return self._reference
        self._say(f"recording {len(questions.pool)} answers of the undisturbed server")
        recorded, pool = RecordedReference(), questions.pool
        for first in range(0, len(pool), _RECORDED_AT_ONCE):
            asked = pool[first : first + _RECORDED_AT_ONCE]
            answers = await asyncio.gather(*(_ask_once(client, item.fields(item.deadline_s)) for item in asked))
            for question, tokens in zip(asked, answers, strict=True):
                recorded.record(question, tokens)
        return recorded

    async def _watch(self) -> None:
        """Remember what is mapped and counted while it is there to be seen."""
        if self._fleet is None:
            return
        page_url = f"http://{HOST}:{self._fleet.metrics_port}/metrics"
        while True:
            self.seen_memory |= (await asyncio.to_thread(footprint_of, self._fleet)).mapped
            self._retries.see(page_url, await asyncio.to_thread(read_page, page_url), RETRIES.name)
            await asyncio.sleep(_WATCH_S)

    async def _heal(self) -> list[str]:
        """Wait until every part of the fleet is back; those that are not."""
        if self._fleet is None:
            return []
        deadline_s = time.monotonic() + _HEAL_S
        while (missing := await asyncio.to_thread(self._fleet.missing)) and time.monotonic() < deadline_s:
            await asyncio.sleep(_WATCH_S)
        return missing

    async def _look(self) -> list[Leak]:
        if self._fleet is None:
            return []
        workers, deadline_s = self._fleet.worker_client(), time.monotonic() + _QUIET_S
        try:
            while True:
                names = list(self._fleet.records())
                leaks = held({name: await self._fleet.status(name, workers) for name in names})
                leaks += await asyncio.to_thread(_queued, self._fleet)
                leaks += await _held_by_manager(self._fleet)
                leaks += left_in_life(await asyncio.to_thread(footprint_of, self._fleet), self.seen_memory)
                if not leaks or time.monotonic() > deadline_s:
                    return leaks
                await asyncio.sleep(_WATCH_S)
        finally:
            await workers.close()


def _line(done: Done, started_s: float) -> str:
    return f"{done.at_s - started_s:6.1f} s  {done.fault.name}: {done.note if done.is_done else f'no: {done.note}'}"


async def _ask_once(client: LlmClient, fields: dict[str, Any]) -> list[list[int]]:
    tokens: dict[int, list[int]] = {}
    async for response in client.stream(fields):
        tokens.setdefault(response.sequence_index, []).extend(response.token_ids)
    return [tokens[index] for index in sorted(tokens)]


def footprint_of(fleet: ServedFleet) -> Footprint:
    """What the fleet occupies now."""
    processes = {}
    for process in fleet.processes():
        with contextlib.suppress(psutil.Error):
            processes[process.pid] = process.name()
    return take_footprint(processes, fleet.registry, view=fleet.memory)


def _queued(fleet: ServedFleet) -> list[Leak]:
    page = read_page(f"http://{HOST}:{fleet.metrics_port}/metrics")
    count = round(page.get(QUEUE_LENGTH.name, 0))
    return [Leak("queue", f"{count} requests in the router's queue")] if count else []


async def _held_by_manager(fleet: ServedFleet) -> list[Leak]:
    if not fleet.spec.has_manager:
        return []
    desk = ManagerDesk(fleet)
    try:
        return [Leak("manager", f"{what}: {count:.0f}") for what, count in (await desk.held()).items()]
    except Victimless as error:
        return [Leak("process", str(error))]
    finally:
        await desk.close()


def left_behind(fleet: ServedFleet, seen_memory: set[str]) -> list[Leak]:
    """Look at the machine once the fleet has been stopped."""
    files = [str(path) for path in fleet.temporary.rglob("*") if path.is_file()]
    arena = arena_folder_of(fleet.grpc_port)
    files += [str(arena)] if (fleet.memory / arena.relative_to(SHARED_MEMORY)).exists() else []
    ports = [port for port in (fleet.http_port, fleet.grpc_port, fleet.metrics_port) if not is_free(HOST, port)]
    return left_after(footprint_of(fleet), seen_memory, files, ports)


def run_served(
    spec: RunSpec, fleet_spec: FleetSpec, folder: Path, options: dict[str, Any], say: Say, logs: Path | None = None
) -> Report:
    """A run on a fleet of its own.

    Args:
        spec: What is asked and broken.
        fleet_spec: What is served.
        folder: Empty; the fleet's files.
        options: Printed with the report.
        say: Takes lines of progress.
        logs: The fleet's logs go there before it stops.

    Raises:
        ConfigError: The fleet did not come up.
    """
    faults = spec.faults
    fleet = ServedFleet(fleet_spec, folder)
    say(f"starting {fleet_spec.layout.value} fleet: {' '.join(fleet_spec.arguments())}")
    with fleet:
        reference = MockReference(fleet_spec.model_folder) if fleet_spec.engine == "mock" else None
        run = Run(spec, fleet.endpoint, fleet, reference, say)
        report = asyncio.run(run.play(faults, options))
        if logs is not None:
            fleet.save_logs(logs)
        say("stopping")
        code = fleet.stop()
        leaks = [*report.leaks, *left_behind(fleet, run.seen_memory)]
    warnings = [] if code == 0 else [f"kelp serve ended with {'SIGKILL' if code is None else code}"]
    return report.extended(leaks, warnings)


def run_attached(spec: RunSpec, endpoint: str, options: dict[str, Any], say: Say) -> Report:
    """A run against somebody's server: a client's faults alone.

    Raises:
        ConfigError: The schedule has faults that need the server's processes.
    """
    faults = spec.faults
    if others := {fault.kind for fault in faults} - CLIENT_SIDE:
        names = ", ".join(sorted(kind.value for kind in others))
        raise ConfigError(f"faults {names}: need a fleet of our own")
    return asyncio.run(Run(spec, endpoint, None, None, say).play(faults, options))
