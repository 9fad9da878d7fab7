from __future__ import annotations

from kelp.core.types import SequenceHash
from kelp.kv.pool import BlockPool
from kelp.sim.bound import hit_share, pooled_hits, prompt_tokens
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.sessions import make_sessions


def workload_of(*prompts: str, tail_tokens: int = 0) -> Workload:
    """One letter is one block, named by the prompt up to it."""
    requests = []
    for index, prompt in enumerate(prompts):
        hashes = tuple(SequenceHash(prompt[: end + 1].encode().ljust(16)) for end in range(len(prompt)))
        requests.append(SimRequest(float(index), len(prompt) * 4 + tail_tokens, 1, hashes))
    return Workload("letters", 4, tuple(requests))


def test_only_leading_blocks_that_came_before_are_hits() -> None:
    assert pooled_hits(workload_of("abc", "abd", "xbc", "abc"), None).tolist() == [0, 8, 0, 12]


def test_the_tail_of_a_prompt_is_forgotten_before_its_head() -> None:
    assert pooled_hits(workload_of("abcd", "x", "abcd"), 4).tolist() == [0, 0, 12]


def test_what_was_used_last_stays() -> None:
    assert pooled_hits(workload_of("a", "b", "a", "c", "a", "b"), 2).tolist() == [0, 0, 4, 0, 4, 0]


def test_a_prompt_larger_than_the_cache_leaves_its_head() -> None:
    assert pooled_hits(workload_of("abcdef", "abcdef"), 4).tolist() == [0, 16]


def test_tokens_of_partial_blocks_count_against_the_share() -> None:
    workload = workload_of("ab", "ab", tail_tokens=2)
    assert hit_share(pooled_hits(workload, None), prompt_tokens(workload)) == 8 / 20


def test_an_empty_workload_has_no_share() -> None:
    workload = Workload("empty", 4, ())
    assert hit_share(pooled_hits(workload, 1), prompt_tokens(workload)) == 0.0


def test_the_bound_is_what_the_real_pool_does_with_requests_that_take_no_time() -> None:
    workload = make_sessions(300, 10.0, seed=3)
    num_blocks = 2500
    pool = BlockPool(num_blocks)
    found = []
    for request in workload.requests:
        matched = pool.match(request.block_hashes)
        taken = pool.allocate(len(request.block_hashes) - len(matched))
        for block_id, block_hash in zip(taken, request.block_hashes[len(matched) :], strict=True):
            pool.seal(block_id, block_hash)
        pool.release([*matched, *taken])
        found.append(len(matched) * workload.block_size)
    expected = pooled_hits(workload, num_blocks).tolist()
    assert sum(found) <= sum(expected) <= sum(found) * 1.02
