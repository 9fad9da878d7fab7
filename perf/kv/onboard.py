"""TTFT of a prompt whose prefix is onboarded from each tier, against computing it, through the served system.

A round has a fresh prompt of each length, short ones included that only break-even lengths are made of. `plain`
computes it; a worker of `first` computes it too, and stores it; when it lies on disk and in the store as well, a second
worker onboards it from the arena (G2), another host from the store (G4). The prompts of the round before have left the
small arena by then: a third worker onboards them from disk (G3). What a request found where is read off the managers'
counters, and a sample that came from elsewhere does not count.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from kelp.core.types import Tier
from perf.kv.asking import Asker, Reply
from perf.kv.break_even import SHORT_LENGTHS, break_even
from perf.kv.model import BLOCK_SIZE, block_bytes, model_folder, vocabulary_size
from perf.kv.served_tiers import GROUP_BLOCKS, LOWER, ONLY, STORER, UPPER, ServedTiers, TierSizes, running, wait_for
from perf.kv.store import Store
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import MIN_PAIRS, Pair, median, paired_ratio
from perf.suite import BenchError

LENGTHS = (512, 2048, 7680)
MEASURED = (*SHORT_LENGTHS, *LENGTHS)
TIERS = (Tier.HOST, Tier.DISK, Tier.OBJECT)
G_NAMES = {Tier.HOST: "g2", Tier.DISK: "g3", Tier.OBJECT: "g4"}
BREAK_EVEN = "break_even"
RECOMPUTED = "prefill on a server without block manager"

_BARS = {(2048, Tier.HOST): 5.0, (2048, Tier.DISK): 3.0}
_NUM_ROUNDS = 5
_NUM_ROUNDS_LONG = 15
_SPARE_ROUNDS = 2
_TAIL_TOKENS = 8
"""Of a prompt, behind the prefix: what is computed in any case."""
_SPARE_BLOCKS = 20
_MIN_SHARE = 0.95
"""Of the prefix, must have come from the tier in question."""
_SETTLE_S = 120.0
_THREADS = 2


def lengths_of(tier: Tier) -> tuple[int, ...]:
    """What is onboarded from a tier; the object store has whole groups only."""
    least = GROUP_BLOCKS * BLOCK_SIZE if tier is Tier.OBJECT else 0
    return tuple(length for length in MEASURED if length >= least)


def case_name(length: int) -> str:
    """Such as `onboard_2048`."""
    return f"onboard_{length}"


def metric_name(tier: Tier) -> str:
    """Such as `ttft_g2/recompute`."""
    return f"ttft_{G_NAMES[tier]}/recompute"


REQUIRED = (
    *(RequiredRow(case_name(length), metric_name(tier), "ms", True) for length in LENGTHS for tier in TIERS),
    *(RequiredRow(BREAK_EVEN, f"tokens_{G_NAMES[tier]}", "tokens") for tier in TIERS),
)


@dataclass(slots=True)
class Samples:
    """Seconds to the first token: onboarded, and computed in the same round.

    Attributes:
        troubles: Why a sample did not count, by length and tier; the last one.
    """

    pairs: dict[tuple[int, Tier], list[Pair]] = field(default_factory=dict)
    troubles: dict[tuple[int, Tier], str] = field(default_factory=dict)

    def count(self) -> int:
        """Pairs of the cell that has fewest."""
        return min(len(self.pairs.get((length, tier), ())) for tier in TIERS for length in lengths_of(tier))


def fault_of(reply: Reply, length: int, tier: Tier, found: dict[str, float]) -> str:
    """Why a sample does not count; empty if it does.

    Args:
        reply: What came.
        length: Tokens of the prefix.
        tier: Where it was meant to come from.
        found: Blocks found by tier during the request, by the tier's name.
    """
    least = _MIN_SHARE * length
    if reply.cached_tokens < least:
        return f"{reply.cached_tokens} of {length} tokens were onboarded"
    if found.get(tier.name.lower(), 0) * BLOCK_SIZE < least:
        return f"blocks were found elsewhere than in {G_NAMES[tier]}: {found}"
    return ""


def measurements(samples: Samples) -> Iterator[Measurement]:
    """All rows."""
    for length in LENGTHS:
        for tier in TIERS:
            pairs = samples.pairs.get((length, tier), [])
            trouble = samples.troubles.get((length, tier), "nothing was measured")
            yield _row(length, tier, pairs, "" if len(pairs) >= MIN_PAIRS else f"{len(pairs)} samples: {trouble}")
    for tier in TIERS:
        yield _break_even_row(tier, samples)


def _row(length: int, tier: Tier, pairs: Sequence[Pair], trouble: str) -> Measurement:
    if not pairs:
        return Measurement(case_name(length), metric_name(tier), "ms", None, trouble=trouble)
    comparison = Comparison(
        RECOMPUTED,
        median([pair.reference for pair in pairs]) * 1e3,
        paired_ratio(pairs, is_lower_better=True),
        _BARS.get((length, tier)),
    )
    value_ms = median([pair.value for pair in pairs]) * 1e3
    return Measurement(case_name(length), metric_name(tier), "ms", value_ms, comparison, trouble)


def _break_even_row(tier: Tier, samples: Samples) -> Measurement:
    metric = f"tokens_{G_NAMES[tier]}"
    columns = {length: samples.pairs.get((length, tier), []) for length in lengths_of(tier)}
    if not all(columns.values()):
        return Measurement(BREAK_EVEN, metric, "tokens", None, trouble="not all lengths were measured")
    bring = {length: median([pair.value for pair in pairs]) for length, pairs in columns.items()}
    compute = {length: median([pair.reference for pair in pairs]) for length, pairs in columns.items()}
    found = break_even(bring, compute)
    return Measurement(BREAK_EVEN, metric, found.unit("tokens"), found.tokens)


class _Rounds:
    """Rounds on running servers."""

    def __init__(self, served: ServedTiers, seed: int) -> None:
        self._served = served
        self._random = random.Random(seed)
        self._num_tokens = vocabulary_size()
        self._former: dict[int, list[int]] = {}
        self.samples = Samples()

    def warm_up(self) -> None:
        """One round that does not count, so that every worker has onboarded before."""
        for length in MEASURED:
            prompt = self._former[length] = self._prompt(length)
            self._served.plain.ask(prompt, ONLY)
            self._store(prompt, length)
            self._served.second.ask(prompt, ONLY)
            self._served.first.ask(prompt, UPPER)
        unused = self._prompt(LENGTHS[0])
        self._store(unused, LENGTHS[0])
        self._served.first.ask(unused, LOWER)

    def run(self) -> None:
        """One round."""
        prompts = {length: self._prompt(length) for length in MEASURED}
        computed_s = {length: self._fresh(prompt, length) for length, prompt in prompts.items()}
        for length, former in self._former.items():
            self._onboard(self._served.first, LOWER, former, (length, Tier.DISK), computed_s[length])
        self._former = prompts

    def _fresh(self, prompt: list[int], length: int) -> float:
        """Compute a prompt, store it, onboard it from where it is now; returns what computing took."""
        computed_s = self._served.plain.ask(prompt, ONLY).ttft_s
        self._store(prompt, length)
        self._onboard(self._served.first, UPPER, prompt, (length, Tier.HOST), computed_s)
        if length in lengths_of(Tier.OBJECT):
            self._onboard(self._served.second, ONLY, prompt, (length, Tier.OBJECT), computed_s)
        return computed_s

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(self._num_tokens // 2, self._num_tokens) for _ in range(length + _TAIL_TOKENS)]

    def _store(self, prompt: list[int], length: int) -> None:
        """Have a prompt in all tiers of the first host."""
        first, num_blocks = self._served.first, length // BLOCK_SIZE
        expected = {"disk": num_blocks, "object": num_blocks // GROUP_BLOCKS * GROUP_BLOCKS}
        series = {f'kelp_kv_tier_blocks{{state="resident",tier="{tier}"}}': count for tier, count in expected.items()}
        before = first.manager_stats()
        first.ask(prompt, STORER)

        def is_everywhere() -> bool:
            stats = first.manager_stats()
            return all(stats.get(name, 0) - before.get(name, 0) >= count for name, count in series.items())

        wait_for(is_everywhere, f"a prefix of {length} tokens on disk and in the store", _SETTLE_S)

    def _onboard(self, asker: Asker, worker: str, prompt: list[int], cell: tuple[int, Tier], computed_s: float) -> None:
        before = _hits(asker)
        reply = asker.ask(prompt, worker)
        found = {tier: count - before.get(tier, 0) for tier, count in _hits(asker).items()}
        if fault := fault_of(reply, *cell, found):
            self.samples.troubles[cell] = fault
        else:
            self.samples.pairs.setdefault(cell, []).append(Pair(reply.ttft_s, computed_s))


def _hits(asker: Asker) -> dict[str, float]:
    stats = asker.manager_stats()
    return {tier.name.lower(): stats.get(f'kelp_kv_tier_hits_total{{tier="{tier.name.lower()}"}}', 0) for tier in TIERS}


def run(reporter: Reporter, store: Store, is_long: bool) -> None:
    """Measure and report.

    Raises:
        BenchError: A server does not come up.
    """
    num_rounds = _NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS
    round_blocks = sum(MEASURED) // BLOCK_SIZE
    num_block_bytes = block_bytes(model_folder())
    sizes = TierSizes(round_blocks + _SPARE_BLOCKS, (num_rounds + _SPARE_ROUNDS + 2) * round_blocks, num_block_bytes)
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="kelp-bench-", ignore_cleanup_errors=True)
        served = stack.enter_context(running(Path(stack.enter_context(folder)), sizes, store, _THREADS))
        rounds = _Rounds(served, seed=time.time_ns())
        _play(rounds, num_rounds, reporter.say)
    for measurement in measurements(rounds.samples):
        reporter.add(measurement)


def _play(rounds: _Rounds, num_rounds: int, say: Callable[[str], None]) -> None:
    started_s = time.monotonic()
    for number in range(1 + num_rounds + _SPARE_ROUNDS):
        if rounds.samples.count() >= num_rounds:
            break
        try:
            if number:
                rounds.run()
            else:
                rounds.warm_up()
        except BenchError as error:
            # What is measured stays; one round that failed says nothing of the next.
            say(f"(onboarding, round {number}: {error})")
    say(f"(onboarding: {rounds.samples.count()} rounds in {time.monotonic() - started_s:.0f} s)")
