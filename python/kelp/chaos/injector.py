"""Does to a fleet what a schedule says, and says what it did: a fault that finds no victim is told as not done."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import psutil

from kelp.chaos.done import Done, Impossible, Victimless
from kelp.chaos.faults import Fault, FaultKind, Layout, Phase
from kelp.chaos.fleet import ServedFleet
from kelp.chaos.fleet_spec import usual_burst
from kelp.chaos.front import Front
from kelp.chaos.load import Load
from kelp.chaos.questions import Questions
from kelp.chaos.storage_faults import StorageFaults
from kelp.chaos.thread_stop import find_thread, stop_thread
from kelp.chaos.tier_faults import TierFaults
from kelp.client.base import WorkerAddress
from kelp.client.grpc import GrpcWorkerClient, TritonControl
from kelp.core.errors import KelpError
from kelp.core.messages import DrainCommand, WorkerStatus
from kelp.core.schema import KV_BLOCK_MANAGER, LLM, PREPROCESS
from kelp.core.schema_types import RESTART_PARAMETER
from kelp.executor.batching.executor import ENGINE_THREAD

_PHASE_WAIT_S = 3.0
_POLL_S = 0.03
_VICTIM_WAIT_S = 5.0
_UNNOTICED_S = 6.0
"""Within this time a fault that found a victim is done, and the registry knows of it."""
_DRAIN_S = 15.0
_NUM_LEAVING = 4
_NUM_HURRIED = 6
_ENDS_SERVER = frozenset({FaultKind.SERVER_KILLED, FaultKind.SERVER_TERMINATED})
_ENDS_WORKER = _ENDS_SERVER | {FaultKind.WORKER_KILLED, FaultKind.WORKER_STUCK, FaultKind.WORKER_RELOADED}
_ENDS_FRONT = frozenset({FaultKind.ROUTER_KILLED, FaultKind.ROUTER_RELOADED, FaultKind.FRONT_KILLED})
_NEEDS_FRONT = _ENDS_FRONT | {FaultKind.REGISTRY_GONE}


class Injector:
    """Does faults; made on the event loop that the load runs on.

    Args:
        fleet: None where only a client's faults can be done.
    """

    def __init__(self, fleet: ServedFleet | None, load: Load, questions: Questions, seed: int) -> None:
        self._fleet = fleet
        self._load = load
        self._questions = questions
        self._rng = random.Random(seed)
        self._workers = GrpcWorkerClient() if fleet is None else fleet.worker_client()
        self._num_reloads = 0
        self._num_burst = usual_burst(fleet.spec.engine if fleet is not None else "mock")
        self._choosing = asyncio.Lock()
        self._front = Front(self._is_front_whole)
        self._gone_until_s: dict[str, float] = {}
        self._actions: dict[FaultKind, Callable[[Fault], Awaitable[str]]] = {
            FaultKind.WORKER_KILLED: self._kill_worker,
            FaultKind.WORKER_PAUSED: self._pause_worker,
            FaultKind.WORKER_STUCK: self._stop_engine,
            FaultKind.WORKER_RELOADED: self._reload_worker,
            FaultKind.SERVER_KILLED: self._kill_server,
            FaultKind.SERVER_TERMINATED: self._terminate_server,
            FaultKind.ROUTER_KILLED: self._kill_router,
            FaultKind.ROUTER_RELOADED: self._reload_router,
            FaultKind.FRONT_KILLED: self._kill_front,
            FaultKind.MANAGER_KILLED: self._kill_manager,
            FaultKind.MANAGER_RELOADED: self._reload_manager,
            FaultKind.CLIENT_LEFT: self._leave,
            FaultKind.DEADLINE_PASSED: self._hurry,
            FaultKind.OVERLOAD: self._overload,
            FaultKind.BAD_INPUT: self._ask_badly,
        }
        self._tiers: TierFaults | None = None
        if fleet is not None:
            self._tiers = TierFaults(fleet, load, questions, self._rng)
            self._actions |= {**StorageFaults(fleet).actions, **self._tiers.actions}

    async def close(self) -> None:
        """Close its connections."""
        await self._workers.close()
        if self._tiers is not None:
            await self._tiers.close()

    async def do(self, fault: Fault) -> Done:
        """One fault to its end."""
        at_s = time.monotonic()
        try:
            if fault.kind not in self._actions:
                raise Impossible("the fleet is not ours")
            async with self._victim(fault):
                at_s = time.monotonic()
                note = await self._actions[fault.kind](fault)
        except Victimless as reason:
            return Done(fault, at_s, False, str(reason), not isinstance(reason, Impossible))
        except (psutil.Error, OSError, KelpError) as error:
            return Done(fault, at_s, False, f"{type(error).__name__}: {error}".partition("\n")[0])
        return Done(fault, at_s, True, note)

    @property
    def _served(self) -> ServedFleet:
        if self._fleet is None:
            raise Impossible("the fleet is not ours")
        return self._fleet

    @contextlib.asynccontextmanager
    async def _victim(self, fault: Fault) -> AsyncIterator[None]:
        if fault.kind in _NEEDS_FRONT:
            async with self._front.turn():
                yield
            return
        if fault.kind in _ENDS_WORKER:
            await self._wait_spare(fault)
            if fault.kind is FaultKind.WORKER_KILLED and fault.phase is not None:
                await self._wait_phase(fault.target, fault.phase)
        yield

    async def _kill_worker(self, fault: Fault) -> str:
        stub = self._stub(fault.target)
        stub.kill()
        return f"{fault.target} ({stub.pid}) {fault.phase.value if fault.phase else 'at any time'}"

    async def _pause_worker(self, fault: Fault) -> str:
        stub = self._stub(fault.target)
        stub.suspend()
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            stub.resume()
        return f"{fault.target} ({stub.pid}) for {fault.lasts_s:.1f} s"

    async def _stop_engine(self, fault: Fault) -> str:
        stub = self._stub(fault.target)
        thread = find_thread(stub.pid, ENGINE_THREAD)
        if thread is None:
            raise Victimless(f"{fault.target} has no thread {ENGINE_THREAD}")
        await asyncio.to_thread(stop_thread, thread, fault.lasts_s)
        return f"thread {thread} of {fault.target} ({stub.pid}) for {fault.lasts_s:.1f} s"

    async def _reload_worker(self, fault: Fault) -> str:
        record = self._served.records().get(fault.target)
        server = self._served.server_of(fault.target)
        if record is None or server is None:
            raise Victimless(f"{fault.target} is not there")
        draining = self._workers.control(
            WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch), DrainCommand(timeout_s=_DRAIN_S)
        )
        status = await asyncio.wait_for(draining, _DRAIN_S * 2)
        if self._served.spec.layout is Layout.ISOLATED:
            server.terminate()
        else:
            await asyncio.to_thread(self._load_anew, record.endpoint, fault.target)
        return f"{fault.target} {status.state}, {status.num_running + status.num_waiting} requests left"

    async def _reload_router(self, _: Fault) -> str:
        await asyncio.to_thread(self._load_anew, self._served.endpoint, LLM.name)
        return LLM.name

    async def _reload_manager(self, _: Fault) -> str:
        address = self._served.manager_address()
        if address is None:
            raise Victimless("no KV block manager is registered")
        await asyncio.to_thread(self._load_anew, address.endpoint, KV_BLOCK_MANAGER.name)
        return f"{KV_BLOCK_MANAGER.name} at {address.endpoint}"

    def _load_anew(self, endpoint: str, model: str) -> None:
        """Triton loads nothing unchanged, so a parameter without a meaning changes."""
        self._num_reloads += 1
        with contextlib.closing(TritonControl(endpoint)) as control:
            config = control.config_of(model)
            mark = {RESTART_PARAMETER: {"string_value": f"chaos {self._num_reloads}"}}
            control.load(model, {**config, "parameters": {**config.get("parameters", {}), **mark}})

    async def _kill_server(self, fault: Fault) -> str:
        server = self._server(fault)
        server.kill()
        return f"server of {fault.target} ({server.pid})"

    async def _terminate_server(self, fault: Fault) -> str:
        server = self._server(fault)
        server.terminate()
        return f"server of {fault.target} ({server.pid})"

    def _server(self, fault: Fault) -> psutil.Process:
        server = self._served.server_of(fault.target)
        if server is None:
            raise Victimless(f"{fault.target} has no server")
        return server

    async def _kill_router(self, _: Fault) -> str:
        return self._kill_one(LLM.name)

    async def _kill_manager(self, _: Fault) -> str:
        return self._kill_one(KV_BLOCK_MANAGER.name)

    async def _kill_front(self, _: Fault) -> str:
        server = self._served.servers().get(self._served.grpc_port)
        if server is None:
            raise Victimless("the public server is not there")
        server.kill()
        return f"public server ({server.pid})"

    async def _leave(self, fault: Fault) -> str:
        leaving = [self._questions.leaving(fault.phase or Phase.DECODING) for _ in range(_NUM_LEAVING)]
        await self._load.ask_all(leaving)
        return f"{_NUM_LEAVING} clients"

    async def _hurry(self, _: Fault) -> str:
        await self._load.ask_all([self._questions.hurried() for _ in range(_NUM_HURRIED)])
        return f"{_NUM_HURRIED} requests"

    async def _overload(self, _: Fault) -> str:
        await self._load.ask_all([self._questions.next() for _ in range(self._num_burst)])
        return f"{self._num_burst} requests"

    async def _ask_badly(self, _: Fault) -> str:
        bad = self._questions.bad()
        await self._load.ask_all(bad)
        return f"{len(bad)} requests"

    def _kill_one(self, model: str) -> str:
        stubs = self._served.stubs(model)
        if not stubs:
            raise Victimless(f"{model} has no process")
        stub = self._rng.choice(stubs)
        stub.kill()
        return f"{model} ({stub.pid})"

    def _stub(self, worker: str) -> psutil.Process:
        stubs = self._served.stubs(worker)
        if not stubs:
            raise Victimless(f"{worker} has no process")
        return stubs[0]

    async def _wait_spare(self, fault: Fault) -> None:
        """Wait until the fleet can do without a worker: nothing is proven by killing the last one that decodes.

        From then on the worker counts as gone: two faults that wait for each other's victims must not both come.
        """
        worker, deadline_s = fault.target, time.monotonic() + _VICTIM_WAIT_S
        while True:
            async with self._choosing:
                if await asyncio.to_thread(self._is_spare, worker):
                    self._gone_until_s[worker] = time.monotonic() + _UNNOTICED_S + fault.lasts_s
                    return
            if time.monotonic() > deadline_s:
                raise Victimless(f"{worker} is down, or no other worker decodes")
            await asyncio.sleep(_POLL_S * 10)

    def _is_front_whole(self) -> bool:
        if not self._served.registry.is_dir():
            return False
        with contextlib.closing(TritonControl(self._served.endpoint)) as control:
            is_ready = control.is_model_ready(LLM.name)
        return is_ready and not {LLM.name, PREPROCESS.name} & set(self._served.missing())

    def _is_spare(self, worker: str) -> bool:
        now_s = time.monotonic()
        missing = {*self._served.missing(), *(name for name, end_s in self._gone_until_s.items() if now_s < end_s)}
        return worker not in missing and any(
            name not in missing and name != worker for name in self._served.spec.decode_workers
        )

    async def _wait_phase(self, worker: str, phase: Phase) -> None:
        deadline_s = time.monotonic() + _PHASE_WAIT_S
        while time.monotonic() < deadline_s:
            status = await self._served.status(worker, self._workers)
            if status is not None and is_in(phase, status):
                return
            await asyncio.sleep(_POLL_S)
        self._gone_until_s.pop(worker, None)
        raise Victimless(f"{worker} has not been {phase.value} for {_PHASE_WAIT_S:.0f} s")


def is_in(phase: Phase, status: WorkerStatus) -> bool:
    """Whether a worker has a request in a phase; a prefill worker that holds a lease is being read."""
    if phase is Phase.QUEUED:
        return status.num_waiting > 0
    if phase is Phase.TRANSFERRING:
        return status.num_leases > 0
    return status.num_running > 0
