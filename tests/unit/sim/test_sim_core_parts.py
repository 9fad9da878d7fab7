"""Noise, drift and the way of KV events in simulations."""

import numpy as np
import pytest

from kelp.core.kv_events import BlocksRemoved, BlocksStored
from kelp.sim.agenda import Agenda
from kelp.sim.fleet import NetworkSpec, TruthSpec
from kelp.sim.network import EventChannel, LossDice, merged
from kelp.sim.truth import MAX_SPAN_STEPS, NoiseTable, TrueSpeed
from support.sim_routers import name_of


def stored(name: int, parent: int | None) -> BlocksStored:
    return BlocksStored((name_of(name),), None if parent is None else name_of(parent))


@pytest.mark.parametrize("start", [0, 17, MAX_SPAN_STEPS - 3, 3 * MAX_SPAN_STEPS + 5])
@pytest.mark.parametrize("num_steps", [1, 2, 100, MAX_SPAN_STEPS])
def test_many_steps_at_once_take_what_they_take_one_by_one(start, num_steps):
    noise = NoiseTable(0.3, np.random.default_rng(0))
    singly = sum(noise.seconds(start + step, 1, 0.01 + 1e-6 * step, 0.0) for step in range(num_steps))
    assert noise.seconds(start, num_steps, 0.01, 1e-6) == pytest.approx(singly, abs=1e-9)


def test_noise_is_one_on_average_and_absent_if_not_wanted():
    noise = NoiseTable(0.3, np.random.default_rng(0))
    assert noise.seconds(0, MAX_SPAN_STEPS, 1.0, 0.0) == pytest.approx(MAX_SPAN_STEPS)
    assert len({noise.seconds(step, 1, 1.0, 0.0) for step in range(50)}) == 50
    silent = NoiseTable(0.0, np.random.default_rng(0))
    assert {silent.seconds(step, 1, 1.0, 0.0) for step in range(50)} == {1.0}


def test_a_speed_drifts_by_periods_whatever_is_asked_first():
    spec = TruthSpec(bias=0.1, drift=0.5)
    one, other = (TrueSpeed(spec, np.random.default_rng(3)) for _ in range(2))
    late = other.factor(1000.0)
    assert [one.factor(at_s) for at_s in (0.0, 9.9, 10.0, 1000.0)] == [
        other.factor(at_s) for at_s in (0.0, 9.9, 10.0, 1000.0)
    ]
    assert one.factor(0.0) == one.bias == one.factor(9.9) != one.factor(10.0)
    assert one.factor(1000.0) == late
    assert one.steady_until_s(12.0) == 20.0


def test_events_arrive_after_the_delay_and_a_gap_is_filled_before_what_follows_it():
    agenda, arrived = Agenda(), []
    spec = NetworkSpec(events_delay_s=0.5, events_loss=0.5, replay_s=2.0)
    fates = iter([False, True, False, False])

    class Dice(LossDice):
        def is_lost(self):
            return next(fates)

    channel = EventChannel(
        agenda, spec, Dice(0.0, np.random.default_rng(0)), lambda events: arrived.append((agenda.now_s, events))
    )
    messages = [[stored(index, None)] for index in range(4)]
    for at_s, message in zip((0.0, 1.0, 2.0, 2.1), messages, strict=True):
        agenda.at(at_s, channel.send, message)
    agenda.run()
    assert arrived == [(0.5, messages[0]), (4.5, messages[1] + messages[2]), (4.5, messages[3])]


def test_the_dice_lose_about_the_share_they_are_made_for():
    dice = LossDice(0.2, np.random.default_rng(0))
    assert 0.15 < sum(dice.is_lost() for _ in range(5000)) / 5000 < 0.25
    assert not any(LossDice(0.0, np.random.default_rng(0)).is_lost() for _ in range(100))


def test_merging_events_joins_chains_and_removals_and_keeps_their_order():
    events = [
        BlocksRemoved((name_of(8),)),
        BlocksRemoved((name_of(9),)),
        stored(1, None),
        stored(2, 1),
        stored(5, 4),
        BlocksRemoved((name_of(1),)),
    ]
    assert merged(events) == [
        BlocksRemoved((name_of(8), name_of(9))),
        BlocksStored((name_of(1), name_of(2)), None),
        BlocksStored((name_of(5),), name_of(4)),
        BlocksRemoved((name_of(1),)),
    ]


def test_things_due_together_happen_in_the_order_in_which_they_were_put_down():
    agenda, done = Agenda(), []
    for name in "abc":
        agenda.at(1.0, done.append, name)
    agenda.at(0.5, done.append, "first")
    agenda.run()
    assert done == ["first", "a", "b", "c"]
    assert agenda.monotonic_s() == 1.0
    assert agenda.wall_ns() == 1_000_000_000
