"""Other routers' requests in this router's counts."""

from __future__ import annotations

from router_rig import prefill_record, record

from kelp.core.clock import FakeClock
from kelp.core.config import RoutingConfig
from kelp.router.decision.outcome import Ended
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Selector, SelectorMode
from kelp.router.decision.workers import WorkerTable
from kelp.router.index.kv_index import KVIndex
from kelp.router.replicas.loads import PeerLoads
from kelp.router.replicas.messages import ActiveLoad, Add, Deltas, Free
from kelp.router.replicas.peer_load import PeerLoad

DECODE, PREFILL = record("decode"), prefill_record()
WORK = (1.0, 100.0, 5000.0, 0.0, 0.0)
ALONE = ActiveLoad("r", DECODE.key, None, 100, WORK)
SPLIT = ActiveLoad("r", DECODE.key, PREFILL.key, 100, WORK)


class Bench:
    def __init__(self) -> None:
        self.table = WorkerTable()
        self.clock = FakeClock()
        mode = SelectorMode("least-loaded", "auto")
        self.selector = Selector(self.table, KVIndex(self.clock), RoutingConfig(), self.clock, 0, mode)
        self.load = self.selector.load
        self.peers = PeerLoad(self.table, self.load, self.selector.rates, self.clock)
        self.selector.set_workers([DECODE, PREFILL])

    def counts(self, worker_key: tuple[str, str]) -> tuple[float, float, float, float]:
        slot = self.table.slot(worker_key)
        assert slot is not None
        load = self.load
        return load.active[slot], load.pending_tokens[slot], load.num_decoding[slot], load.kv_tokens[slot]


def test_an_aggregated_request_is_counted_computing_then_generating_then_not() -> None:
    bench = Bench()
    bench.peers.peer_added("o|r", ALONE)
    assert bench.counts(DECODE.key) == (1, 100, 0, 100)
    bench.peers.peer_prefilled("o|r")
    assert bench.counts(DECODE.key) == (1, 0, 1, 100)
    bench.peers.peer_freed("o|r")
    assert bench.counts(DECODE.key) == (0, 0, 0, 0)
    assert len(bench.peers) == 0


def test_a_disaggregated_request_leaves_its_prefill_worker_with_the_first_token() -> None:
    bench = Bench()
    bench.peers.peer_added("o|r", SPLIT)
    assert (bench.counts(PREFILL.key), bench.counts(DECODE.key)) == ((1, 100, 0, 100), (1, 0, 0, 100))
    bench.peers.peer_prefilled("o|r")
    assert (bench.counts(PREFILL.key), bench.counts(DECODE.key)) == ((0, 0, 0, 0), (1, 0, 1, 100))
    bench.peers.peer_freed("o|r")
    assert bench.counts(DECODE.key) == (0, 0, 0, 0)


def test_a_request_that_was_prefilled_before_it_was_heard_of_only_generates() -> None:
    bench = Bench()
    bench.peers.peer_added("o|r", ActiveLoad("r", DECODE.key, PREFILL.key, 100, WORK, is_prefilled=True))
    assert (bench.counts(PREFILL.key), bench.counts(DECODE.key)) == ((0, 0, 0, 0), (1, 0, 1, 100))


def test_a_request_on_a_worker_yet_unknown_is_counted_once_it_is_known() -> None:
    bench = Bench()
    late = record("late")
    bench.peers.peer_added("o|r", ActiveLoad("r", late.key, None, 100, WORK))
    bench.peers.peer_prefilled("o|r")
    bench.selector.set_workers([DECODE, PREFILL, late])
    assert bench.counts(late.key) == (1, 0, 1, 100)
    bench.peers.peer_freed("o|r")
    assert bench.counts(late.key) == (0, 0, 0, 0)


def test_a_worker_that_leaves_takes_the_counts_along() -> None:
    bench = Bench()
    bench.peers.peer_added("o|r", SPLIT)
    bench.selector.set_workers([PREFILL])
    bench.peers.peer_prefilled("o|r")
    bench.peers.peer_freed("o|r")
    assert bench.counts(PREFILL.key) == (0, 0, 0, 0)


def test_a_worker_that_was_missing_from_one_snapshot_has_its_counts_back() -> None:
    bench = Bench()
    bench.peers.peer_added("o|r", SPLIT)
    bench.peers.peer_added("o|s", ActiveLoad("s", DECODE.key, None, 100, WORK))
    bench.selector.set_workers([PREFILL])
    bench.peers.peer_prefilled("o|r")
    bench.selector.set_workers([DECODE, PREFILL])
    assert bench.counts(DECODE.key) == (2, 100, 1, 200)
    assert bench.counts(PREFILL.key) == (0, 0, 0, 0)
    bench.selector.set_workers([PREFILL])
    bench.peers.peer_freed("o|s")
    bench.selector.set_workers([DECODE, PREFILL])
    assert bench.counts(DECODE.key) == (1, 0, 1, 100)
    bench.peers.peer_freed("o|r")
    assert bench.counts(DECODE.key) == (0, 0, 0, 0)


def test_a_renewed_request_outlives_the_selectors_lease() -> None:
    bench = Bench()
    bench.peers.peer_added("o|r", ALONE)
    bench.clock.advance(0.9 * RoutingConfig().lease_ttl_s)
    bench.peers.peer_renewed("o|r")
    bench.clock.advance(0.9 * RoutingConfig().lease_ttl_s)
    bench.selector.select(RoutingRequest(4, (), "own"))
    assert bench.counts(DECODE.key)[0] == 1


def test_the_policy_sees_other_routers_requests() -> None:
    bench = Bench()
    other = record("other")
    bench.selector.set_workers([DECODE, other])
    bench.peers.peer_added("o|r", ALONE)
    assert {bench.selector.select(RoutingRequest(4, (), str(n))).decode.model_name for n in range(4)} == {"other"}


def test_when_stale_requests_spread_among_the_best() -> None:
    bench = Bench()
    workers = [record(f"w{number}") for number in range(8)]
    bench.selector.set_workers(workers)
    for number in range(2, 8):
        bench.peers.peer_added(f"o|{number}", ActiveLoad(str(number), workers[number].key, None, 100, WORK))
    bench.selector.is_stale = lambda: True
    chosen = {bench.selector.select(RoutingRequest(4, (), str(n))).decode.model_name for n in range(40)}
    assert chosen == {"w0", "w1"}


def test_a_client_that_names_its_request_like_another_routers_confuses_nobody() -> None:
    bench = Bench()
    peers = PeerLoads(bench.peers, 30.0, 3.0)
    peers.set_peers({"o": 1}, 0.0)
    peers.receive(Deltas("o", 1, 1, (Add(ALONE),)), 0.0)
    decision = bench.selector.select(RoutingRequest(100, (), request_id="o|r"))
    bench.selector.reserve(decision)
    assert bench.counts(DECODE.key)[0] == 2
    bench.selector.free("o|r", Ended(is_completed=True))
    peers.receive(Deltas("o", 1, 2, (Free("r"),)), 0.0)
    assert bench.counts(DECODE.key) == (0, 0, 0, 0)
