"""Whatever is called in whatever order: load is never negative, ends at zero, and rules hold."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.core.errors import CapacityError
from kelp.core.types import Role
from kelp.router.decision.policies.catalogue import POLICIES
from kelp.router.decision.selector import Decision, Ended, FirstToken
from support.examples import examples
from support.selector_rig import Rig, worker

NAMES = ("a", "b", "c", "p", "q")
ROLES = {"a": Role.AGGREGATED, "b": Role.DECODE, "c": Role.AGGREGATED, "p": Role.PREFILL, "q": Role.PREFILL}

_IDS = st.integers(0, 5)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("place"), _IDS, st.integers(1, 3000), st.booleans()),
        st.tuples(st.just("commit"), _IDS),
        st.tuples(st.just("first_token"), _IDS, st.integers(0, 3000), st.floats(0, 5)),
        st.tuples(st.just("progress"), _IDS, st.integers(1, 200)),
        st.tuples(st.just("free"), _IDS, st.booleans(), st.floats(0, 30)),
        st.tuples(st.just("workers"), st.sets(st.sampled_from(NAMES)), st.integers(1, 2), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.floats(0, 40)),
    ),
    max_size=60,
)


class _Player:
    def __init__(self, policy: str, disaggregation: str) -> None:
        self.rig = Rig(
            [worker(name, ROLES[name]) for name in NAMES], policy, disaggregation, reservation_ttl_s=20, lease_ttl_s=90
        )
        self.chosen: list[tuple[str, ...]] = []
        self._heartbeat = 0

    def play(self, step: tuple[Any, ...]) -> None:
        kind, *values = step
        selector, rig = self.rig.selector, self.rig
        if kind == "place":
            self._place(*values)
        elif kind == "commit":
            selector.commit(str(values[0]))
        elif kind == "first_token":
            selector.first_token(str(values[0]), FirstToken(values[1], 0.0, values[2], 0.01))
        elif kind == "progress":
            selector.progress(str(values[0]), values[1])
        elif kind == "free":
            selector.free(str(values[0]), Ended(values[1], 100, values[2]))
        elif kind == "workers":
            self._heartbeat += 1
            names, epoch, running = values
            changes: dict[str, object] = {"epoch": str(epoch), "num_running": running, "heartbeat_ns": self._heartbeat}
            selector.set_workers([worker(name, ROLES[name], **changes) for name in sorted(names)])
        else:
            rig.clock.advance(values[0])

    def _place(self, name: int, num_tokens: int, is_reserved: bool) -> None:
        request = self.rig.request(num_tokens, request_id=str(name))
        try:
            decision = self.rig.selector.select(request)
        except CapacityError:
            return
        self.chosen.append(decision.worker_ids)
        _check_roles(decision)
        if is_reserved:
            self.rig.selector.reserve(decision)

    def end(self) -> None:
        for name in range(6):
            self.rig.selector.free(str(name), Ended(False))


def _check_roles(decision: Decision) -> None:
    assert decision.decode.role is not Role.PREFILL
    assert decision.prefill is None or decision.prefill.role is Role.PREFILL


@settings(max_examples=examples(60), deadline=None)
@given(steps=_STEPS, policy=st.sampled_from(list(POLICIES)), mode=st.sampled_from(["auto", "always", "never"]))
def test_load_is_never_negative_and_returns_to_zero(steps: list[tuple[Any, ...]], policy: str, mode: str) -> None:
    player = _Player(policy, mode)
    for step in steps:
        player.play(step)
        assert (player.rig.loads() >= -1e-9).all()
        assert (player.rig.selector.load.foreign >= 0).all()
    player.end()
    assert abs(player.rig.loads()).max(initial=0.0) < 1e-9


@settings(max_examples=examples(30), deadline=None)
@given(steps=_STEPS, policy=st.sampled_from(list(POLICIES)))
def test_equal_seeds_and_calls_give_equal_choices(steps: list[tuple[Any, ...]], policy: str) -> None:
    players = [_Player(policy, "auto") for _ in range(2)]
    for player in players:
        for step in steps:
            player.play(step)
    assert players[0].chosen == players[1].chosen


@settings(max_examples=examples(60), deadline=None)
@given(
    policy=st.sampled_from(list(POLICIES)),
    tags=st.lists(st.sampled_from(["east", "west"]), min_size=3, max_size=3),
    wanted=st.sampled_from(["east", "west", ""]),
    pin=st.sampled_from(["", "a", "b", "c"]),
    avoid=st.sets(st.sampled_from(["a", "b", "c"])),
)
def test_the_chosen_worker_satisfies_pin_tags_and_avoidance(
    policy: str, tags: list[str], wanted: str, pin: str, avoid: set[str]
) -> None:
    zones = dict(zip("abc", tags, strict=True))
    rig = Rig([worker(name, ROLES[name], tags={"zone": zones[name]}) for name in "abc"], policy)
    allowed = {name for name in "abc" if wanted in ("", zones[name]) and pin in ("", name)}
    request = rig.request(required_tags={"zone": wanted} if wanted else {}, pinned_worker=pin)
    try:
        chosen = rig.selector.select(request, frozenset((name, "1") for name in avoid)).decode.worker_id
    except CapacityError:
        assert not allowed
        return
    assert chosen in ((allowed - avoid) or allowed)
