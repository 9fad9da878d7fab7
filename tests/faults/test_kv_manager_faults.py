"""The KV block manager and its workers killed and stopped under load: no wrong token, nothing lost, nothing held.

Real processes over NIXL and gRPC; the mock engine checks every byte that is brought, and knows what must be said.
"""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kelp.client.base import WorkerAddress
from support.kv_stats import KvStats, stats_at, wait_nothing_held
from support.serving import free_ports
from support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")), reason="nixl is missing"
)
LEASE_TTL_S = 1.0
BLOCK_BYTES = 4096
DISTINCT_BLOCKS = 128
"""At least as many as a worker's prompts have, those that it turns to on SIGUSR1 not counted."""
FEW_BLOCKS = 48
"""A host tier that evicts all the time."""
_START_S = 60.0


class Process:
    """One of the two scripts, and what it has printed."""

    def __init__(self, script: str, *arguments: str) -> None:
        path = Path(__file__).with_name(script)
        self.process = subprocess.Popen(
            [sys.executable, str(path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_line("READY")

    def wait_line(self, prefix: str) -> None:
        def has_come() -> bool:
            found = any(line.startswith(prefix) for line in self.lines)
            assert found or self.process.poll() is None, "".join(self.lines[-40:])
            return found

        wait_until(has_come, prefix, _START_S)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += iter(self.process.stdout.readline, "")


class WorkerProcess(Process):
    def done(self) -> tuple[int, int]:
        """Requests answered and blocks onboarded so far."""
        line = next((line for line in reversed(self.lines) if line.startswith("DONE ")), "DONE 0 0")
        num_requests, num_blocks = line.split()[1:]
        return int(num_requests), int(num_blocks)

    def wait_more(self, num_requests: int, num_blocks: int = 0) -> None:
        """Wait until it has answered and onboarded so many more."""
        requests, blocks = self.done()

        def has_gone_on() -> bool:
            assert self.process.poll() is None, "".join(self.lines[-40:])
            now = self.done()
            return now[0] >= requests + num_requests and now[1] >= blocks + num_blocks

        wait_until(has_gone_on, f"{num_requests} more requests, {num_blocks} more blocks", 60.0)

    def found(self, number: int) -> tuple[int, int]:
        """How many blocks a manager had when it was joined, by its number, and how many it should have had."""
        num_found, num_kept = [line for line in self.lines if line.startswith("FOUND ")][number].split()[1:]
        return int(num_found), int(num_kept)

    def wait_joined(self, number: int) -> None:
        """Until it has joined so many managers."""

        def has_joined() -> bool:
            assert self.process.poll() is None, "".join(self.lines[-40:])
            return sum(line.startswith("FOUND ") for line in self.lines) >= number

        wait_until(has_joined, "a join", _START_S)

    def finish(self) -> None:
        """Let it end by itself: it says that nothing is held."""
        self.send(signal.SIGTERM)
        self.wait_line("CLEAN")
        assert self.process.wait(30.0) == 0


class Stage:
    """One host: its manager, its workers, what is left of them."""

    def __init__(self, folder: Path, num_host_blocks: int = DISTINCT_BLOCKS) -> None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": 64, "max_position_embeddings": 4096}))
        self._folder = folder
        (self._port,) = free_ports(1)
        self._address = WorkerAddress(f"127.0.0.1:{self._port}", "kv_block_manager")
        self.processes: list[Process] = []
        self._settings = [
            f"registry.path={folder / 'registry'}",
            "registry.heartbeat_s=0.1",
            "registry.expiry_s=1.5",
            f"kv_manager.arena_folder={folder / 'arena'}",
            f"kv_manager.host_bytes={num_host_blocks * BLOCK_BYTES}",
            f"kv_manager.lease_ttl_s={LEASE_TTL_S}",
            f"disk_tier.path={folder / 'disk'}",
            f"disk_tier.max_bytes={4 * 1024 * 1024}",
            "events.enabled=false",
            "offload.onboard=always",
            "offload.call_timeout_s=0.5",
        ]

    def start_manager(self) -> Process:
        return self._add(Process("kv_manager_server.py", str(self._port), *self._settings))

    def start_worker(self, name: str = "w") -> WorkerProcess:
        worker = WorkerProcess("kv_worker_process.py", name, str(self._folder), *self._settings)
        self.processes.append(worker)
        return worker

    def stats(self) -> KvStats:
        """What the manager counts."""
        return stats_at(self._address)

    def wait_nothing_held(self) -> KvStats:
        """Leases, stores, references and quarantined slots end by themselves."""
        return wait_nothing_held(self._address)

    def stop_in_the_act(self, worker: WorkerProcess, kind: str, generator: random.Random) -> None:
        """Have the only worker sleep at a moment when the manager holds something of this kind for it."""
        for _ in range(300):
            if kind == "stores":
                # What has been stored is not stored once more.
                worker.send(signal.SIGUSR1)
            worker.wait_more(generator.randrange(1, 4))
            worker.send(signal.SIGSTOP)
            if self.stats().total("kelp_kv_manager_held", kind=kind):
                return
            worker.send(signal.SIGCONT)
        raise AssertionError(f"no {kind} at any moment")

    def _add(self, process: Process) -> Process:
        self.processes.append(process)
        return process


@pytest.fixture
def num_kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kv-kills", default=3))


@pytest.fixture
def new_stage(tmp_path: Path) -> Iterator[Callable[[int], Stage]]:
    """Makes one with a host tier of so many blocks."""
    stages: list[Stage] = []

    def make(num_host_blocks: int) -> Stage:
        stages.append(Stage(tmp_path, num_host_blocks))
        return stages[-1]

    yield make
    for stage in stages:
        for process in stage.processes:
            process.close()


@pytest.fixture
def stage(new_stage: Callable[[int], Stage]) -> Stage:
    """Nothing has to be evicted."""
    return new_stage(DISTINCT_BLOCKS)


def kill_in_a_quiet_moment(stage: Stage, manager: Process, worker: WorkerProcess) -> Process:
    """Nothing changes while nobody asks: all that can be found before the kill is found after it."""
    worker.send(signal.SIGSTOP)
    before = stage.wait_nothing_held()
    manager.kill()
    manager = stage.start_manager()
    worker.send(signal.SIGCONT)
    manager.wait_line(f"{before.resident('host')} KV blocks of an earlier process")
    manager.wait_line(f"{before.resident('disk')} KV blocks are on disk")
    return manager


def wait_evicting(stage: Stage) -> None:
    """The manager that runs now makes room all the time, and brings back from disk what had to leave."""

    def is_evicting() -> bool:
        stats = stage.stats()
        return stats.evicted("host") > 0 and stats.hits("disk") > 0

    wait_until(is_evicting, "evictions and hits on disk", 60.0)


def test_a_manager_killed_at_any_moment_while_it_evicts_costs_no_answer_and_is_used_again(
    new_stage: Callable[[int], Stage], num_kills: int
) -> None:
    generator, stage = random.Random(5), new_stage(FEW_BLOCKS)
    manager, worker = stage.start_manager(), stage.start_worker()
    for _ in range(num_kills):
        worker.wait_more(20, 20)
        wait_evicting(stage)
        worker.wait_more(generator.randrange(1, 60))
        manager.kill()
        worker.wait_more(10)
        manager = stage.start_manager()
    worker.wait_more(20, 20)
    wait_evicting(stage)
    manager = kill_in_a_quiet_moment(stage, manager, worker)
    worker.wait_more(20, 20)
    worker.finish()
    stage.wait_nothing_held()
    manager.send(signal.SIGTERM)
    assert manager.process.wait(30.0) == 0
    assert not [path for path in (stage._folder / "arena").rglob("*") if path.is_file()], "an orderly stop removes it"


def test_every_block_whose_commit_was_answered_is_found_again_after_each_kill(
    new_stage: Callable[[int], Stage], num_kills: int
) -> None:
    generator, stage = random.Random(7), new_stage((num_kills + 1) * DISTINCT_BLOCKS)
    manager, worker = stage.start_manager(), stage.start_worker()
    worker.wait_joined(1)
    num_kept = 0
    for number in range(1, num_kills + 1):
        wait_until(lambda least=num_kept: stage.stats().resident("host") > least, "blocks that are new", 60.0)
        worker.wait_more(generator.randrange(1, 20))
        stats = stage.stats()
        assert (stats.evicted("host"), stats.corrupt("host")) == (0, 0)
        manager.kill()
        worker.send(signal.SIGUSR1)
        manager = stage.start_manager()
        worker.wait_joined(number + 1)
        num_found, num_now_kept = worker.found(number)
        # A kill may come before the first Commit of its life has been answered.
        assert num_found == num_now_kept >= num_kept
        num_kept = num_now_kept
    assert num_kept >= num_kills
    worker.wait_more(20, 20)
    worker.finish()
    stage.wait_nothing_held()


def test_a_worker_killed_while_it_stores_or_onboards_leaves_the_manager_nothing(stage: Stage) -> None:
    generator = random.Random(6)
    stage.start_manager()
    for kind in ("stores", "leases"):
        victim = stage.start_worker(f"victim of {kind}")
        victim.wait_more(20, 5)
        stage.stop_in_the_act(victim, kind, generator)
        victim.kill()
        stage.wait_nothing_held()
    other = stage.start_worker("other")
    other.wait_more(20, 20)
    other.finish()
    stage.wait_nothing_held()


@pytest.mark.parametrize("stopped", ["manager", "worker"])
def test_a_process_that_sleeps_longer_than_its_leases_spoils_no_answer(stage: Stage, stopped: str) -> None:
    manager, worker = stage.start_manager(), stage.start_worker()
    other = stage.start_worker("other")
    worker.wait_more(20, 20)
    sleeper = manager if stopped == "manager" else worker
    for _ in range(2):
        other.wait_more(7)
        sleeper.send(signal.SIGSTOP)
        other.wait_more(20)
        pause = threading.Event()
        pause.wait(2 * LEASE_TTL_S)
        sleeper.send(signal.SIGCONT)
        worker.wait_more(20, 20)
    worker.finish()
    other.finish()
    stage.wait_nothing_held()
