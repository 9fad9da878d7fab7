"""`kelp kv` against a real block manager over tiers in memory, by gRPC."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fake_tiers import StoreMemory
from manager_rig import Host, Worker, prompt_hashes, settled
from tritonclient.grpc import service_pb2, service_pb2_grpc
from typer.testing import CliRunner

from kelp.cli import app, kv
from kelp.client.base import WorkerAddress
from kelp.core.errors import ConfigError, KelpError, NotFound, RetryableTransferError, WorkerLost
from kelp.core.hashing import tenant_digest
from kelp.kv.manager.service import KvBlockManager
from kelp.registry.base import KvManagerRecord
from kelp.registry.directory import KvManagerDirectory
from kelp.supervisor.run_state import RunState


class ServedManager(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A manager behind gRPC, on a loop of its own; a worker fills it on demand."""

    def __init__(self) -> None:
        self.host = Host(num_slots=16, num_disk_slots=16, store=StoreMemory(2))
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.run(self._start())

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def ModelInfer(self, request, context):  # noqa: N802
        assert request.model_name == "kv_block_manager"
        raw = await self._manager.handle(request.raw_input_contents[0][4:])
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.raw_output_contents.append(len(raw).to_bytes(4, "little") + raw)
        return response

    async def _start(self) -> None:
        self._manager = KvBlockManager(self.host.parts())
        self._server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def fill(self) -> None:
        """Six blocks without a salt, all of them asked for; four of salt `a`; in every tier."""
        worker = Worker(self._manager)
        await worker.join()
        await worker.store(prompt_hashes(4, "a"), tenant_digest("a"))
        await worker.store(prompt_hashes(6))
        await settled(self._manager)
        lease_id, _ = await worker.onboard(prompt_hashes(6))
        await worker.release(lease_id)

    def close(self) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        await self._server.stop(None)
        await self._manager.stop()


@pytest.fixture
def served() -> Iterator[ServedManager]:
    served = ServedManager()
    yield served
    served.close()


def kelp_kv(served: ServedManager, *arguments: str) -> str:
    found = CliRunner().invoke(app, ["kv", *arguments, "--grpc-port", str(served.port)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def refusal(*arguments: str) -> KelpError:
    with pytest.raises(KelpError) as caught:
        CliRunner().invoke(app, ["kv", *arguments], catch_exceptions=False)
    return caught.value


def test_the_stats_of_every_tier_are_shown(served: ServedManager) -> None:
    served.run(served.fill())
    lines = kelp_kv(served, "stats").splitlines()
    assert lines[0].endswith("/kv_block_manager: 1 workers, 0 leases")
    rows = {row[0]: row for row in map(str.split, lines[3:6])}
    assert rows["host"][:3] == ["host", "10", "16"] and rows["disk"][:3] == ["disk", "10", "16"]
    assert rows["object"][:3] == ["object", "10", "-"]
    assert lines[2].split()[:6] == ["tier", "blocks", "places", "bytes", "hits", "evicted"]


def test_the_stats_as_json_carry_every_count(served: ServedManager) -> None:
    served.run(served.fill())
    report = json.loads(kelp_kv(served, "stats", "--json"))
    host = report["tiers"]["host"]
    assert (host["blocks"], host["places"], host["bytes"], host["hits"]) == (10, 16, 640, 6)
    assert report["store"] == "closed"
    assert report["values"]['kelp_kv_manager_operations_total{kind="onboard"}'] == 1


def test_before_a_worker_has_joined_the_stats_say_so_and_a_clear_is_refused(served: ServedManager) -> None:
    assert "no worker has joined yet" in kelp_kv(served, "stats")
    error = refusal("clear", "--all", "--grpc-port", str(served.port))
    assert isinstance(error, NotFound) and "no worker has joined" in error.text


def test_clearing_a_salt_says_how_much_has_gone_and_leaves_the_others(served: ServedManager) -> None:
    served.run(served.fill())
    assert kelp_kv(served, "clear", "--salt", "a").startswith("12 removed")
    tiers = json.loads(kelp_kv(served, "stats", "--json"))["tiers"]
    assert [tier["blocks"] for tier in tiers.values()] == [6, 6, 6]
    assert kelp_kv(served, "clear", "--salt", "a").startswith("0 removed")


def test_clearing_everything_can_be_bound_to_a_tier(served: ServedManager) -> None:
    served.run(served.fill())
    assert kelp_kv(served, "clear", "--all", "--tier", "host").startswith("10 removed")
    assert kelp_kv(served, "clear", "--all", "--tier", "disk", "--tier", "object").startswith("20 removed")
    assert kelp_kv(served, "clear", "--all").startswith("0 removed")


def test_a_store_that_is_away_is_named_and_what_has_gone_all_the_same(served: ServedManager) -> None:
    served.run(served.fill())
    assert served.host.store is not None
    served.host.store.is_available = False
    error = refusal("clear", "--salt", "a", "--grpc-port", str(served.port))
    assert isinstance(error, RetryableTransferError)
    assert "8 blocks are gone, but what the store has is left" in error.text
    assert "clears that are not finished: 1" in kelp_kv(served, "stats")


@pytest.mark.parametrize("arguments", [[], ["--salt", "a", "--all"]])
def test_whose_blocks_shall_go_must_be_said_once(arguments: list[str]) -> None:
    error = refusal("clear", *arguments)
    assert isinstance(error, ConfigError) and "either --salt SALT or --all" in error.text


def test_a_server_that_is_not_there_is_named() -> None:
    error = refusal("stats", "--grpc-port", "1", "--timeout-s", "10")
    assert isinstance(error, WorkerLost) and "127.0.0.1:1/kv_block_manager" in error.text


def _isolated_run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> KvManagerDirectory:
    (folder / "kelp.yaml").write_text(f"registry: {{path: {folder / 'registry'}}}\nmodel: {{path: /m}}\n")
    state = RunState(pid=1, run_folder=folder, is_isolated=True, num_prefill=0, num_decode=1)
    monkeypatch.setattr("kelp.cli.kv.run_state.read_state", lambda port: state if port == 8001 else None)
    return KvManagerDirectory(folder / "registry", 60.0)


def test_the_manager_of_an_isolated_run_is_found_by_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = _isolated_run(monkeypatch, tmp_path)
    with pytest.raises(NotFound, match="port 8001 has no KV block manager"):
        kv.find_manager("127.0.0.1", 8001)
    found = WorkerAddress("127.0.0.1:9007", "kv_block_manager")
    record = KvManagerRecord(
        manager_id="m", epoch="e", host="here", endpoint=found.endpoint, model_name=found.model_name
    )
    records.publish(record)
    assert kv.find_manager("127.0.0.1", 8001).worker_id == found.worker_id
    assert kv.find_manager("elsewhere", 8001) == WorkerAddress("elsewhere:8001", "kv_block_manager")
