"""The decision, alone: which workers serve a request, and what is on its way to them.

Synchronous and free of I/O, so that the Triton router, `kelp router` and the simulator run this very code, on whatever
clock. Life of a request here:

    select ─► reserve ─► commit ─► first_token ─► progress* ─► free
                 └──────── free (never sent, failed, cancelled) ──┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.config import RoutingConfig
from kelp.core.types import WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.decision.affinity import Sessions
from kelp.router.decision.choosing import Chooser, Question, SelectorMode
from kelp.router.decision.costs import CostModel
from kelp.router.decision.decision import Decision
from kelp.router.decision.explain import Decided, DecisionLog, Explanation, State
from kelp.router.decision.fleet import Fleet
from kelp.router.decision.learning import Generating, Learning
from kelp.router.decision.lengths import AnswerLengths
from kelp.router.decision.load import Entry, Load
from kelp.router.decision.outcome import Ended, FirstToken
from kelp.router.decision.prompt_order import PromptOrder, Waits
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.workers import WorkerTable
from kelp.router.index.base import OverlapIndex
from kelp.timing.rates import Rates, Work

__all__ = ["Decision", "Ended", "FirstToken", "Selector", "SelectorMode"]


@dataclass(slots=True)
class _Live:
    """A request that was reserved: `prefilling` is where its prompt is computed, `decoding` where it generates."""

    request: RoutingRequest
    begun_s: float
    prefilling: Entry
    decoding: Entry
    transfer_blocks: float
    waits: Waits | None
    has_first_token: bool = False
    generating: Generating | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """One or two."""
        return (self.decoding,) if self.prefilling is self.decoding else (self.prefilling, self.decoding)


class Selector:
    """Chooses, remembers what it chose, and learns from what came of it; belongs to one event loop.

    Attributes:
        fleet: What workers say of themselves, by slot.
        load: Counts by slot; other routers' requests are counted there as well (`router.replicas.peer_load`).
        rates: What workers' speeds are thought to be.
        lengths: How long answers are thought to be.
        order: In which order workers are thought to compute prompts.
        is_stale: Whether other routers' requests are not known well enough to trust the counts; then requests spread
            among the best workers.
        knows_all_of: Whether the index has all that the worker in a slot holds, and all that lies below it.
    """

    def __init__(
        self,
        table: WorkerTable,
        index: OverlapIndex,
        config: RoutingConfig,
        clock: Clock,
        seed: int = 0,
        mode: SelectorMode | None = None,
    ) -> None:
        mode = mode or SelectorMode()
        self._table = table
        self._index = index
        self._clock = clock
        self._sessions = Sessions(config.max_sessions, config.session_ttl_s)
        self._heartbeats: dict[WorkerKey, int] = {}
        self._live: dict[str, _Live] = {}
        self._log = DecisionLog(mode.policy, config.explained_bytes)
        self.fleet = Fleet(table)
        self.is_stale: Callable[[], bool] = lambda: False
        self.knows_all_of: Callable[[int], bool] = lambda _: False
        self.rates = Rates()
        self.load = Load(config.reservation_ttl_s, config.lease_ttl_s)
        self._learning = Learning(self.rates, self.load)
        self.lengths = AnswerLengths()
        self.order = PromptOrder()
        costs = CostModel(self.fleet, self.load, self.rates, self.lengths, self.order)
        self._chooser = Chooser(table, self.fleet, costs, config, mode, seed)
        table.watch(self._joined, self._left)
        for slot in table.slots():
            self._joined(slot)
        self.fleet.refresh()

    def set_workers(self, records: Sequence[WorkerRecord]) -> None:
        """Take the registry's latest snapshot, workers that are not ready included."""
        try:
            self._table.update(records)
        finally:
            self.fleet.refresh()
        before, self._heartbeats = self._heartbeats, {}
        for record in records:
            self._heartbeats[record.key] = record.heartbeat_ns
            slot = self._table.slot(record.key)
            if slot is not None and before.get(record.key) != record.heartbeat_ns:
                self.load.hear(slot, record.num_running + record.num_waiting)

    def select(
        self, request: RoutingRequest, avoid: frozenset[WorkerKey] = frozenset(), allow_prefill: bool = True
    ) -> Decision:
        """Choose; changes nothing but the record for `explain`.

        Args:
            request: What to place.
            avoid: Workers that have just failed this request; used again only if nothing else is left.
            allow_prefill: False once remote prefill has failed too often for this request.

        Raises:
            NoWorker: No worker of a needed role is ready, or none that the request's pin and tags allow.
        """
        now_s = self._clock.monotonic_s()
        self._drop_lapsed(now_s)
        session = self._sessions.worker_of(request.session_id, now_s) if request.session_id else None
        matches = self._index.match(request.block_hashes)
        question = Question(request, matches, avoid, allow_prefill, session, now_s, self.is_stale())
        way = self._chooser.choose(question)
        num_blocks = len(request.block_hashes)
        self._log.add(Decided(request.request_id, num_blocks, now_s, way.reason, way.choices, way.ttft_s, way.itl_s))
        prefill = None if way.prefill_slot is None else self._table.record(way.prefill_slot)
        computing_slot = way.decode_slot if way.prefill_slot is None else way.prefill_slot
        known_blocks = int(way.overlap_blocks) if self.knows_all_of(computing_slot) else None
        return Decision(request, self._table.record(way.decode_slot), prefill, way, way.ttft_s, known_blocks)

    def reserve(self, decision: Decision) -> None:
        """Count the request as active there, and expect its blocks; lapses if `commit` does not follow in time.

        A decision that another process made counts as if nothing of its prompt were cached.
        """
        now_s = self._clock.monotonic_s()
        request = decision.request
        self.free(request.request_id, Ended(False))
        decode_slot = self._table.slot(decision.decode.key)
        if decode_slot is None:
            return
        prefill_slot = self._table.slot(decision.prefill.key) if decision.prefill else decode_slot
        work, work_s, blocks = self._expected(decision, decode_slot)
        tokens = float(request.num_prompt_tokens)
        decoding = Entry(request.request_id, decode_slot, tokens, None, 0.0, now_s)
        prefilling = decoding
        if prefill_slot is None or prefill_slot == decode_slot:
            decoding.work, decoding.work_s = work, work_s
        else:
            prefilling = Entry(request.request_id, prefill_slot, tokens, work, work_s, now_s)
            self.load.add(prefilling)
        self.load.add(decoding)
        self._index.expect(prefilling.slot, request.block_hashes)
        waits = decision.way.waits if decision.way is not None else None
        self._live[request.request_id] = _Live(request, now_s, prefilling, decoding, blocks, waits)
        if request.session_id:
            self._sessions.note(request.session_id, decision.decode.key, now_s)
        self._set_state(request.request_id, "reserved")

    def commit(self, request_id: str) -> bool:
        """The request has been sent. False if its reservation has lapsed: select again."""
        now_s = self._clock.monotonic_s()
        self._drop_lapsed(now_s)
        live = self._live.get(request_id)
        if live is None:
            return False
        for entry in live.entries:
            entry.is_committed = True
            entry.now_s = now_s
        self._set_state(request_id, "committed")
        return True

    def first_token(self, request_id: str, told: FirstToken) -> None:
        """The prompt has been computed; learn from it. Unknown ids are ignored, as in the calls below."""
        live = self._live.get(request_id)
        if live is None or live.has_first_token:
            return
        now_s = self._clock.monotonic_s()
        live.has_first_token = True
        self._learn_prefill(live, told, now_s)
        for entry in live.entries:
            self.load.prefilled(entry, now_s)
        self.load.decoding(live.decoding, now_s)
        if live.prefilling is not live.decoding:
            self.load.remove(live.prefilling, now_s)
        if live.decoding.slot >= 0:
            live.generating = self._learning.generating(live.decoding.slot)
        decided = self._log.find(request_id)
        if decided is not None:
            decided.state, decided.told, decided.first_token_s = "running", told, now_s

    def transferred(self, request_id: str, seconds: float) -> None:
        """The prompt's KV has reached the decode worker, so long after it could first be fetched."""
        live = self._live.get(request_id)
        if live is not None and live.prefilling is not live.decoding:
            self.rates.observe_handoff(live.transfer_blocks, seconds)

    def progress(self, request_id: str, num_tokens: int) -> None:
        """That many more output tokens came: the request lives, and its KV grows."""
        live = self._live.get(request_id)
        if live is not None:
            self.load.grow(live.decoding, num_tokens, self._clock.monotonic_s())

    def free(self, request_id: str, ended: Ended) -> None:
        """Nothing of the request runs any more; idempotent."""
        live = self._live.get(request_id)
        if live is None:
            return
        if ended.is_completed and ended.num_output_tokens:
            self.lengths.observe(ended.num_output_tokens)
            if live.generating is not None and live.decoding.slot >= 0:
                self._learning.ended(live.generating, ended)
        self._forget(request_id, live, "completed" if ended.is_completed else "failed")
        decided = self._log.find(request_id)
        if decided is not None:
            decided.ended = ended

    @property
    def num_explained_bytes(self) -> int:
        """Estimated memory of the decisions that can be explained."""
        return self._log.num_bytes

    def entries(self, request_id: str) -> tuple[Entry, ...]:
        """What is counted for a live request, the worker that computes the prompt first; empty if there is none."""
        live = self._live.get(request_id)
        return () if live is None else live.entries

    def explain(self, request_id: str) -> Explanation | None:
        """Why it went where it went; None if that is unknown or was too long ago."""
        return self._log.explain(request_id)

    def _joined(self, slot: int) -> None:
        self._learning.begin(slot)
        for entry in self.load.begin(slot, self._table.record(slot).key):
            live = self._live.get(entry.key)
            if live is not None:
                live.generating = None

    def _left(self, slot: int) -> None:
        self.load.end(slot, self._table.record(slot).key)

    def _expected(self, decision: Decision, decode_slot: int) -> tuple[Work, float, float]:
        if decision.way is not None:
            return decision.way.work, decision.way.work_s, decision.way.transfer_blocks
        tokens = float(decision.request.num_prompt_tokens)
        work = Work(1.0, tokens, 0.5 * tokens * tokens)
        return work, self.rates.seconds(decode_slot, work), tokens / decision.decode.layout.block_size

    def _learn_prefill(self, live: _Live, told: FirstToken, now_s: float) -> None:
        entry, work = live.prefilling, live.prefilling.work
        if entry.slot < 0 or work is None:
            return
        num_prompt = live.request.num_prompt_tokens
        tokens = float(max(num_prompt - told.num_cached_tokens, 1))
        steps = max(work.steps * tokens / max(work.tokens, 1.0), 1.0)
        done = Work(steps, tokens, tokens * (num_prompt - 0.5 * tokens))
        self._learning.prefilled(entry.slot, done, told, live.begun_s, now_s)
        self.rates.observe_onboarding(told.onboarded_blocks, told.onboard_s)
        if live.waits is not None and self.rates.is_measured:
            self.order.observe(live.waits, now_s - live.begun_s - told.transfer_s)
        if live.prefilling is not live.decoding and told.transfer_s > 0.0:
            self.rates.observe_handoff(live.transfer_blocks, told.transfer_s)

    def _drop_lapsed(self, now_s: float) -> None:
        for entry in self.load.lapsed(now_s):
            live = self._live.get(entry.key)
            if live is not None and entry in live.entries:
                self._forget(entry.key, live, "lapsed")
            else:
                self.load.remove(entry, now_s)

    def _forget(self, request_id: str, live: _Live, state: State) -> None:
        now_s = self._clock.monotonic_s()
        if not live.has_first_token and live.prefilling.slot >= 0:
            self._index.retract(live.prefilling.slot, live.request.block_hashes)
        for entry in live.entries:
            self.load.remove(entry, now_s)
        del self._live[request_id]
        self._set_state(request_id, state)

    def _set_state(self, request_id: str, state: State) -> None:
        decided = self._log.find(request_id)
        if decided is not None:
            decided.state = state
