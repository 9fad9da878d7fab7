from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kelp.core.errors import ConfigError
from kelp.sim.bound import hit_share, pooled_hits, prompt_tokens
from kelp.sim.pacing import part_of, rate_rps
from kelp.sim.requests import Workload
from kelp.sim.sessions import SessionLoad, make_sessions

ONLY_CHATS = SessionLoad(agent_share=0.0, document_share=0.0, burst_share=0.0)


def shared_blocks(workload: Workload, one: int, other: int) -> int:
    pairs = zip(workload.requests[one].block_hashes, workload.requests[other].block_hashes, strict=False)
    return sum(a == b for a, b in pairs)


def turns_of(workload: Workload) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, request in enumerate(workload.requests):
        found.setdefault(request.session_id, []).append(index)
    return found


def test_equal_arguments_give_equal_requests_and_another_seed_others() -> None:
    one, same, other = make_sessions(200, 5.0, 1), make_sessions(200, 5.0, 1), make_sessions(200, 5.0, 2)
    assert list(one.requests) == list(same.requests) != list(other.requests)


def test_there_are_exactly_as_many_requests_as_asked_for_in_order_of_arrival() -> None:
    workload = make_sessions(1234, 5.0, 1)
    arrivals = [request.arrival_s for request in workload.requests]
    assert len(arrivals) == 1234 and arrivals[0] == 0.0 and arrivals == sorted(arrivals)


def test_the_rate_is_met_once_sessions_have_built_up() -> None:
    workload = make_sessions(20_000, 50.0, 1, replace(ONLY_CHATS, diurnal_swing=0.0))
    assert rate_rps(part_of(workload, 0.5, 1.0)) == pytest.approx(50.0, rel=0.1)


def test_every_full_block_has_a_name_and_positions_never_share_one() -> None:
    workload = make_sessions(100, 5.0, 1, block_size=32)
    for request in workload.requests:
        assert len(request.block_hashes) == request.num_prompt_tokens // 32 == len(set(request.block_hashes))
        assert all(len(block_hash) == 16 for block_hash in request.block_hashes)


def test_shared_blocks_are_a_prefix() -> None:
    hashes = [request.block_hashes for request in make_sessions(150, 5.0, 4).requests]
    for one in hashes:
        for other in hashes[:40]:
            common = [a == b for a, b in zip(one, other, strict=False)]
            assert common == sorted(common, reverse=True)


def test_a_turn_extends_the_prompt_and_the_answer_before_it() -> None:
    workload = make_sessions(500, 5.0, 1, ONLY_CHATS)
    pairs = [pair for turns in turns_of(workload).values() for pair in zip(turns, turns[1:], strict=False)]
    assert pairs
    for before, after in pairs:
        old, new = workload.requests[before], workload.requests[after]
        assert new.num_prompt_tokens > old.num_prompt_tokens + old.num_output_tokens
        assert shared_blocks(workload, before, after) == len(old.block_hashes)
        assert new.arrival_s > old.arrival_s


def test_sessions_share_system_prompts_the_first_ones_most() -> None:
    workload = make_sessions(3000, 20.0, 1, replace(ONLY_CHATS, num_turns=1.0, num_system_prompts=10))
    roots = [request.block_hashes[0] for request in workload.requests]
    counts = sorted((roots.count(root) for root in set(roots)), reverse=True)
    assert len(counts) == 10 and counts[0] > 3 * counts[-1]


def test_agents_have_children_that_start_together_and_share_all_that_came_before() -> None:
    load = SessionLoad(chat_share=0.0, document_share=0.0, burst_share=0.0, fan_out=3)
    workload = make_sessions(400, 5.0, 1, load)
    together = [
        (one, other)
        for turns in turns_of(workload).values()
        for one, other in zip(turns, turns[1:], strict=False)
        if workload.requests[one].arrival_s == workload.requests[other].arrival_s
    ]
    assert together
    for one, other in together:
        shortest = min(len(workload.requests[index].block_hashes) for index in (one, other))
        assert 0 < shared_blocks(workload, one, other) <= shortest


def test_bursts_bring_many_sessions_with_one_text_within_a_second() -> None:
    load = replace(ONLY_CHATS, burst_share=0.9, num_turns=1.0, diurnal_swing=0.0)
    workload = make_sessions(400, 1.0, 1, load)
    arrivals = np.array([request.arrival_s for request in workload.requests])
    busiest = max(int(((arrivals >= at_s) & (arrivals < at_s + 1)).sum()) for at_s in arrivals)
    assert busiest >= 20


def test_the_rate_swings_over_a_day() -> None:
    load = replace(ONLY_CHATS, num_turns=1.0, diurnal_swing=0.8, diurnal_period_s=100.0)
    workload = make_sessions(20_000, 100.0, 1, load)
    counts, _ = np.histogram([request.arrival_s for request in workload.requests], bins=np.arange(0, 200, 10))
    assert counts.max() > 3 * counts.min()


def test_prefixes_are_worth_caching_but_not_everything_is_one() -> None:
    workload = make_sessions(1000, 10.0, 1)
    assert 0.5 < hit_share(pooled_hits(workload, None), prompt_tokens(workload)) < 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1.0), "--requests"), ((10, 0.0), "--rate"), ((10, float("nan")), "--rate"), ((10, float("inf")), "--rate")],
)
def test_figures_out_of_range_are_named(arguments: tuple[int, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sessions(*arguments, seed=0)


def test_a_swing_of_all_the_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="diurnal_swing"):
        make_sessions(10, 1.0, 0, SessionLoad(diurnal_swing=1.0))
