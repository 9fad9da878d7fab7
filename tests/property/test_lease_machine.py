"""The two ends of a lease under any order of events and any network delay."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kelp.core.clock import FakeClock
from kelp.kv.handoff.lease import Lease, LeaseValidity
from support.examples import examples

TTL_S = 10.0
DELAYS = st.floats(min_value=0.0, max_value=3 * TTL_S, allow_nan=False)


class LeaseMachine(RuleBasedStateMachine):
    """One clock, a network that delays heartbeats and answers but keeps their order, a sweeper that may lag."""

    @initialize()
    def offer(self) -> None:
        self.clock = FakeClock()
        self.num_releases = 0
        self.is_finished = False
        self.has_let_go = False
        self.lease = Lease(TTL_S, self.clock, self._count)
        self.validity = LeaseValidity(self.clock)
        self.to_server: list[int] = []
        self.to_reader: list[int] = []

    def _count(self) -> None:
        self.num_releases += 1
        self.was_trusted = self.validity.covers(self.clock.monotonic_s())

    @rule(seconds=DELAYS)
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def reader_sends(self) -> None:
        self.to_server.append(self.validity.next_heartbeat())

    @precondition(lambda self: self.to_server)
    @rule()
    def heartbeat_arrives(self) -> None:
        number = self.to_server.pop(0)
        if self.lease.renew():
            self.to_reader.append(number)

    @precondition(lambda self: self.to_reader)
    @rule()
    def answer_arrives(self) -> None:
        assert self.validity.answered(self.to_reader.pop(0), TTL_S)

    @precondition(lambda self: self.to_reader)
    @rule()
    def answers_arrive_coalesced(self) -> None:
        assert self.validity.answered(self.to_reader[-1], TTL_S)
        self.to_reader.clear()

    @precondition(lambda self: not self.is_finished)
    @rule()
    def prefill_finishes(self) -> None:
        self.is_finished = True
        self.lease.renew()

    @rule()
    def sweeper_runs(self) -> None:
        self.lease.expire()

    @rule()
    def reader_acknowledges(self) -> None:
        self.has_let_go = True
        self.lease.release()

    @invariant()
    def blocks_are_released_at_most_once(self) -> None:
        assert self.num_releases == (0 if self.lease.is_live else 1)

    @invariant()
    def blocks_are_never_released_while_the_reader_may_trust_them(self) -> None:
        if self.num_releases and not self.has_let_go:
            assert not self.was_trusted
            assert not self.validity.covers(self.clock.monotonic_s())

    def teardown(self) -> None:
        if not hasattr(self, "lease"):
            return
        self.lease.renew()
        self.clock.advance(TTL_S)
        self.lease.expire()
        self.lease.release()
        assert self.num_releases == 1


LeaseMachine.TestCase.settings = settings(max_examples=examples(75), stateful_step_count=30, deadline=None)
test_lease_machine = LeaseMachine.TestCase


@given(waits=st.lists(DELAYS, max_size=8))
def test_a_lease_without_reader_never_expires_before_the_prefill_finishes(waits: list[float]) -> None:
    clock, released = FakeClock(), []
    lease = Lease(TTL_S, clock, lambda: released.append(None))
    for seconds in waits:
        clock.advance(seconds)
        assert not lease.expire()
    lease.renew()
    clock.advance(TTL_S)
    assert lease.expire() and len(released) == 1


@given(answer=st.integers(min_value=-3, max_value=12))
def test_an_answer_to_a_heartbeat_that_is_not_outstanding_is_refused(answer: int) -> None:
    validity = LeaseValidity(FakeClock())
    sent = [validity.next_heartbeat() for _ in range(6)]
    assert validity.answered(2, TTL_S)
    assert validity.answered(answer, TTL_S) is (answer in sent[3:])


def test_a_lease_that_ran_out_is_not_renewed_even_before_the_sweep() -> None:
    clock, released = FakeClock(), []
    lease = Lease(TTL_S, clock, lambda: released.append(None))
    assert lease.renew()
    clock.advance(TTL_S)
    assert not lease.renew() and not lease.is_live and len(released) == 1
