"""`kelp router` as a process: workers register, publish events over real sockets, and get the requests they fit."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.kv_events import BlocksStored
from kelp.core.types import Role, Tier, WorkerState
from kelp.kv.events import EventPublisher
from kelp.registry.base import LayoutRecord, WorkerRecord
from support.serving import CLI, clean_environment, run_cli
from support.waiting import wait_until

TOKEN = "sixteen characters or more"
BLOCK_SIZE = 16
PROMPT = list(range(10 * BLOCK_SIZE))
LAYOUT = LayoutRecord(
    num_blocks=64, num_layers=1, num_kv_heads=1, block_size=BLOCK_SIZE, head_dim=2, dtype="float32", model_id="m"
)


class Router:
    """The running command."""

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        token.write_text(TOKEN)
        command = [
            *(str(CLI), "router", "--http-port", "0", "--grpc-port", "0"),
            *("--token-file", str(token), "--set", f"registry.path={folder / 'registry'}"),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        self.http_port = int(self.ready_line.partition("HTTP ")[2].partition(",")[0])

    def call(self, name: str, **document: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}/v1/{name}",
            json.dumps(document).encode(),
            {"Authorization": f"Bearer {TOKEN}"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return dict(json.loads(answer.read()))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=20)
        return self.process.returncode


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    router = Router(tmp_path)
    yield router
    if router.process.poll() is None:
        router.stop()


def worker(name: str, **changes: object) -> dict[str, Any]:
    record = WorkerRecord(
        worker_id=f"host:1/{name}",
        epoch=f"epoch of {name}",
        model_name=name,
        role=Role.AGGREGATED,
        state=WorkerState.READY,
        endpoint="host:1",
        layout=LAYOUT,
    )
    return record.model_copy(update=changes).model_dump(mode="json")


def test_a_foreign_stack_is_routed_by_what_its_workers_publish(router: Router) -> None:
    publisher = EventPublisher("epoch of two", BLOCK_SIZE, EventsConfig(), SystemClock())
    publisher.start()
    try:
        hashes = tuple(sequence_hashes(PROMPT, BLOCK_SIZE, seed_hash("m")))
        publisher.sink(BlocksStored(hashes, None))
        router.call("register", worker=worker("one"))
        two = worker("two", events_endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
        router.call("register", worker=two)
        wait_until(lambda: router.call("dump")["num_blocks"].get("host:1/two", [0])[0] == 10, "the index to fill")
        chosen = router.call("select", request_id="r", token_ids=PROMPT, reserve=True)
        assert chosen["decode"]["model_name"] == "two"
        page = router.call("dump", worker_id="host:1/two")["hashes"][0]
        assert sorted(page) == sorted(name.hex() for name in hashes)
    finally:
        publisher.close()


def test_a_block_manager_that_registers_is_followed_and_its_workers_are_known_to_have_its_blocks(
    router: Router,
) -> None:
    publisher = EventPublisher("1", BLOCK_SIZE, EventsConfig(), SystemClock())
    publisher.start()
    try:
        publisher.sink(BlocksStored(tuple(sequence_hashes(PROMPT, BLOCK_SIZE, seed_hash("m"))), None, Tier.HOST))
        router.call("register", worker=worker("one"))
        router.call("register", worker=worker("two", kv_manager_id="host:1/manager"))
        manager = {"manager_id": "host:1/manager", "epoch": "1", "host": "h", "endpoint": "host:1", "model_name": "m"}
        addresses = {"events_endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}
        router.call("register_manager", manager={**manager, **addresses})
        wait_until(lambda: router.call("dump")["num_blocks"].get("host:1/manager") == [0, 10, 0, 0], "its blocks")
        (view,) = router.call("workers")["managers"]
        assert (view["manager_id"], view["events"]) == ("host:1/manager", "live")
        assert len(router.call("dump", worker_id="host:1/manager")["hashes"][Tier.HOST]) == 10
        chosen = router.call("select", request_id="r", token_ids=PROMPT, reserve=True)
        assert chosen["decode"]["model_name"] == "two"
        (choice,) = router.call("explain", request_id="r")["choices"]
        overlaps = {each["worker_id"]: each["overlap_blocks"] for each in choice["candidates"]}
        assert overlaps == {"host:1/one": [0, 0, 0, 0], "host:1/two": [0, 10, 10, 10]}
    finally:
        publisher.close()


def test_it_refuses_strangers_and_stops_on_sigterm_without_a_word(router: Router) -> None:
    url = f"http://127.0.0.1:{router.http_port}/v1/workers"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=10)
    refused.value.close()
    assert refused.value.code == 401
    assert "bearer token required" in router.ready_line
    assert router.stop() == 0


def test_an_address_that_others_reach_needs_a_token_or_a_word() -> None:
    done = run_cli("router", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --host 0.0.0.0: give --token-file")
    assert len(done.stderr.splitlines()) == 1
