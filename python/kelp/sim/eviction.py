"""Judges eviction policies: what the tier below a worker's own blocks saves, in seconds of prefill.

The upper tier is a small cache such as `kv.pool` (least recently used, tails first). What it holds after a request does
not depend on where the request's blocks came from, so it is played once, and what is left of each prompt is what the
lower tier is asked for: `Stream`. The lower tier runs the block manager's own policies (`kv.eviction`), written
through: leading blocks it has are hits and need not be computed; the others are, and are stored when they are sealed.

What a block saves is its share of `TimingModel.prefill_s`: linear, plus attention to all tokens before it. Requests
take no time here, and one at a time holds its blocks. Equal input gives equal figures; nothing reads a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kelp.core.config_kv import EvictionName
from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, EvictionPolicy
from kelp.kv.eviction.catalogue import make_policy
from kelp.sim.bound import pooled_hits
from kelp.sim.requests import Workload
from kelp.timing.model import TimingModel

DEFAULT_SIZES = (0.025, 0.05, 0.1, 0.2, 0.4)
"""Of the lower tier, as shares of a workload's unique blocks."""
DEFAULT_UPPER = 0.01
"""Of the upper tier."""

Watch = Callable[[int], None]
"""Told how many requests have been played."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What a lower tier is asked for.

    Attributes:
        requests: `(first, blocks)`: blocks of the prompt, of which the upper tier has those before position `first`.
        costs_s: Computing a block, by position.
        num_unique: Different blocks.
        total_s: Computing all full blocks of all prompts.
        upper_saved_s: Of it, saved by the upper tier.
    """

    name: str
    upper: float
    requests: Sequence[tuple[int, Sequence[SequenceHash]]]
    costs_s: Sequence[float]
    num_unique: int
    total_s: float
    upper_saved_s: float

    def num_slots(self, size: float) -> int:
        """A tier of this share of the unique blocks."""
        return max(1, int(self.num_unique * size))


def block_costs_s(timing: TimingModel, block_size: int, num_blocks: int) -> list[float]:
    """What computing a block takes, by position; steps' constant cost apart, which no single block causes."""
    costs = (timing.prefill_s(block_size, position * block_size) - timing.step_s for position in range(num_blocks))
    return list(costs)


def make_stream(workload: Workload, upper: float = DEFAULT_UPPER, timing: TimingModel | None = None) -> Stream:
    """Play the upper tier.

    Args:
        workload: In order of arrival.
        upper: Its size as a share of the workload's unique blocks; 0 for none.
        timing: What prefill takes; `TimingModel()` by default.
    """
    names: dict[SequenceHash, SequenceHash] = {}
    prompts = [tuple(names.setdefault(name, name) for name in request.block_hashes) for request in workload.requests]
    found = pooled_hits(workload, int(len(names) * upper)) // workload.block_size
    costs_s = block_costs_s(timing or TimingModel(), workload.block_size, max(map(len, prompts), default=0))
    before_s = [0.0]
    for cost_s in costs_s:
        before_s.append(before_s[-1] + cost_s)
    return Stream(
        name=workload.name,
        upper=upper,
        requests=list(zip(found.tolist(), prompts, strict=True)),
        costs_s=costs_s,
        num_unique=len(names),
        total_s=sum(before_s[len(prompt)] for prompt in prompts),
        upper_saved_s=sum(before_s[count] for count in found.tolist()),
    )


def replay(stream: Stream, policy: EvictionPolicy, num_slots: int, watch: Watch | None = None) -> list[float]:
    """Play a lower tier of `num_slots` blocks; gives the seconds of prefill saved by it, for each request."""
    tier = _Tier(policy, num_slots, stream.costs_s)
    saved_s = []
    for index, (first, blocks) in enumerate(stream.requests):
        saved_s.append(tier.serve(first, blocks))
        if watch is not None:
            watch(index + 1)
    return saved_s


def replay_named(stream: Stream, name: EvictionName, size: float, watch: Watch | None = None) -> list[float]:
    """`replay` with a new policy and a tier of this share of the unique blocks."""
    num_slots = stream.num_slots(size)
    return replay(stream, make_policy(name, num_slots), num_slots, watch)


class _Tier:
    def __init__(self, policy: EvictionPolicy, num_slots: int, costs_s: Sequence[float]) -> None:
        self._policy = policy
        self._num_slots = num_slots
        self._costs_s = costs_s
        self._resident: set[SequenceHash] = set()

    def serve(self, first: int, blocks: Sequence[SequenceHash]) -> float:
        """Seconds saved by the leading ones of `blocks[first:]`; the others are computed, and stored in order."""
        policy, resident = self._policy, self._resident
        held = set(blocks[first:])

        def is_held(block: SequenceHash) -> bool:
            return block in held

        num_found, num_blocks = first, len(blocks)
        saved_s = 0.0
        while num_found < num_blocks and blocks[num_found] in resident:
            policy.hit(blocks[num_found])
            saved_s += self._costs_s[num_found]
            num_found += 1
        for position in range(num_found, num_blocks):
            block = blocks[position]
            if block in resident:
                policy.hit(block)
                continue
            if len(resident) >= self._num_slots:
                victim = policy.victim(is_held)
                if victim is None:
                    break
                policy.remove(victim)
                resident.remove(victim)
            parent = blocks[position - 1] if position else None
            policy.insert(block, BlockFacts(parent, position, self._costs_s[position]))
            resident.add(block)
        return saved_s
