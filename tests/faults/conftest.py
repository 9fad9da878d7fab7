"""A real tritonserver that faults are injected into, and what must be true after each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_scenes import QUESTION, require_server

from support.prefill_peer import PeerPool
from support.serving import KelpServer, shm_regions

SETTINGS: dict[str, object] = {
    "handoff.lease_ttl_s": 2,
    "handoff.attach_timeout_s": 2,
    "executor.max_running": 1,
    "executor.max_step_tokens": 64,
    "queue.running_factor": 2.0,
    "queue.refuse_late": False,
    "registry.heartbeat_s": 0.5,
    "router.disaggregation": "always",
}
"""One sequence at a time makes a queue, two requests a worker one in the router as well; small steps make many chunks;
every prompt is handed over, paying or not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kv-kills", type=int, default=3, help="how often the KV block manager is killed under load")
    parser.addoption("--soak", action="store_true", help="also what takes too long for every run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.triton)
            item.add_marker(pytest.mark.nixl)


@pytest.fixture(scope="session")
def fault_server() -> Iterator[KelpServer]:
    """One server for all faults that leave it alive."""
    require_server()
    with KelpServer(num_blocks=256, settings=SETTINGS).start() as server:
        yield server


@pytest.fixture
def server(fault_server: KelpServer) -> Iterator[KelpServer]:
    """The server; afterwards it holds nothing of the fault, and answers as before."""
    before = fault_server.ask(**QUESTION).token_ids
    regions = shm_regions(fault_server.grpc_port)
    processes = {process.pid for process in fault_server.family()}
    yield fault_server
    fault_server.wait_quiet()
    assert shm_regions(fault_server.grpc_port) == regions
    assert {process.pid for process in fault_server.family()} == processes
    assert fault_server.ask(**QUESTION).token_ids == before
    fault_server.wait_quiet()


@pytest.fixture
def peer_pool(server: KelpServer) -> Iterator[PeerPool]:
    """A KV pool of the test's own process that fits the server's workers; a new agent each time, as workers are."""
    pool = PeerPool(server.records()["decode"].layout)
    yield pool
    pool.close()
