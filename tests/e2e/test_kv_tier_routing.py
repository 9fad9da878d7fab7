"""Two mock workers behind one KV block manager: what one has computed, the router finds below the other."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from mock_fleet_rig import Reference, explain, generate, model_of, samples, total, worker_of

from kelp.client.base import WorkerAddress
from kelp.client.grpc.kv_manager import GrpcKvManagerClient
from kelp.core.config import CONFIG_ENV
from kelp.core.hashing import seed_hash, sequence_hashes, tenant_digest
from kelp.core.kv_manager_messages import Done, Leased, Onboard, Release
from kelp.registry.directory import KvManagerDirectory
from kelp.supervisor.plan import ServerSpec, WorkerSpec
from kelp.supervisor.server import Launch, TritonServer
from kelp.supervisor.triton import find_triton
from support.kv_stats import num_in_memory
from support.serving import HOST, KelpServer, clean_environment, free_ports
from support.waiting import wait_until

BLOCK_SIZE = 16
MAX_TOKENS = 8
NUM_REPORTS = 60
LEASED_S = 2.0
"""The manager believes no more than the age of a lease."""
SETTINGS: dict[str, object] = {
    "kv_manager.host_bytes": 64 * 1024**2,
    "mock.timing.prefill_token_s": 3e-3,
    "registry.heartbeat_s": 0.5,
}
"""`offload.onboard` is what it is by default; computing a prompt takes much longer than asking for it."""
UNDER_ANOTHER_NAME = """#!/bin/sh
exec unshare --uts sh -c 'hostname another-host && exec "$@"' sh {program} "$@"
"""
ROOT = Path(__file__).resolve().parents[2]
TALE = "The lighthouse keeper counts the ships that pass, and writes their names down. " * 12


@pytest.fixture(scope="module")
def served() -> Iterator[KelpServer]:
    arguments = ("--engine", "mock", "--decode", "2")
    with KelpServer("aggregated", settings=SETTINGS, arguments=arguments).start() as server:
        wait_until(lambda: all(record.kv_manager_id for record in server.records().values()), "the manager", 30.0)
        live = {"state": "live"}
        wait_until(lambda: total(samples(server)["kelp_kv_event_managers"], **live) == 1, "its events", 30.0)
        wait_until(lambda: total(samples(server)["kelp_kv_event_workers"], **live) == 2, "the workers' events", 30.0)
        yield server


def counted(server: KelpServer, name: str, **labels: str) -> float:
    return total(samples(server)[name], **labels)


def overlaps(explanation: dict[str, Any]) -> dict[str, list[int]]:
    return {model_of(row["worker_id"]): row["overlap_blocks"] for row in explanation["choices"][0]["candidates"]}


def test_a_prompt_that_one_worker_computed_is_found_via_the_manager_for_the_other(served: KelpServer) -> None:
    reference = Reference()
    num_blocks = (len(reference.encode(TALE)) - 1) // BLOCK_SIZE
    answer = reference.answer(TALE, MAX_TOKENS)
    compute_and_see(served, "To be measured.", "decode_1")
    first = generate(served, text_input=TALE, max_tokens=MAX_TOKENS, kelp_worker="decode")
    assert (first["output_ids"], first["cached_tokens"]) == (answer, 0)

    def is_below() -> bool:
        probe = generate(served, id="probe", text_input=TALE, max_tokens=1)
        assert worker_of(probe) == "decode", "it has the prompt in its own cache"
        return overlaps(explain(served, "probe"))["decode_1"][:2] == [0, num_blocks]

    wait_until(is_below, "the index to have the manager's blocks for the other worker", 30.0)
    second = generate(served, id="second", text_input=TALE, max_tokens=MAX_TOKENS, kelp_worker="decode_1")
    assert (second["output_ids"], worker_of(second)) == (answer, "decode_1")
    assert second["cached_tokens"] == num_blocks * BLOCK_SIZE
    explanation = explain(served, "second")
    assert overlaps(explanation) == {"decode_1": [0, num_blocks, num_blocks, num_blocks]}
    in_host_memory = [0, num_blocks, 0, 0]
    assert explanation["predicted_onboarded_blocks"] == in_host_memory
    assert explanation["outcome"]["onboarded_blocks"] == in_host_memory
    assert explanation["outcome"]["onboard_s"] > 0
    read = {"tier": "host", "direction": "read"}
    for name in ("kelp_kv_tier_moved_bytes_total", "kelp_kv_tier_seconds_count"):
        wait_until(lambda name=name: counted(served, name, **read) > 0, f"{name} of what the worker has READ", 15.0)
    for name in ("kelp_routing_lower_tier_blocks_total", "kelp_routing_onboarded_blocks_total"):
        wait_until(lambda name=name: counted(served, name, tier="host") == num_blocks, name, 15.0)
    served.wait_quiet()


def compute_and_see(server: KelpServer, beginning: str, name: str) -> None:
    """Have a worker compute a new prompt, and wait until its metrics tell of it, and so of all before it."""
    num_offered = counted(server, "kelp_offload_blocks_total", worker=name)
    generate(server, text_input=f"{beginning} {TALE}", kelp_worker=name)
    wait_until(
        lambda: counted(server, "kelp_offload_blocks_total", worker=name) > num_offered, f"metrics of {name}", 15.0
    )


def test_a_prompt_that_nobody_has_is_computed_without_asking_the_manager(served: KelpServer) -> None:
    compute_and_see(served, "Once more.", "decode_1")
    num_asked = counted(served, "kelp_onboard_requests_total")
    for number in range(3):
        fresh = generate(served, text_input=f"Tale {number}. {TALE}", kelp_worker=("decode", "decode_1")[number % 2])
        assert fresh["cached_tokens"] == 0
    for name in ("decode", "decode_1"):
        compute_and_see(served, f"The end of {name}.", name)
    assert counted(served, "kelp_onboard_requests_total") == num_asked


@pytest.fixture
def other_host(served: KelpServer, tmp_path: Path) -> Iterator[TritonServer]:
    """A worker of the same registry on a host that has another name, and no KV block manager."""
    if subprocess.run(["unshare", "--uts", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to make a UTS namespace")
    config = yaml.safe_load((served.run_folder / "kelp.yaml").read_text())
    config["kv_manager"]["enabled"] = False
    config.setdefault("offload", {})["use_other_hosts"] = True
    config_path, program, triton = tmp_path / "kelp.yaml", tmp_path / "tritonserver", find_triton()
    config_path.write_text(yaml.safe_dump(config))
    program.write_text(UNDER_ANOTHER_NAME.format(program=triton.binary))
    program.chmod(0o755)
    environment = {**triton.environment(clean_environment()), CONFIG_ENV: str(config_path)}
    grpc_port, metrics_port = free_ports(2)
    workers = (WorkerSpec("decode_9", "decode"),)
    spec = ServerSpec("kelp-other-host", HOST, grpc_port, None, metrics_port, (), workers)
    server = TritonServer(Launch(program, environment, ROOT / "model_repository", ROOT / "backends", tmp_path), spec)
    try:
        server.start()
        server.wait_ready(120.0)
        yield server
    finally:
        server.stop()


def test_a_worker_of_a_host_without_manager_reads_from_the_memory_of_another(
    served: KelpServer, other_host: TritonServer
) -> None:
    reference, tale, worker = Reference(), f"On another host. {TALE}", other_host.spec.added_workers[0].name
    num_blocks = (len(reference.encode(tale)) - 1) // BLOCK_SIZE
    wait_until(lambda: bool(served.records()[worker].kv_manager_id), "its joining", 30.0)
    in_memory = {"tier": "host", "state": "resident"}
    before = counted(served, "kelp_kv_tier_blocks", **in_memory)
    generate(served, text_input=tale, max_tokens=MAX_TOKENS, kelp_worker="decode_1")
    wait_until(lambda: counted(served, "kelp_kv_tier_blocks", **in_memory) >= before + num_blocks, "its blocks", 30.0)
    answer = generate(served, text_input=tale, max_tokens=MAX_TOKENS, kelp_worker=worker)
    assert (answer["output_ids"], worker_of(answer)) == (reference.answer(tale, MAX_TOKENS), worker)
    assert answer["cached_tokens"] == num_blocks * BLOCK_SIZE


def report_slow_reads(server: KelpServer, name: str, tale: npt.NDArray[np.int32]) -> None:
    """Tell the manager in a worker's name, many times, that READing a prompt has taken all the time of its lease."""
    (manager,) = KvManagerDirectory(server.registry_folder, 5.0).snapshot()
    worker = server.records()[name]
    key = (worker.worker_id, worker.epoch)
    hashes = tuple(sequence_hashes(tale, BLOCK_SIZE, seed_hash(worker.layout.model_id)))
    leases = range(2**40, 2**40 + NUM_REPORTS)

    async def report() -> None:
        client = GrpcKvManagerClient(server.peer_token)
        address = WorkerAddress(manager.endpoint, manager.model_name, epoch=manager.epoch)
        try:
            onboards = [Onboard(*key, lease, tenant_digest(""), hashes, 0, 0.0, 5.0) for lease in leases]
            for leased in await client.call(address, onboards, 10.0):
                assert isinstance(leased, Leased) and leased.num_blocks == len(hashes), leased
            await asyncio.sleep(LEASED_S)
            releases = [Release(*key, (lease,), (), len(hashes), 60.0) for lease in leases]
            for done in await client.call(address, releases, 10.0):
                assert done == Done(1)
        finally:
            await client.close()

    asyncio.run(report())


def test_what_takes_longer_to_read_than_to_compute_is_computed(served: KelpServer) -> None:
    reference, tale = Reference(), f"Sooner computed than read. {TALE}"
    tokens = reference.encode(tale)
    names = sequence_hashes(tokens, BLOCK_SIZE, seed_hash(served.records()["decode"].layout.model_id))
    generate(served, text_input=tale, max_tokens=1, kelp_worker="decode")
    wait_until(lambda: num_in_memory(served, names) == len(names), "its blocks", 30.0)
    report_slow_reads(served, "decode", tokens)
    asked = {"worker": "decode_1", "outcome": "miss"}
    before = counted(served, "kelp_onboard_requests_total", **asked)
    answer = generate(served, text_input=tale, max_tokens=MAX_TOKENS, kelp_worker="decode_1")
    assert (answer["output_ids"], worker_of(answer)) == (reference.answer(tale, MAX_TOKENS), "decode_1")
    assert answer["cached_tokens"] == 0
    wait_until(lambda: counted(served, "kelp_onboard_requests_total", **asked) == before + 1, "its question", 15.0)
    served.wait_quiet()
