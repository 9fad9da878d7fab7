"""Prompts whose KV has left the worker come back from host memory, disk and object store with the reference's tokens.

The tests follow each other: one host computes, is killed and started again; then another one that shares its store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hf_reference import Expected, reference_answers
from kv_host import BLOCK_BYTES, GROUP_BLOCKS, KvHost, reusable_blocks, store_settings
from kv_spoil import spoil_in_store, spoil_on_disk
from kv_storm import NUM_CLIENTS, Case, Storm, storm_cases

from s3_server import SECRET_KEY, S3Server, aws_environment, s3_server
from support.kv_stats import wait_nothing_held, wait_stats
from support.object_rig import Bucket
from support.secrets_kept import told_by
from support.serving import MODEL
from support.waiting import wait_until

__all__ = ["s3_server"]
PROMPT, MIXED = "two chunks", "story"
NUM_STORED = 10
"""Of the mixed prompt's blocks, those that the first host computes."""
SMALL = 40
"""Blocks of a host tier that a storm overflows."""
SMALL_DISK = {"disk_tier.max_bytes": 120 * BLOCK_BYTES}
"""The first host's: a storm overflows it, what is computed before does not."""
SPOILT, SPOILT_BLOCK = "spoilt", 9
"""A tenant of whose blocks this one, the second of its group, is damaged on disk and in the store."""


@dataclass(frozen=True)
class Sites:
    """Two hosts with one object store."""

    first: KvHost
    second: KvHost
    bucket: Bucket


@pytest.fixture(scope="module")
def expected(requirements: None) -> dict[str, Expected]:
    """The reference's answers to these two alone: other files, which need all, run in another process."""
    return reference_answers("float32", [PROMPT, MIXED])


@pytest.fixture(scope="module")
def storm(requirements: None) -> list[Case]:
    return storm_cases(MODEL)


@pytest.fixture(scope="module")
def sites(
    s3_server: S3Server, expected: dict[str, Expected], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sites]:
    """The first one runs; nothing is stored yet."""
    with pytest.MonkeyPatch.context() as patch:
        aws_environment(patch)
        bucket = Bucket(s3_server)
        store = store_settings(s3_server, bucket.name)
        sites = Sites(
            KvHost(tmp_path_factory.mktemp("first"), store),
            KvHost(tmp_path_factory.mktemp("second"), store, is_isolated=True),
            bucket,
        )
        try:
            sites.first.start(160, **SMALL_DISK)
            yield sites
            sites.first.stop()
            sites.second.stop()
        finally:
            sites.first.close()
            sites.second.close()
            bucket.close()


@pytest.fixture(scope="module")
def computed(sites: Sites, expected: dict[str, Expected]) -> Sites:
    """The first host has computed and stored what the tests are about."""
    for salt in ("", SPOILT):
        assert sites.first.check(expected[PROMPT], cache_salt=salt) == 0
        sites.first.have_stored(expected[PROMPT], reusable_blocks(expected[PROMPT]), salt)
    assert sites.first.have_computed(expected[MIXED], NUM_STORED) == 0
    sites.first.have_stored(expected[MIXED], NUM_STORED)
    num_blocks = 2 * reusable_blocks(expected[PROMPT]) + NUM_STORED
    wait_stats(sites.first.server, "all in memory and on disk", resident_host=num_blocks, resident_disk=num_blocks)
    num_grouped = 2 * (reusable_blocks(expected[PROMPT]) // GROUP_BLOCKS * GROUP_BLOCKS) + NUM_STORED
    wait_stats(sites.first.server, "whole groups in the store", written_object=num_grouped * BLOCK_BYTES)
    return sites


@pytest.fixture(scope="module")
def restarted(computed: Sites, expected: dict[str, Expected]) -> KvHost:
    """The first host after all its processes were killed; a host tier of another size begins empty."""
    names = computed.first.names(expected[PROMPT], SPOILT_BLOCK + 1, SPOILT)
    computed.first.kill()
    spoil_on_disk(computed.first.disk_folder, names[SPOILT_BLOCK], seed=4)
    computed.first.start(SMALL, **SMALL_DISK)
    return computed.first


@pytest.fixture(scope="module")
def elsewhere(computed: Sites) -> KvHost:
    """The second host, the first one being gone."""
    computed.first.stop()
    computed.second.start(SMALL, **{"kv_manager.eviction": "lru"})
    # What it has listed it need not ask for, which has to be answered in a quarter of a second.
    wait_stats(computed.second.server, "a look into the store", listed_object=1)
    return computed.second


def test_an_evicted_prompt_comes_back_from_the_host_tier(computed: Sites, expected: dict[str, Expected]) -> None:
    host, num_blocks = computed.first, reusable_blocks(expected[PROMPT])
    host.flood_pool()
    before = wait_nothing_held(host.server)
    assert host.check(expected[PROMPT]) == num_blocks
    assert wait_nothing_held(host.server).hits("host") - before.hits("host") >= num_blocks - 2
    assert host.check(expected[PROMPT], cache_salt="somebody else") == 0
    host.server.wait_quiet()


def test_after_everything_was_killed_the_disk_has_it(restarted: KvHost, expected: dict[str, Expected]) -> None:
    num_blocks = reusable_blocks(expected[PROMPT])
    before = wait_stats(restarted.server, "the disk's index", resident_disk=2 * num_blocks + NUM_STORED)
    assert before.resident("host") == 0
    assert restarted.check(expected[PROMPT]) == num_blocks
    after = wait_nothing_held(restarted.server)
    assert [after.hits(tier) for tier in ("host", "disk", "object")] == [0, num_blocks, 0]
    restarted.server.wait_quiet()


def test_a_block_whose_bytes_were_flipped_on_disk_is_computed_and_counted(
    restarted: KvHost, expected: dict[str, Expected]
) -> None:
    before = wait_nothing_held(restarted.server)
    assert before.corrupt("disk") == 0
    assert restarted.check(expected[PROMPT], cache_salt=SPOILT) == SPOILT_BLOCK
    assert wait_nothing_held(restarted.server).corrupt("disk") == 1
    wait_stats(restarted.server, "the block, written anew", resident_disk=before.resident("disk"))
    restarted.server.wait_quiet()


def test_sixteen_clients_on_tiers_that_always_evict_get_the_references_tokens(
    restarted: KvHost, storm: list[Case]
) -> None:
    before = wait_nothing_held(restarted.server)
    load = Storm(restarted.server, storm, seed=1)
    load.run(4 * NUM_CLIENTS)
    assert load.num_answered > 3 * NUM_CLIENTS
    restarted.server.wait_quiet()
    after = wait_nothing_held(restarted.server)
    for tier in ("host", "disk"):
        assert after.evicted(tier) > before.evicted(tier)
        assert after.hits(tier) > before.hits(tier)
    for tier in ("host", "disk", "object"):
        assert after.corrupt(tier) == before.corrupt(tier)
    assert load.num_cached_tokens > 0


def test_a_manager_killed_while_it_is_full_costs_no_answer_and_is_found_again_with_its_blocks(
    restarted: KvHost, storm: list[Case]
) -> None:
    kill_under_load(restarted, storm, seed=2)


def test_another_host_brings_from_the_store_what_it_never_computed(
    elsewhere: KvHost, expected: dict[str, Expected]
) -> None:
    num_blocks = reusable_blocks(expected[PROMPT]) // GROUP_BLOCKS * GROUP_BLOCKS
    assert elsewhere.check(expected[PROMPT]) == num_blocks
    after = wait_nothing_held(elsewhere.server)
    assert [after.hits(tier) for tier in ("host", "disk", "object")] == [0, 0, num_blocks]
    elsewhere.server.wait_quiet()


def test_a_block_whose_bytes_were_flipped_in_the_store_is_computed_and_counted(
    elsewhere: KvHost, computed: Sites, expected: dict[str, Expected]
) -> None:
    names = elsewhere.names(expected[PROMPT], SPOILT_BLOCK + 1, SPOILT)
    spoil_in_store(computed.bucket, names[SPOILT_BLOCK], BLOCK_BYTES, seed=5)
    before = wait_nothing_held(elsewhere.server)
    assert before.corrupt("object") == 0
    assert elsewhere.check(expected[PROMPT], cache_salt=SPOILT) == SPOILT_BLOCK
    after = wait_nothing_held(elsewhere.server)
    assert after.corrupt("object") == 1
    assert after.hits("object") > before.hits("object")
    elsewhere.server.wait_quiet()


def test_a_prompt_comes_from_all_tiers_at_once(elsewhere: KvHost, expected: dict[str, Expected]) -> None:
    reference = expected[MIXED]
    assert reusable_blocks(reference) > NUM_STORED, "something has to be computed"
    # What is used again after it came from the store is written to the disk.
    assert elsewhere.have_computed(reference, 8) == 8
    elsewhere.flood_pool()
    assert elsewhere.have_computed(reference, 8) == 8
    wait_nothing_held(elsewhere.server)
    elsewhere.flood_memory()
    assert elsewhere.have_computed(reference, 4) == 4
    elsewhere.flood_pool()
    before = wait_nothing_held(elsewhere.server)
    assert elsewhere.check(reference) == NUM_STORED
    after = wait_nothing_held(elsewhere.server)
    gained = [after.hits(tier) - before.hits(tier) for tier in ("host", "disk", "object")]
    assert all(gained), gained
    assert sum(gained) <= NUM_STORED
    elsewhere.server.wait_quiet()


def test_an_isolated_manager_killed_under_load_costs_no_answer_and_comes_back(
    elsewhere: KvHost, storm: list[Case]
) -> None:
    kill_under_load(elsewhere, storm, seed=3)


def test_neither_the_stores_secret_nor_the_peers_token_is_in_a_log_or_a_command_line(elsewhere: KvHost) -> None:
    token = (elsewhere.server.run_folder / "peer-token").read_text().strip()
    assert told_by(elsewhere.server, [token, SECRET_KEY]) == []


def kill_under_load(host: KvHost, cases: list[Case], seed: int) -> None:
    """The storm goes on until another manager has been of use."""
    Storm(host.server, cases, seed).run(NUM_CLIENTS)
    wait_stats(host.server, "a full host tier", resident_host=SMALL - 2 * GROUP_BLOCKS)
    killed = host.server.stub("kv_block_manager")
    is_over = threading.Event()
    load = Storm(host.server, cases, seed + 100)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load.run, 10**6, is_over.is_set)
        try:
            wait_until(lambda: load.num_answered >= 4 or running.done(), "load", 60.0)
            killed.kill()
            host.wait_back(killed.pid)
            wait_stats(host.server, "hits in what the killed one left", hits_host=1)
        finally:
            is_over.set()
        running.result()
    host.server.wait_quiet()
    assert wait_nothing_held(host.server).total("kelp_kv_tier_corrupt_blocks_total") == 0
