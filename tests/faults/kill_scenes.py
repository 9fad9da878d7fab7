"""Undisturbed runs, and the same requests while a worker is killed under them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from fault_scenes import QUESTION, STORY, used_blocks

from kelp.core.errors import WorkerLost
from kelp.core.messages import WorkerStatus
from support.llm_client import Answer, Call
from support.serving import KelpServer
from support.waiting import wait_until

FLEET_SETTINGS: dict[str, object] = {
    "executor.max_step_tokens": 64,
    "handoff.transfer_timeout_s": 3,
    "registry.heartbeat_s": 0.5,
    "registry.expiry_s": 3.0,
}
_salts = itertools.count()


@dataclass(frozen=True)
class Disturbance:
    """A request whose answer is known, asked again while something happens to its workers."""

    server: KelpServer
    num_repeats: int
    max_tokens: int
    guide: str = ""

    def undisturbed(self) -> Answer:
        return self.server.ask(**self._fields())

    def open(self) -> Call:
        return self.server.open(**self._fields())

    def _fields(self) -> dict[str, object]:
        # The salt keeps runs from meeting in a prefix cache; it does not change tokens.
        return {
            "text_input": STORY * self.num_repeats,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "cache_salt": f"kill {next(_salts)}",
            "guided_decoding_guide_type": "regex" if self.guide else "",
            "guided_decoding_guide": self.guide,
        }


def decoding(server: KelpServer, guide: str = "") -> Disturbance:
    """Spends its time decoding; with a guide (a regex), until the output is complete."""
    return Disturbance(server, num_repeats=1, max_tokens=150 if guide else 50, guide=guide)


def prefilling(server: KelpServer) -> Disturbance:
    """Spends its time in the prefill of about 700 tokens."""
    return Disturbance(server, num_repeats=40, max_tokens=8)


def busy_decode_worker(server: KelpServer) -> str:
    """Name of the decode worker that runs the one open request."""
    (name,) = [name for name, status in server.statuses().items() if status.num_running and not _prefills(name)]
    return name


def _prefills(worker: str) -> bool:
    return worker.startswith("prefill")


def disturb_decoding(server: KelpServer, disturb: Callable[[str], None], guide: str = "") -> Answer:
    """Call `disturb` with the name of the worker that decodes; the answer of the disturbed request."""
    with decoding(server, guide).open() as call:
        first = []
        while sum(len(response.token_ids) for response in first) < 5:
            first.append(call.next())
        disturb(busy_decode_worker(server))
        return Answer([*first, *call])


def disturb_prefilling(server: KelpServer, disturb: Callable[[str], None]) -> Answer:
    """The same for the worker that prefills."""
    with prefilling(server).open() as call:
        disturb(
            wait_worker(server, "a running prefill", lambda name, status: _prefills(name) and status.num_running == 1)
        )
        return call.answer()


def disturb_transfer(server: KelpServer, disturb: Callable[[str], None]) -> Answer:
    """The same while a decode worker fetches the first chunks of a prompt that is still being computed."""
    with prefilling(server).open() as call:
        sender = wait_worker(
            server,
            "transfers during the prefill",
            lambda name, status: _prefills(name) and status.num_running == 1 and status.num_leases == 1,
        )
        wait_worker(server, "reserved blocks", lambda name, status: not _prefills(name) and used_blocks(status) > 0)
        disturb(sender)
        return call.answer()


def wait_worker(server: KelpServer, what: str, is_meant: Callable[[str, WorkerStatus], bool]) -> str:
    """Name of the first worker that is seen to be as described."""
    found: list[str] = []

    def is_found() -> bool:
        found[:] = [name for name, status in server.statuses().items() if is_meant(name, status)]
        return bool(found)

    wait_until(is_found, what, 30.0)
    return found[0]


def tritonserver_of(server: KelpServer, worker: str) -> psutil.Process:
    """The process that a worker's server runs in."""
    port = server.records()[worker].endpoint.rpartition(":")[2]
    return server.tritonservers()[int(port)]


def wait_forgotten(server: KelpServer, worker: str) -> None:
    wait_until(lambda: worker not in server.records(), f"expiry of {worker}", 30.0)


def wait_back(server: KelpServer, worker: str, epoch: str) -> None:
    """Wait for another incarnation than `epoch`; it registers a moment before its server listens."""

    def is_back() -> bool:
        try:
            status = server.statuses().get(worker)
        except WorkerLost:
            return False
        return status is not None and status.epoch != epoch

    wait_until(is_back, f"return of {worker}", 90.0)


def check_serving(server: KelpServer) -> Answer:
    """Nothing is held, and the next request is served."""
    server.wait_quiet()
    answer = server.ask(**QUESTION)
    assert len(answer.token_ids) == 4
    server.wait_quiet()
    return answer
