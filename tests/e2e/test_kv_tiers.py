"""Prompts whose KV has left the worker come back from the host's and the disk's tier with the reference's tokens."""

from __future__ import annotations

import contextlib
import itertools
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hf_reference import Expected
from prompts import MAX_TOKENS, PROMPTS, long_text

from support.serving import HOST, KelpServer
from support.waiting import wait_until

BLOCK_TOKENS = 16
NUM_BLOCKS = 64
PROMPT = "two chunks"
SETTINGS: dict[str, object] = {
    "executor.max_step_tokens": 256,
    "executor.threads": 1,
    "kv_manager.host_bytes": 384 * 1024**2,
    "kv_manager.lease_ttl_s": 3,
    "offload.onboard": "always",
    "registry.heartbeat_s": 0.5,
}
_salts = itertools.count()


@pytest.fixture(scope="module")
def tiered_server(expected: dict[str, Expected]) -> Iterator[KelpServer]:
    """A worker whose pool holds two prompts at most, and a host tier."""
    with KelpServer("aggregated", num_blocks=NUM_BLOCKS, settings=SETTINGS).start() as server:
        yield server


def reusable_tokens(reference: Expected) -> int:
    return (len(reference.prompt_ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def metric(server: KelpServer, name: str, **labels: str) -> float:
    """Sum over what the labels leave open."""
    with urllib.request.urlopen(f"http://{HOST}:{server.metrics_port}/metrics", timeout=5.0) as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rpartition(" ")[2]) for line in found if all(label in line for label in wanted))


def check(server: KelpServer, reference: Expected, num_cached: int, **fields: object) -> None:
    answer = server.ask(**PROMPTS[PROMPT], max_tokens=MAX_TOKENS, stream=True, **fields)
    assert answer.token_ids == reference.token_ids
    assert answer.text == reference.text
    assert answer.last.number("cached_tokens") == num_cached


def flood(server: KelpServer) -> None:
    """Evict everything from the worker's own pool."""
    for _ in range(2):
        answer = server.ask(text_input=long_text(36, start=300), max_tokens=2, cache_salt=f"flood {next(_salts)}")
        assert answer.last.number("num_input_tokens") > NUM_BLOCKS * BLOCK_TOKENS * 0.8


def wait_stored(server: KelpServer, tier: str, num_tokens: int, before: float = 0.0) -> None:
    wanted = before + num_tokens // BLOCK_TOKENS
    wait_until(
        lambda: metric(server, "kelp_kv_tier_blocks", tier=tier, state="resident") >= wanted, f"blocks in {tier}", 60.0
    )


def is_joined(server: KelpServer) -> bool:
    return all(record.kv_manager_id for record in server.records().values())


def test_an_evicted_prompt_comes_back_from_the_host_tier(
    tiered_server: KelpServer, expected: dict[str, Expected]
) -> None:
    reference = expected[PROMPT]
    num_tokens = reusable_tokens(reference)
    wait_until(lambda: is_joined(tiered_server), "the manager", 30.0)
    check(tiered_server, reference, 0)
    wait_stored(tiered_server, "host", num_tokens)
    flood(tiered_server)
    check(tiered_server, reference, num_tokens)
    wait_until(
        lambda: metric(tiered_server, "kelp_onboarded_blocks_total") == num_tokens // BLOCK_TOKENS, "the count", 15.0
    )
    flood(tiered_server)
    check(tiered_server, reference, 0, cache_salt="somebody else")
    tiered_server.wait_quiet()


def test_a_killed_manager_costs_no_request_and_is_found_again_with_its_blocks(
    tiered_server: KelpServer, expected: dict[str, Expected]
) -> None:
    reference = expected[PROMPT]
    num_tokens = reusable_tokens(reference)
    check(tiered_server, reference, num_tokens, cache_salt="somebody else")
    killed = tiered_server.stub("kv_block_manager")
    with tiered_server.open(text_input=long_text(8, start=500), max_tokens=40, ignore_eos=True) as call:
        call.next()
        killed.kill()
        assert sum(len(response.token_ids) for response in call) >= 30
    flood(tiered_server)
    wait_until(lambda: metric(tiered_server, "kelp_worker_kv_manager_failures_total") > 0, "the failure's count", 15.0)

    def is_back() -> bool:
        with contextlib.suppress(AssertionError):
            return tiered_server.stub("kv_block_manager").pid != killed.pid and is_joined(tiered_server)
        return False

    wait_until(is_back, "another manager", 60.0)
    check(tiered_server, reference, num_tokens)
    tiered_server.wait_quiet()


def test_after_everything_was_restarted_the_disk_has_it(expected: dict[str, Expected], tmp_path: Path) -> None:
    reference = expected[PROMPT]
    num_tokens = reusable_tokens(reference)
    settings = {**SETTINGS, "disk_tier.path": tmp_path / "disk", "disk_tier.max_bytes": 256 * 1024**2}
    server = KelpServer("aggregated", num_blocks=NUM_BLOCKS, settings=settings).start()
    try:
        wait_until(lambda: is_joined(server), "the manager", 30.0)
        check(server, reference, 0)
        wait_stored(server, "disk", num_tokens)
    finally:
        server.kill()
    with KelpServer("aggregated", num_blocks=NUM_BLOCKS, settings=settings).start() as server:
        wait_until(lambda: is_joined(server), "the manager", 30.0)
        check(server, reference, num_tokens)
        server.wait_quiet()
