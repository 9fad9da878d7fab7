"""The protocol of one worker's KV events as a state machine without sockets or clocks.

Fed with whatever arrives, in any order and any number of times, it says what to do to the index and what to ask the
publisher for. Batches are applied once and in order. A gap is filled by a replay; what the replay cannot fill, by a
snapshot; where there are no snapshots (vLLM, SGLang), everything about the worker is forgotten, because a block whose
removal was missed would be a lie. A digest that differs from what was applied means a snapshot too. A publisher that
has not kept us in step for long, dead or out of reach, is lost: its blocks are forgotten, and it is asked on.

    SNAPSHOT ─► FOLLOW ◄─► REPLAY        a request that fails: WAIT, then again
                  └── digest differs, or the replay has a hole ──► SNAPSHOT
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kelp.core.config import EventsConfig
from kelp.core.kv_events import KVEvent
from kelp.kv.events.codec import AllBlocksCleared, SnapshotExtension, TierDigest
from kelp.kv.events.residency import StreamDigest
from kelp.router.feed.batch_order import BatchOrder
from kelp.router.feed.patience import Patience
from kelp.router.feed.snapshot_assembly import SnapshotAssembly
from kelp.router.feed.values import (
    Action,
    Apply,
    AskReplay,
    AskSnapshot,
    Batch,
    Dialect,
    Forget,
    Phase,
    SubscriptionCounts,
    SubscriptionState,
)

_MAX_REPLAY_FAILURES = 5


class Subscription:
    """One incarnation of one worker; times are of one monotonic clock, in seconds.

    Args:
        config: Limits and waits.
        can_ask: Whether there is an endpoint to ask for what was missed.
        jitter: Factor on each back-off, so that many subscribers of one worker spread out.
        ttl_s: See `Patience`.
    """

    def __init__(
        self, config: EventsConfig, can_ask: bool, jitter: Callable[[], float] = lambda: 1.0, ttl_s: float = 30.0
    ) -> None:
        self.counts = SubscriptionCounts()
        self._config = config
        self._can_ask = can_ask
        self._patience = Patience(config, jitter, ttl_s)
        self._phase = Phase.FOLLOW
        self._dialect = Dialect.UNKNOWN
        self._wants_snapshot = can_ask
        self._order = BatchOrder(config.max_buffered_batches)
        self._snapshot = SnapshotAssembly()
        self._digest = StreamDigest()
        self._is_complete = self._is_doubtful = self._is_lost = self._has_progressed = False
        self._attempt = 0
        self._alarm_s = float("inf")

    @property
    def state(self) -> SubscriptionState:
        """See `SubscriptionState`."""
        if self._is_lost or (not self._can_ask and not self._is_complete):
            return SubscriptionState.APPROXIMATE
        if self._order.next_seq is None or self._order.is_behind or self._is_doubtful or self._patience.num_failures:
            return SubscriptionState.RECOVERING
        return SubscriptionState.LIVE if self._is_complete else SubscriptionState.APPROXIMATE

    def start(self, now_s: float) -> list[Action]:
        """Begin; nothing is known about the worker."""
        self._patience.settle(now_s)
        return self._ask(now_s) if self._can_ask else []

    def on_batch(self, batch: Batch, now_s: float) -> list[Action]:
        """A batch came by itself."""
        if batch.is_foreign and self._dialect is Dialect.OWN:
            return []
        self._hear(now_s)
        actions = self._hear_dialect(Dialect.FOREIGN if batch.is_foreign else Dialect.OWN, now_s)
        if self._order.is_restart(batch):
            self.counts.num_restarts += 1
            self._order.clear()
            actions += [Forget(), *self._follow_from_start(now_s)]
        if self._order.next_seq is None and not self._can_ask:
            self._order.go_on_at(batch.seq)
            self._is_complete = batch.seq == 0
        self._order.put(batch)
        return actions + self._advance(now_s) + self._find(now_s)

    def on_digest(self, as_of: int, tiers: Sequence[TierDigest], interval_s: float, now_s: float) -> list[Action]:
        """The publisher says what its batches up to `as_of` add up to."""
        self._hear(now_s)
        self._patience.digest_interval_s = interval_s
        actions = self._hear_dialect(Dialect.OWN, now_s)
        if self._order.next_seq is None:
            return actions + self._find(now_s)
        self._order.hear_of(as_of)
        if self._phase is not Phase.FOLLOW or as_of != self._order.next_seq - 1 or not self._is_complete:
            return actions + self._advance(now_s)
        if tuple(tiers) == self._digest.tiers():
            self._patience.num_mistrusts = 0
            return actions
        self.counts.num_drifts += 1
        return actions + self._mistrust(now_s)

    def on_replayed(self, attempt: int, batch: Batch, now_s: float) -> list[Action]:
        """A batch came as part of a replay."""
        if attempt != self._attempt or self._phase is not Phase.REPLAY:
            return []
        self._hear_answer(now_s)
        self._order.put(batch)
        assert self._order.next_seq is not None
        if batch.seq > self._order.next_seq and not self._has_progressed:
            return self._ask_for_all(now_s) if self._gives_snapshots else self._jump(batch.seq, now_s)
        return self._advance(now_s)

    def on_part(
        self, attempt: int, as_of: int, part: SnapshotExtension, events: Sequence[KVEvent], now_s: float
    ) -> list[Action]:
        """A part of a snapshot came."""
        if attempt != self._attempt or self._phase is not Phase.SNAPSHOT:
            return []
        self._hear_answer(now_s)
        self._dialect = Dialect.OWN
        if not self._snapshot.add(as_of, part, events):
            return self.on_failed(attempt, now_s)
        return self._take_snapshot(now_s) if part.is_last else []

    def on_end(self, attempt: int, now_s: float) -> list[Action]:
        """The answer has ended."""
        if attempt != self._attempt or self._phase not in (Phase.REPLAY, Phase.SNAPSHOT):
            return []
        self._hear_answer(now_s)
        if self._phase is Phase.SNAPSHOT:
            if self._dialect is Dialect.OWN:
                return self.on_failed(attempt, now_s)
            return self._hear_dialect(Dialect.FOREIGN, now_s)
        if not self._order.is_behind:
            self._settle(now_s)
            return []
        if self._has_progressed:
            return self._ask(now_s)
        return self._ask_for_all(now_s) if self._gives_snapshots else self._skip(now_s)

    def on_failed(self, attempt: int, now_s: float) -> list[Action]:
        """The answer cannot be had, or broke off."""
        if attempt != self._attempt or self._phase not in (Phase.REPLAY, Phase.SNAPSHOT):
            return []
        self.counts.num_failures += 1
        self._patience.num_failures += 1
        if self._patience.num_failures >= _MAX_REPLAY_FAILURES and not self._gives_snapshots and self._order.is_behind:
            return self._skip(now_s)
        self._wait(now_s)
        return self._advance(now_s)

    def on_tick(self, now_s: float) -> list[Action]:
        """Time has passed."""
        if self._phase is not Phase.FOLLOW:
            if not self._is_lost and self._patience.is_over(now_s):
                return self._lose(now_s)
            if now_s >= self._alarm_s:
                return self._ask(now_s) if self._phase is Phase.WAIT else self.on_failed(self._attempt, now_s)
            return []
        if not self._can_ask or not self._patience.is_silence(now_s):
            return []
        if self._is_complete or not self._patience.may_start_over(now_s):
            return self._ask(now_s)
        return [Forget(), *self._follow_from_start(now_s)]

    def on_orphan(self) -> None:
        """A block's parent is not known: something was missed, or another engine speaks."""
        self._is_complete = False

    @property
    def _gives_snapshots(self) -> bool:
        return self._can_ask and self._dialect is not Dialect.FOREIGN

    def _hear(self, now_s: float) -> None:
        self._patience.hear(now_s, is_in_step=self._phase is Phase.FOLLOW)

    def _lose(self, now_s: float) -> list[Action]:
        """What was known may be long untrue: forget it."""
        self._is_lost = True
        self.counts.num_lost += 1
        self._is_complete = False
        if self._gives_snapshots:
            self._order.clear()
            self._wants_snapshot = True
            if self._phase is Phase.REPLAY:
                self._wait(now_s)
        return [Forget()]

    def _find(self, now_s: float) -> list[Action]:
        """Who was lost has spoken: he had better be asked now."""
        return self._ask(now_s) if self._is_lost and self._phase is Phase.WAIT else []

    def _hear_answer(self, now_s: float) -> None:
        self._hear(now_s)
        self._alarm_s = now_s + self._config.request_timeout_s

    def _hear_dialect(self, dialect: Dialect, now_s: float) -> list[Action]:
        """Who speaks decides what can be asked for."""
        if self._dialect is dialect:
            return []
        was, self._dialect = self._dialect, dialect
        if dialect is Dialect.FOREIGN:
            self._wants_snapshot = False
            return self._follow_from_start(now_s)
        return self._ask_for_all(now_s) if was is Dialect.FOREIGN and self._can_ask else []

    def _advance(self, now_s: float) -> list[Action]:
        """Apply what is in order; ask for what is missing."""
        if self._phase is Phase.SNAPSHOT:
            return []
        actions: list[Action] = []
        while (batch := self._order.pop()) is not None:
            self._has_progressed = True
            if batch.events is None:
                actions += self._mistrust(now_s)
                continue
            actions.append(Apply(batch.events))
            if batch.is_foreign:
                self._is_complete |= any(isinstance(event, AllBlocksCleared) for event in batch.events)
            else:
                self._digest.apply(batch.events)  # type: ignore[arg-type]
        if self._order.is_behind and self._phase is Phase.FOLLOW:
            self.counts.num_gaps += 1
            actions += self._ask(now_s) if self._can_ask else self._skip(now_s)
        return actions

    def _mistrust(self, now_s: float) -> list[Action]:
        """What was applied differs from what was meant; asked for anew, ever less often if that does not help."""
        self._patience.num_mistrusts += 1
        if not self._gives_snapshots:
            self._is_complete = False
            return [Forget()]
        self._is_doubtful = self._wants_snapshot = True
        self._wait(now_s)
        return []

    def _skip(self, now_s: float) -> list[Action]:
        """The missing batches cannot be had any more: go on after the last gap."""
        actions = self._jump(self._order.last_run, now_s)
        self._settle(now_s)
        return actions

    def _jump(self, seq: int, now_s: float) -> list[Action]:
        self._is_complete = False
        self._order.go_on_at(seq)
        return [Forget(), *self._advance(now_s)]

    def _settle(self, now_s: float) -> None:
        self._patience.settle(now_s)
        self._phase, self._is_doubtful, self._is_lost = Phase.FOLLOW, False, False

    def _wait(self, now_s: float) -> None:
        self._phase, self._alarm_s = Phase.WAIT, now_s + self._patience.backoff_s()
        self._snapshot.take()

    def _ask_for_all(self, now_s: float) -> list[Action]:
        self._wants_snapshot = True
        return self._ask(now_s)

    def _ask(self, now_s: float) -> list[Action]:
        self._attempt += 1
        self._has_progressed = False
        self._snapshot.take()
        self._alarm_s = now_s + self._config.request_timeout_s
        if self._wants_snapshot or self._order.next_seq is None:
            self._phase = Phase.SNAPSHOT
            self.counts.num_snapshots += 1
            return [AskSnapshot(self._attempt)]
        self._phase = Phase.REPLAY
        self.counts.num_replays += 1
        return [AskReplay(self._attempt, self._order.next_seq)]

    def _follow_from_start(self, now_s: float) -> list[Action]:
        """A foreign engine's first batches, if it still has them, are the whole truth."""
        if not self._can_ask:
            return []
        self._order.go_on_at(0)
        self._is_complete = self._is_doubtful = True
        return self._ask(now_s)

    def _take_snapshot(self, now_s: float) -> list[Action]:
        parts = self._snapshot.take()
        self._wants_snapshot, self._is_complete = False, True
        self._order.go_on_at(self._snapshot.as_of + 1)
        self._digest = StreamDigest()
        for part in parts:
            self._digest.apply(part)
        self._settle(now_s)
        return [Forget(), *map(Apply, parts), *self._advance(now_s)]
