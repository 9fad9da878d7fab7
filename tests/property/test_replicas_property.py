"""Routers that tell each other their loads over a network that loses, doubles, delays and reorders, and restart.

After the network has calmed down, each knows exactly what the others have.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kelp.router.replicas.loads import OwnLoads, PeerLoads
from kelp.router.replicas.messages import ActiveLoad, Deltas, Snapshot, decode, encode

NAMES = ("a", "b", "c")
LEASE_S, STALE_S, TICK_S = 30.0, 3.0, 1.0
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["add", "add", "prefilled", "free", "publish", "publish", "renew", "deliver", "ask", "restart"]
        ),
        st.sampled_from(NAMES),
        st.integers(0, 2**16),
    ),
    max_size=120,
)


class Sink:
    """What the selector would count; refuses calls that do not fit together."""

    def __init__(self) -> None:
        self.loads: dict[str, bool] = {}

    def peer_added(self, peer_id: str, load: ActiveLoad) -> None:
        assert peer_id not in self.loads
        self.loads[peer_id] = load.is_prefilled

    def peer_renewed(self, peer_id: str) -> None:
        assert peer_id in self.loads

    def peer_prefilled(self, peer_id: str) -> None:
        assert self.loads[peer_id] is False
        self.loads[peer_id] = True

    def peer_freed(self, peer_id: str) -> None:
        del self.loads[peer_id]


class Router:
    def __init__(self, name: str, epoch: int) -> None:
        self.name, self.epoch = name, epoch
        self.own = OwnLoads(name, epoch)
        self.running: dict[str, ActiveLoad] = {}
        self.sink = Sink()
        self.peers = PeerLoads(self.sink, LEASE_S, STALE_S)


class Network:
    """Routers and what is under way between them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.routers = {name: Router(name, 1) for name in NAMES}
        self.in_flight: list[tuple[str, bytes, bool]] = []
        self.num_requests = 0
        self.meet()

    def meet(self) -> None:
        for router in self.routers.values():
            router.peers.set_peers({o.name: o.epoch for o in self.routers.values() if o is not router}, self.now_s)

    def do(self, what: str, name: str, number: int) -> None:
        self.now_s += TICK_S / 10
        router = self.routers[name]
        ids = sorted(router.running)
        chosen = ids[number % len(ids)] if ids else "unknown"
        if what == "add":
            self.num_requests += 1
            load = ActiveLoad(f"r{self.num_requests}", ("w", "1"), None, number)
            router.running[load.request_id] = load
            router.own.add(load)
        elif what == "prefilled":
            router.own.prefilled(chosen)
        elif what == "free":
            router.running.pop(chosen, None)
            router.own.free(chosen)
        elif what == "renew":
            router.own.renew()
        elif what == "restart":
            self.routers[name] = Router(name, router.epoch + 1)
            self.meet()
        else:
            self.talk(what, name)

    def talk(self, what: str, name: str) -> None:
        if what == "publish":
            self.publish(name)
        elif what == "ask":
            self.answer(name)
        elif self.in_flight:
            index = self.random.randrange(len(self.in_flight))
            self.deliver(*self.in_flight[index])
            if self.random.random() < 0.7:
                del self.in_flight[index]

    def publish(self, name: str, is_lossy: bool = True) -> None:
        raw = encode(self.routers[name].own.message())
        for other in NAMES:
            if other != name and (not is_lossy or self.random.random() < 0.7):
                self.in_flight.append((other, raw, False))

    def answer(self, name: str, is_lossy: bool = True) -> None:
        """All that `name` wants to know is sent to it."""
        for peer in self.routers[name].peers.behind():
            if not is_lossy or self.random.random() < 0.7:
                self.in_flight.append((name, encode(self.routers[peer].own.snapshot()), True))

    def deliver(self, name: str, raw: bytes, is_snapshot: bool) -> None:
        peers = self.routers[name].peers
        if is_snapshot:
            peers.restore(decode(Snapshot, raw), self.now_s)
        else:
            peers.receive(decode(Deltas, raw), self.now_s)

    def calm_down(self) -> None:
        """Everything old arrives, late and mixed; then a heartbeat of everybody, and snapshots where they miss."""
        self.random.shuffle(self.in_flight)
        for name in NAMES:
            self.publish(name, is_lossy=False)
        self.deliver_all()
        for name in NAMES:
            self.answer(name, is_lossy=False)
        self.deliver_all()

    def deliver_all(self) -> None:
        for message in self.in_flight:
            self.deliver(*message)
        self.in_flight.clear()


@given(STEPS, st.integers(0, 2**32))
def test_after_loss_reorder_and_restarts_everybody_knows_exactly_what_the_others_have(
    steps: list[tuple[str, str, int]], seed: int
) -> None:
    network = Network(seed)
    for step in steps:
        network.do(*step)
    network.calm_down()
    for router in network.routers.values():
        expected = {}
        for other in network.routers.values():
            if other is not router:
                known = router.peers.loads(other.name)
                assert known == {load.request_id: load for load in other.own.snapshot().loads}
                assert set(known) == set(other.running)
                expected |= {f"\0{other.name}|{key}": load.is_prefilled for key, load in known.items()}
        assert router.sink.loads == expected
        assert router.peers.behind() == []
        assert router.peers.num_stale(network.now_s) == 0


@given(STEPS, st.integers(0, 2**32))
def test_a_router_that_left_leaves_nothing_behind(steps: list[tuple[str, str, int]], seed: int) -> None:
    network = Network(seed)
    for step in steps:
        network.do(*step)
    for router in network.routers.values():
        router.peers.set_peers({}, network.now_s)
        assert router.sink.loads == {}
        for message in network.in_flight:
            network.deliver(*message)
        assert router.sink.loads == {}


@given(STEPS, st.integers(0, 2**32))
def test_entries_nobody_renews_lapse_and_renewed_ones_do_not(steps: list[tuple[str, str, int]], seed: int) -> None:
    network = Network(seed)
    for step in steps:
        network.do(*step)
    network.calm_down()
    network.now_s += LEASE_S
    network.routers["a"].own.renew()
    network.calm_down()
    network.now_s += TICK_S
    for name in ("b", "c"):
        peers = network.routers[name].peers
        peers.lapse(network.now_s)
        assert set(peers.loads("a")) == set(network.routers["a"].running)
        assert all(not peers.loads(other) for other in ("b", "c"))
