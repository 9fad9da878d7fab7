"""Two mock workers behind one KV block manager: what one has computed, the router finds below the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mock_fleet_rig import Reference, explain, generate, model_of, samples, total, worker_of

from support.serving import KelpServer
from support.waiting import wait_until

BLOCK_SIZE = 16
MAX_TOKENS = 8
SETTINGS: dict[str, object] = {
    "kv_manager.host_bytes": 64 * 1024**2,
    "offload.onboard": "always",
    "registry.heartbeat_s": 0.5,
}
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
