from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kelp.cli import app
from kelp.core.errors import ConfigError, InternalError
from kelp.core.types import SequenceHash
from kelp.kv.eviction.catalogue import POLICY_NAMES, make_policy
from kelp.sim.eviction import Stream, block_costs_s, make_stream, replay, replay_named
from kelp.sim.eviction_bound import clairvoyant_s
from kelp.sim.eviction_report import evaluate, require_bounded
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.sessions import make_sessions
from kelp.timing.model import TimingModel

BLOCK_SIZE = 16
TIMING = TimingModel()
SAMPLE = Path(__file__).parents[3] / "perf" / "sim" / "sample" / "mooncake_conversation_200.jsonl.gz"


def prompt(name: str) -> tuple[SequenceHash, ...]:
    """One block a letter, named by all letters up to it."""
    return tuple(SequenceHash(name[: end + 1].encode().ljust(16)) for end in range(len(name)))


def workload(*names: str) -> Workload:
    requests = tuple(SimRequest(float(at), len(name) * BLOCK_SIZE, 1, prompt(name)) for at, name in enumerate(names))
    return Workload("letters", BLOCK_SIZE, requests)


def stream_of(*names: str, upper: float = 0.0) -> Stream:
    return make_stream(workload(*names), upper)


def cost_s(*positions: int) -> float:
    costs = block_costs_s(TIMING, BLOCK_SIZE, max(positions) + 1)
    return sum(costs[position] for position in positions)


def best_saved_s(stream: Stream, num_slots: int) -> float:
    """All choices of what to keep after each request, tried out."""
    kept: dict[frozenset[SequenceHash], float] = {frozenset(): 0.0}
    for first, blocks in stream.requests:
        following: dict[frozenset[SequenceHash], float] = {}
        for tier, saved_s in kept.items():
            found = itertools.takewhile(lambda item, tier=tier: item[1] in tier, list(enumerate(blocks))[first:])  # type: ignore[misc]
            now_s = saved_s + sum(stream.costs_s[position] for position, _ in found)
            available = sorted(tier | set(blocks[first:]))
            for choice in itertools.combinations(available, min(num_slots, len(available))):
                key = frozenset(choice)
                following[key] = max(following.get(key, 0.0), now_s)
        kept = following
    return max(kept.values())


def test_a_blocks_cost_is_its_share_of_the_prompts_prefill() -> None:
    costs = block_costs_s(TIMING, BLOCK_SIZE, 5)
    assert sum(costs) == pytest.approx(TIMING.prefill_s(5 * BLOCK_SIZE, 0) - TIMING.step_s)
    assert costs == sorted(costs)


def test_only_leading_blocks_save_prefill() -> None:
    stream = stream_of("abc", "abd", "xbc")
    assert replay_named(stream, "lru", 1.0) == pytest.approx([0.0, cost_s(0, 1), 0.0])


def test_what_the_upper_tier_has_is_not_asked_of_the_lower_one() -> None:
    stream = stream_of("abcd", "abcd", "xyzw", "abcd", upper=0.5)
    assert [first for first, _ in stream.requests] == [0, 4, 0, 0]
    assert stream.upper_saved_s == pytest.approx(cost_s(0, 1, 2, 3))
    assert replay_named(stream, "lru", 1.0) == pytest.approx([0.0, 0.0, 0.0, cost_s(0, 1, 2, 3)])


def test_a_prompt_longer_than_the_tier_leaves_its_head_there() -> None:
    stream = stream_of("abcdef", "abcdef")
    policy = make_policy("lru", 3)
    assert replay(stream, policy, 3) == pytest.approx([0.0, cost_s(0, 1, 2)])
    assert len(policy) == 3


def test_the_bound_is_no_less_than_the_best_of_all_choices() -> None:
    generator = random.Random(3)
    for _ in range(25):
        names = ["".join(generator.choices("ab", k=generator.randint(1, 3))) for _ in range(6)]
        stream = stream_of(*names)
        for num_slots in (1, 2, 3):
            bound_s = sum(clairvoyant_s(stream, num_slots))
            assert bound_s >= best_saved_s(stream, num_slots) - 1e-12, names
            for name in POLICY_NAMES:
                assert bound_s >= sum(replay(stream, make_policy(name, num_slots), num_slots)) - 1e-12


def test_the_bound_is_reached_where_everything_fits() -> None:
    stream = stream_of("abc", "abd", "abc", "xy", "xyz")
    assert sum(clairvoyant_s(stream, 100)) == pytest.approx(sum(replay_named(stream, "lru", 1.0)), rel=0.01)


def test_figures_that_beat_the_bound_are_refused() -> None:
    require_bounded("letters", "lru", 1.0, 1.0)
    with pytest.raises(InternalError, match="more than the bound"):
        require_bounded("letters", "lru", 1.1, 1.0)


def saved(rows: Sequence[object]) -> str:
    return repr(rows)


def test_equal_workloads_give_equal_rows_and_none_beats_the_bound() -> None:
    def rows() -> list[object]:
        stream = make_stream(make_sessions(150, 8.0, 5, block_size=128))
        return list(evaluate(stream, [0.05, 0.3], POLICY_NAMES, lambda *_: lambda _: None))

    first = rows()
    assert saved(first) == saved(rows())
    assert len(first) == 2


def evict(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, ["sim", "evict", *arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_the_command_prints_a_row_a_size_and_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    shown = evict("--trace", str(SAMPLE), "--size", "10", "--size", "40", "--json", str(target))
    assert "clairvoyant" in shown and "mooncake_conversation_200" in shown
    rows = json.loads(target.read_text())["rows"]
    assert [row["size"] for row in rows] == [0.1, 0.4]
    assert set(rows[0]["saved"]) == set(POLICY_NAMES)
    assert all(row["clairvoyant"] >= max(row["saved"].values()) for row in rows)


def test_the_command_plays_sessions_by_default_and_only_the_policies_asked_for() -> None:
    shown = evict("--requests", "60", "--size", "20", "--policy", "lru", "--upper", "0")
    assert "sessions" in shown and "lru" in shown and "s3-fifo" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "0"), "--size 0.0: must be above 0"),
        (("--policy", "fifo"), "--policy fifo: must be one of cost, lru, lfu, s3-fifo"),
        (("--json", "/nowhere/rows.json"), "there is no folder /nowhere"),
        (("--trace", "/nowhere/trace.jsonl"), "/nowhere/trace.jsonl"),
    ],
)
def test_what_cannot_be_played_is_refused_by_name(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, ["sim", "evict", *arguments], catch_exceptions=False)
    assert message in caught.value.text
