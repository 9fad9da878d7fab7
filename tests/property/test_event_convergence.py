"""Whatever network and workers do: once they are quiet, the index holds what the worker holds, or less and says so.

The real publisher core, subscription and index are joined by a network that loses, repeats, reorders and corrupts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.core.clock import FakeClock
from kelp.core.config import EventsConfig
from kelp.core.hashing import seed_hash
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from kelp.core.types import Tier
from kelp.kv.events.codec import ForeignEvent, decode_own, encode_batch
from kelp.kv.events.frames import SNAPSHOT_REQUEST, encode_seq
from kelp.kv.events.stream import EventStream
from kelp.kv.events.translate import ForeignNames
from kelp.router.feed.inbox import EventInbox
from kelp.router.feed.subscription import Subscription
from kelp.router.feed.values import Action, Apply, AskReplay, AskSnapshot, Forget, SubscriptionState
from kelp.router.index.kv_index import KVIndex
from support.event_doubles import END, ForeignEngine, Held, digest16
from support.examples import examples

CONFIG = EventsConfig(max_buffered_batches=16, max_queued_events=16, replay_batches=6, replay_bytes=65536)
NUM_BLOCKS = 24


class Truth:
    """What the engine did, filed in the plainest way."""

    def __init__(self) -> None:
        self.held: set[tuple[Tier, bytes]] = set()

    def apply(self, event: KVEvent) -> None:
        if isinstance(event, BlocksCleared):
            self.held.clear()
        elif isinstance(event, BlocksStored):
            self.held |= {(event.tier, block) for block in event.hashes}
        else:
            self.held -= {(event.tier, block) for block in event.hashes}


class Router:
    """One subscription and its index."""

    def __init__(self, epoch: str, clock: FakeClock) -> None:
        self.clock = clock
        self.index = KVIndex(clock)
        self.subscription = Subscription(CONFIG, can_ask=True)
        self.inbox = EventInbox(epoch, self.subscription, CONFIG.max_message_bytes)
        self.names = ForeignNames(1, lambda *_: seed_hash("m"))
        self.asked: AskReplay | AskSnapshot | None = None
        self.perform(self.subscription.start(clock.monotonic_s()))

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Forget):
                self.index.clear(0)
                self.names.clear()
            elif isinstance(action, Apply):
                for event in action.events:
                    translated = self.translate(event) if isinstance(event, ForeignEvent) else [event]
                    for own in translated:
                        self.index.apply(0, own)
            else:
                self.asked = action

    def translate(self, event: ForeignEvent) -> list[KVEvent]:
        num_orphans = self.names.num_dropped["parent"]
        events = self.names.translate([event])
        if self.names.num_dropped["parent"] != num_orphans:
            self.subscription.on_orphan()
        return events

    def held(self) -> Held:
        return frozenset((tier, block) for tier in Tier for block in self.index.holdings(0, tier))

    def live(self, frames: list[bytes]) -> None:
        self.perform(self.inbox.on_live(frames, self.clock.monotonic_s()))

    def answer(self, attempt: int, frames: list[bytes]) -> None:
        self.perform(self.inbox.on_answer(attempt, [b"", *frames], self.clock.monotonic_s()))

    def tick(self) -> None:
        self.perform(self.subscription.on_tick(self.clock.monotonic_s()))


class Network:
    """Holds live messages back and answers requests; cruel until told otherwise."""

    def __init__(self, router: Router, chance: random.Random) -> None:
        self.router = router
        self.chance = chance
        self.is_cruel = True
        self.waiting: list[list[bytes]] = []
        self.late: list[tuple[int, list[bytes]]] = []

    def send(self, frames: list[bytes]) -> None:
        copies = self.chance.choice((0, 1, 1, 1, 2)) if self.is_cruel else 1
        self.waiting += [frames] * copies

    def deliver(self) -> None:
        if self.is_cruel and self.chance.random() < 0.3:
            self.chance.shuffle(self.waiting)
        (waiting, self.waiting), (late, self.late) = (self.waiting, []), (self.late, [])
        for frames in waiting:
            self.router.live(frames)
        for attempt, frames in late:
            self.router.answer(attempt, frames)

    def answer(self, attempt: int, answers: Iterator[list[bytes]]) -> None:
        is_late = self.is_cruel and self.chance.random() < 0.2
        for frames in answers:
            if self.is_cruel and self.chance.random() < 0.2:
                return
            copies = 2 if self.is_cruel and self.chance.random() < 0.1 else 1
            for _ in range(copies):
                if is_late:
                    self.late.append((attempt, frames))
                else:
                    self.router.answer(attempt, frames)


def play(scene: OwnScene | ForeignScene, steps: dict[str, int], num_steps: int) -> None:
    """Random steps by weight; the seed is the scene's."""
    for step in scene.chance.choices(list(steps), list(steps.values()), k=num_steps):
        getattr(scene, step)()


class OwnScene:
    """A kelp worker through its incarnations."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.clock = FakeClock()
        self.epoch = 0
        self.begin()

    def begin(self) -> None:
        self.stream = EventStream(str(self.epoch), 16, CONFIG, self.clock)
        self.truth = Truth()
        self.router = Router(str(self.epoch), self.clock)
        late = self.network.waiting if self.epoch else []
        self.network = Network(self.router, self.chance)
        self.network.waiting = late

    def restart(self) -> None:
        self.epoch += 1
        self.begin()

    def deliver(self) -> None:
        self.network.deliver()

    def change(self) -> None:
        first = self.chance.randrange(NUM_BLOCKS)
        blocks = tuple(digest16(block) for block in range(first, min(NUM_BLOCKS, first + self.chance.randrange(1, 5))))
        tier = self.chance.choice((Tier.DEVICE, Tier.DEVICE, Tier.DEVICE, Tier.DISK))
        event: KVEvent = BlocksRemoved(blocks, tier)
        if self.chance.random() < 0.6:
            event = BlocksStored(blocks, digest16(first - 1) if first else None, tier)
        elif self.chance.random() < 0.02:
            event = BlocksCleared()
        self.truth.apply(event)
        self.stream.put(event)

    def flush(self) -> None:
        for message in self.stream.flush():
            self.network.send(message.frames())

    def corrupt(self) -> None:
        """A batch arrives with the right number and half of its content: nothing but the digest can tell."""
        for message in self.stream.flush():
            events = decode_own(message.payload, CONFIG.max_message_bytes).events[1:]
            self.network.send([*message.frames()[:2], encode_batch(1.0, events, 16)])

    def garble(self) -> None:
        for message in self.stream.flush():
            self.network.send([*message.frames()[:2], b"\xc1"])

    def digest(self) -> None:
        self.network.send(self.stream.digest().frames())

    def serve(self) -> None:
        asked, self.router.asked = self.router.asked, None
        if isinstance(asked, AskSnapshot):
            changes, parts = self.stream.snapshot()
            for message in changes:
                self.network.send(message.frames())
            self.network.answer(asked.attempt, iter([*(part.frames() for part in parts), END]))
        elif asked is not None:
            batches = [message.frames() for message in self.stream.replay(asked.start_seq)]
            self.network.answer(asked.attempt, iter([*batches, END]))

    def wait(self) -> None:
        self.clock.advance(self.chance.choice((0.1, 1.0, 7.0)))
        self.router.tick()

    def settle(self) -> None:
        """A minute of a network that works."""
        self.network.is_cruel = False
        for _ in range(60):
            self.flush()
            self.digest()
            self.network.deliver()
            self.serve()
            self.clock.advance(1.0)
            self.router.tick()


STEPS = {
    "change": 30, "flush": 20, "deliver": 20, "serve": 10, "digest": 5, "wait": 5, "corrupt": 4, "garble": 2,
    "restart": 1,
}  # fmt: skip


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 2**32), num_steps=st.integers(0, 400))
def test_after_quiescence_the_index_equals_the_truth(seed: int, num_steps: int) -> None:
    scene = OwnScene(seed)
    play(scene, STEPS, num_steps)
    scene.settle()
    assert scene.router.held() == scene.truth.held
    assert scene.router.subscription.state is SubscriptionState.LIVE


class ForeignScene:
    """A vLLM worker, which may restart without anybody telling."""

    def __init__(self, seed: int, ring: int) -> None:
        self.chance = random.Random(seed)
        self.clock = FakeClock()
        self.ring = ring
        self.engine = ForeignEngine(0.0, ring)
        self.router = Router("e", self.clock)
        self.network = Network(self.router, self.chance)

    def deliver(self) -> None:
        self.network.deliver()

    def change(self) -> None:
        held = list(self.engine.held)
        block = self.chance.randrange(NUM_BLOCKS)
        if block in held:
            self.network.send(self.engine.remove(block))
        else:
            self.network.send(self.engine.store(block, self.chance.choice(held) if held else None))

    def clear(self) -> None:
        self.network.send(self.engine.clear())

    def restart(self) -> None:
        self.network = Network(self.router, self.chance)
        self.engine = ForeignEngine(self.engine.ts + 1000.0, self.ring)
        self.router.live(self.engine.clear())

    def serve(self) -> None:
        asked, self.router.asked = self.router.asked, None
        if asked is None:
            return
        request = SNAPSHOT_REQUEST if isinstance(asked, AskSnapshot) else encode_seq(asked.start_seq)
        self.network.answer(asked.attempt, self.engine.replay(int.from_bytes(request, "big")))

    def wait(self) -> None:
        self.clock.advance(self.chance.choice((0.1, 1.0, 7.0)))
        self.router.tick()

    def settle(self) -> None:
        self.network.is_cruel = False
        for _ in range(90):
            self.network.deliver()
            self.serve()
            self.clock.advance(1.0)
            self.router.tick()

    def run(self, num_steps: int) -> tuple[Held, Held]:
        play(self, FOREIGN_STEPS, num_steps)
        self.settle()
        return self.router.held(), self.engine.truth()


FOREIGN_STEPS = {"change": 30, "deliver": 10, "serve": 10, "wait": 5, "clear": 1, "restart": 2}


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 2**32), num_steps=st.integers(0, 400))
def test_a_foreign_engine_that_still_has_its_batches_ends_up_fully_known(seed: int, num_steps: int) -> None:
    scene = ForeignScene(seed, ring=1000)
    index, truth = scene.run(num_steps)
    assert index == truth
    assert scene.router.subscription.state is SubscriptionState.LIVE


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 2**32), num_steps=st.integers(0, 400))
def test_of_a_foreign_engine_with_a_short_memory_nothing_untrue_is_known(seed: int, num_steps: int) -> None:
    scene = ForeignScene(seed, ring=3)
    index, truth = scene.run(num_steps)
    assert index <= truth
    if scene.router.subscription.state is SubscriptionState.LIVE:
        assert index == truth
    else:
        assert scene.router.subscription.state is SubscriptionState.APPROXIMATE
