"""What a subscription asks for, and what it says about itself; the random histories are in tests/property."""

from __future__ import annotations

import pytest

from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksStored
from kelp.kv.events.codec import AllBlocksCleared, BlockRemoved, SnapshotExtension
from kelp.kv.events.residency import StreamDigest
from kelp.router.feed.subscription import Subscription
from kelp.router.feed.values import (
    Action,
    Apply,
    AskReplay,
    AskSnapshot,
    Batch,
    Forget,
    Phase,
    SubscriptionState,
)
from support.event_doubles import digest16

CONFIG = EventsConfig(max_buffered_batches=16)
TTL_S = 30.0
WHOLE = SnapshotExtension(0, True)


def stored(*blocks: int) -> tuple[BlocksStored]:
    return (BlocksStored(tuple(map(digest16, blocks)), None),)


def own(seq: int, *blocks: int) -> Batch:
    return Batch(seq, float(seq), stored(*blocks or (seq,)), False)


def foreign(seq: int, ts: float | None = None, *, clears: bool = False) -> Batch:
    return Batch(seq, float(seq) if ts is None else ts, [AllBlocksCleared() if clears else BlockRemoved([seq])], True)


def applied(actions: list[Action]) -> list[object]:
    return [event for action in actions if isinstance(action, Apply) for event in action.events]


def live(as_of: int = 0) -> Subscription:
    """Has an empty snapshot as of this batch; its first attempt."""
    subscription = Subscription(CONFIG, can_ask=True)
    assert subscription.start(0.0) == [AskSnapshot(1)]
    assert subscription.state is SubscriptionState.RECOVERING
    actions = subscription.on_part(1, as_of, WHOLE, (), 0.0)
    assert (actions[0], applied(actions)) == (Forget(), [])
    assert subscription.state is SubscriptionState.LIVE
    return subscription


def followed(ring_start: int = 0) -> Subscription:
    """A foreign engine's, whose ring began at this batch; applied up to it."""
    subscription = Subscription(CONFIG, can_ask=True)
    subscription.start(0.0)
    assert subscription.on_end(1, 0.0) == [AskReplay(2, 0)]
    assert subscription.state is SubscriptionState.RECOVERING
    subscription.on_replayed(2, foreign(ring_start), 0.0)
    assert subscription.on_end(2, 0.0) == []
    return subscription


def digest_of(*batches: Batch) -> StreamDigest:
    digest = StreamDigest()
    for batch in batches:
        digest.apply(batch.events or ())  # type: ignore[arg-type]
    return digest


def test_batches_in_order_are_applied_once() -> None:
    subscription = live()
    assert applied(subscription.on_batch(own(1), 0.0)) == [*stored(1)]
    assert subscription.on_batch(own(1), 0.0) == []
    assert applied(subscription.on_batch(own(2), 0.0)) == [*stored(2)]


def test_a_gap_is_filled_by_a_replay_and_later_batches_wait() -> None:
    subscription = live()
    assert subscription.on_batch(own(3), 0.0) == [AskReplay(2, 1)]
    assert subscription.state is SubscriptionState.RECOVERING
    assert applied(subscription.on_replayed(2, own(1), 0.0)) == [*stored(1)]
    assert applied(subscription.on_replayed(2, own(2), 0.0)) == [*stored(2), *stored(3)]
    assert subscription.on_end(2, 0.0) == []
    assert subscription.state is SubscriptionState.LIVE
    assert (subscription.counts.num_gaps, subscription.counts.num_replays, subscription.counts.num_snapshots) == (
        1,
        1,
        1,
    )


def test_a_replay_with_a_hole_becomes_a_snapshot() -> None:
    subscription = live()
    subscription.on_batch(own(9), 0.0)
    assert subscription.on_replayed(2, own(5), 0.0) == [AskSnapshot(3)]
    assert applied(subscription.on_part(3, 8, WHOLE, stored(1), 0.0)) == [*stored(1), *stored(9)]
    assert subscription.state is SubscriptionState.LIVE


def test_live_batches_wait_while_a_snapshot_is_on_its_way() -> None:
    subscription = Subscription(CONFIG, can_ask=True)
    subscription.start(0.0)
    assert subscription.on_batch(own(4), 0.0) == subscription.on_batch(own(5), 0.0) == []
    assert applied(subscription.on_part(1, 4, WHOLE, stored(1), 0.0)) == [*stored(1), *stored(5)]


def test_a_snapshot_with_a_part_missing_is_not_used() -> None:
    subscription = Subscription(CONFIG, can_ask=True)
    subscription.start(0.0)
    assert subscription.on_part(1, 4, SnapshotExtension(0, False), stored(1), 0.0) == []
    assert subscription.on_part(1, 4, SnapshotExtension(2, True), stored(3), 0.0) == []
    assert subscription.counts.num_failures == 1
    assert subscription.on_tick(0.2) == []
    assert subscription.on_tick(0.25) == [AskSnapshot(2)]


def test_answers_to_an_earlier_attempt_are_void() -> None:
    subscription = live()
    subscription.on_batch(own(9), 0.0)
    assert subscription.on_replayed(1, own(1), 0.0) == []
    assert subscription.on_part(1, 20, WHOLE, (), 0.0) == []
    assert subscription.on_end(1, 0.0) == []
    assert applied(subscription.on_replayed(2, own(1), 0.0)) == [*stored(1)]


def test_a_digest_of_later_batches_reveals_what_was_missed() -> None:
    subscription = live()
    assert subscription.on_digest(2, digest_of().tiers(), 1.0, 0.0) == [AskReplay(2, 1)]


def test_a_digest_that_differs_leads_to_a_snapshot_ever_less_often() -> None:
    subscription = live()
    waits = []
    now_s = 0.0
    for attempt in (2, 3, 4):
        assert subscription.on_digest(0, digest_of(own(1)).tiers(), 1.0, now_s) == []
        assert subscription.state is SubscriptionState.RECOVERING
        start_s = now_s
        while not (actions := subscription.on_tick(now_s)):
            now_s += 0.05
        assert actions == [AskSnapshot(attempt)]
        waits.append(round((now_s - start_s) / 0.25))
        subscription.on_part(attempt, 0, WHOLE, (), now_s)
    assert waits == [1, 2, 4]
    assert subscription.counts.num_drifts == 3
    assert subscription.on_digest(0, digest_of().tiers(), 1.0, now_s) == []
    assert subscription.state is SubscriptionState.LIVE


def test_a_digest_of_earlier_batches_is_not_compared() -> None:
    subscription = live()
    subscription.on_batch(own(1), 0.0)
    assert subscription.on_digest(0, digest_of(own(7)).tiers(), 1.0, 0.0) == []
    assert subscription.counts.num_drifts == 0


def test_an_unreadable_batch_leads_to_a_snapshot() -> None:
    subscription = live()
    subscription.on_batch(Batch(1, 0.0, None, False), 0.0)
    assert subscription.state is SubscriptionState.RECOVERING
    assert subscription.on_tick(1.0) == [AskSnapshot(2)]


def test_a_request_without_an_answer_is_repeated_with_longer_waits() -> None:
    subscription = Subscription(CONFIG, can_ask=True)
    subscription.start(0.0)
    now_s, asked_s = 0.0, [0.0]
    while len(asked_s) < 9:
        now_s += 0.05
        asked_s += [now_s for action in subscription.on_tick(now_s) if isinstance(action, AskSnapshot)]
    waits = [later - earlier - CONFIG.request_timeout_s for earlier, later in zip(asked_s, asked_s[1:], strict=False)]
    assert waits == pytest.approx([0.25, 0.5, 1, 2, 4, 8, 10, 10], abs=0.11)


def test_a_silent_kelp_worker_is_asked_after_three_digest_intervals() -> None:
    subscription = live()
    subscription.on_digest(0, digest_of().tiers(), 1.0, 10.0)
    assert subscription.on_tick(12.9) == []
    assert subscription.on_tick(13.0) == [AskReplay(2, 1)]
    assert subscription.state is SubscriptionState.LIVE
    subscription.on_tick(13.0 + CONFIG.request_timeout_s)
    assert subscription.state is SubscriptionState.RECOVERING


def silent(subscription: Subscription, from_s: float, until_s: float) -> list[tuple[float, Action]]:
    """What is asked and done while nobody answers; in tenths of seconds, so that sums are exact."""
    done = []
    for tenth in range(int(from_s * 10), int(until_s * 10)):
        done += [(tenth / 10, action) for action in subscription.on_tick(tenth / 10)]
    return done


def next_request(subscription: Subscription, now_s: float) -> tuple[float, AskReplay | AskSnapshot]:
    """When and what is asked next."""
    while True:
        now_s += 0.1
        for action in subscription.on_tick(now_s):
            if isinstance(action, (AskReplay, AskSnapshot)):
                return now_s, action


def forgotten(done: list[tuple[float, Action]]) -> list[float]:
    return [now_s for now_s, action in done if action == Forget()]


def test_a_worker_that_stays_silent_is_forgotten_once_and_asked_on() -> None:
    subscription = live()
    subscription.on_digest(0, digest_of().tiers(), 1.0, 10.0)
    done = silent(subscription, 10.0, 200.0)
    assert forgotten(done) == [10.0 + TTL_S]
    assert subscription.state is SubscriptionState.APPROXIMATE
    assert subscription.counts.by_kind()["lost"] == 1
    assert len([now_s for now_s, action in done if now_s > 100.0 and isinstance(action, AskSnapshot)]) > 3
    assert all(isinstance(action, AskSnapshot) for now_s, action in done if now_s > 10.0 + TTL_S)


def test_a_worker_that_answers_again_is_known_again_by_a_snapshot() -> None:
    subscription = live()
    done = silent(subscription, 0.0, 100.0)
    assert forgotten(done) == [TTL_S]
    now_s, asked = next_request(subscription, 100.0)
    actions = subscription.on_part(asked.attempt, 7, WHOLE, stored(1), now_s)
    assert (actions[0], applied(actions)) == (Forget(), [*stored(1)])
    assert subscription.state is SubscriptionState.LIVE
    assert applied(subscription.on_batch(own(8), now_s)) == [*stored(8)]
    assert forgotten(silent(subscription, now_s, 200.0)) != [], "and lost again if it falls silent again"
    assert subscription.counts.by_kind()["lost"] == 2


def test_a_lost_worker_that_speaks_is_asked_at_once() -> None:
    for speak in (
        lambda subscription: subscription.on_batch(own(5), 101.0),
        lambda subscription: subscription.on_digest(5, digest_of().tiers(), 1.0, 101.0),
    ):
        subscription = live()
        now_s = 100.0
        silent(subscription, 0.0, now_s)
        while subscription.on_tick(now_s) or subscription._phase is not Phase.WAIT:
            now_s += 0.1
        subscription._alarm_s = 1000.0
        (asked,) = speak(subscription)
        assert isinstance(asked, AskSnapshot)
        assert subscription.state is SubscriptionState.APPROXIMATE, "until it has answered"


def test_a_worker_that_is_never_reached_is_guessed_from_then_on() -> None:
    subscription = Subscription(CONFIG, can_ask=True, ttl_s=TTL_S)
    subscription.start(0.0)
    assert forgotten(silent(subscription, 0.0, 100.0)) == [TTL_S]
    assert subscription.state is SubscriptionState.APPROXIMATE


def test_a_worker_that_speaks_but_never_fills_the_gap_is_forgotten_as_well() -> None:
    subscription = live()
    subscription.on_batch(own(2), 0.0)
    done: list[Action] = []
    for tenth in range(int(10 * TTL_S) + 1):
        done += subscription.on_batch(own(3 + tenth), tenth / 10)
        done += subscription.on_tick(tenth / 10)
    assert done.count(Forget()) == 1
    assert subscription.state is SubscriptionState.APPROXIMATE


def test_a_worker_that_answers_now_and_then_is_not_forgotten() -> None:
    subscription = live()
    now_s, asked = 0.0, None
    for _ in range(20):
        while asked is None:
            now_s += 1.0
            actions = subscription.on_tick(now_s)
            assert Forget() not in actions
            asked = actions[0] if actions else None
        subscription.on_end(asked.attempt, now_s)  # type: ignore[union-attr]
        asked = None
    assert now_s > 3 * TTL_S
    assert subscription.state is SubscriptionState.LIVE


def test_a_silent_engine_without_snapshots_is_forgotten_and_followed_from_its_start_when_it_answers() -> None:
    subscription = followed()
    assert forgotten(silent(subscription, 0.0, 100.0)) == [TTL_S]
    assert subscription.state is SubscriptionState.APPROXIMATE
    now_s, asked = next_request(subscription, 100.0)
    subscription.on_end(asked.attempt, now_s)
    assert subscription.state is SubscriptionState.APPROXIMATE, "what came before is missing"
    now_s, asked = next_request(subscription, now_s)
    assert isinstance(asked, AskReplay) and asked.start_seq == 0
    assert applied(subscription.on_replayed(asked.attempt, foreign(0), now_s))
    assert subscription.on_end(asked.attempt, now_s) == []
    assert subscription.state is SubscriptionState.LIVE


def test_a_quiet_engine_that_cannot_be_asked_is_believed() -> None:
    subscription = Subscription(CONFIG, can_ask=False, ttl_s=TTL_S)
    subscription.start(0.0)
    subscription.on_batch(foreign(0), 0.0)
    assert silent(subscription, 0.0, 100.0) == []
    assert subscription.state is SubscriptionState.LIVE


def test_an_engine_without_snapshots_is_followed_from_its_first_batch() -> None:
    subscription = followed()
    assert subscription.state is SubscriptionState.LIVE
    assert subscription.on_batch(foreign(2), 0.0) == [AskReplay(3, 1)]


def test_an_engine_whose_first_batches_are_gone_is_known_in_part_until_it_clears() -> None:
    subscription = followed(ring_start=7)
    assert subscription.state is SubscriptionState.APPROXIMATE
    subscription.on_batch(foreign(8, clears=True), 0.0)
    assert subscription.state is SubscriptionState.LIVE


def test_a_hole_without_snapshots_voids_everything() -> None:
    subscription = followed()
    subscription.on_batch(foreign(5), 0.0)
    actions = subscription.on_end(3, 0.0)
    assert actions[0] == Forget()
    assert len(applied(actions)) == 1
    assert subscription.state is SubscriptionState.APPROXIMATE


def test_an_old_number_with_a_new_time_is_another_engine() -> None:
    subscription = followed()
    subscription.on_batch(foreign(1, ts=5.0), 0.0)
    assert subscription.on_batch(foreign(0, ts=0.0), 0.0) == []
    assert subscription.on_batch(foreign(0, ts=6.0), 0.0)[:2] == [Forget(), AskReplay(3, 0)]
    assert subscription.counts.num_restarts == 1


def test_a_quiet_foreign_engine_is_asked_now_and_then() -> None:
    subscription = followed()
    assert subscription.on_tick(CONFIG.audit_interval_s) == [AskReplay(3, 1)]
    assert subscription.state is SubscriptionState.LIVE


def test_without_an_endpoint_to_ask_only_the_first_batch_makes_it_live() -> None:
    early, late = Subscription(CONFIG, can_ask=False), Subscription(CONFIG, can_ask=False)
    assert early.start(0.0) == []
    assert early.state is SubscriptionState.APPROXIMATE
    assert len(applied(early.on_batch(foreign(0), 0.0))) == 1
    assert early.state is SubscriptionState.LIVE
    assert early.on_batch(foreign(2), 0.0)[0] == Forget()
    assert early.state is SubscriptionState.APPROXIMATE
    late.on_batch(foreign(3), 0.0)
    assert late.state is SubscriptionState.APPROXIMATE


def test_what_waits_is_bounded_and_what_did_not_fit_is_asked_for_again() -> None:
    subscription = live()
    for seq in range(2, 100):
        subscription.on_batch(own(seq), 0.0)
    actions = subscription.on_replayed(2, own(1), 0.0)
    assert applied(actions) == [*(event for seq in range(1, 18) for event in stored(seq))]
    assert subscription.on_end(2, 0.0) == [AskReplay(3, 18)]


def test_a_foreign_message_never_makes_a_kelp_worker_foreign() -> None:
    subscription = live()
    assert subscription.on_batch(foreign(1), 0.0) == []
    assert applied(subscription.on_batch(own(1), 0.0)) == [*stored(1)]
