"""What the standalone router does for each call; synchronous, on one event loop, whatever the transport.

Every operation takes one JSON document and gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from kelp.core.clock import Clock
from kelp.core.errors import InvalidRequest, NotFound, ProtocolError
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.types import SequenceHash, WorkerKey
from kelp.core.wire import Message, decode_message, encode_message
from kelp.registry.base import KvManagerRecord, Registry, WorkerRecord
from kelp.registry.memory import Records
from kelp.router.api.messages import (
    ChosenWorker,
    Done,
    Dump,
    DumpRequest,
    FirstTokenRequest,
    FreeRequest,
    ManagerView,
    Nothing,
    ProgressRequest,
    RegisterManagerRequest,
    RegisterRequest,
    RequestName,
    Selection,
    SelectRequest,
    WithdrawManagerRequest,
    WithdrawRequest,
    Workers,
    WorkerView,
)
from kelp.router.api.reservations import Reservations
from kelp.router.decision.explain import Explanation
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Ended, FirstToken, Selector
from kelp.router.decision.workers import WorkerTable


@dataclass(frozen=True, slots=True)
class ApiParts:
    """What the operations work on.

    Attributes:
        reservations: What the callers have under way.
        registry: Takes the workers that register here,
        managers: and this the KV block managers.
        view_managers: Those that are known.
        refresh: Makes the selector see a change of the registries at once.
        dump: What the router knows, for debugging.
    """

    selector: Selector
    table: WorkerTable
    reservations: Reservations
    registry: Registry
    managers: Records[KvManagerRecord]
    view_managers: Callable[[], tuple[ManagerView, ...]]
    refresh: Callable[[], None]
    dump: Callable[[DumpRequest], Dump]
    clock: Clock


class Operations:
    """All calls by name; an unknown name, a malformed document or an unknown request is a typed error."""

    def __init__(self, parts: ApiParts) -> None:
        self._parts = parts
        self._calls: dict[str, Callable[[bytes], Message]] = {
            "select": _typed(SelectRequest, self.select),
            "reserve": _typed(RequestName, self.reserve),
            "commit": _typed(RequestName, self.commit),
            "first_token": _typed(FirstTokenRequest, self.first_token),
            "progress": _typed(ProgressRequest, self.progress),
            "free": _typed(FreeRequest, self.free),
            "explain": _typed(RequestName, self.explain),
            "workers": _typed(Nothing, self.workers),
            "register": _typed(RegisterRequest, self.register),
            "withdraw": _typed(WithdrawRequest, self.withdraw),
            "register_manager": _typed(RegisterManagerRequest, self.register_manager),
            "withdraw_manager": _typed(WithdrawManagerRequest, self.withdraw_manager),
            "dump": _typed(DumpRequest, self.dump),
        }

    @property
    def names(self) -> Sequence[str]:
        """All operations."""
        return tuple(self._calls)

    def call(self, name: str, document: bytes) -> bytes:
        """Do one.

        Raises:
            NotFound: There is no such operation, or what it names does not exist.
            InvalidRequest: The document is not what the operation takes; names the field.
            KelpError: Whatever the operation raises.
        """
        self.sweep()
        if name not in self._calls:
            raise NotFound(f"{name!r}: no such operation; there are: {', '.join(self._calls)}")
        return encode_message(self._calls[name](document))

    def sweep(self) -> None:
        """Free what callers have forgotten: to be called now and then, they may all have gone."""
        self._parts.reservations.sweep()

    def select(self, asked: SelectRequest) -> Selection:
        """Choose workers, and count the request there if asked to."""
        parts = self._parts
        decision = parts.selector.select(self._routing(asked), self._keys(asked.avoid), asked.allow_prefill)
        if asked.reserve:
            parts.reservations.reserve(decision)
        else:
            parts.reservations.select(decision)
        prefill = None if decision.prefill is None else _chosen(decision.prefill)
        return Selection(
            request_id=asked.request_id,
            decode=_chosen(decision.decode),
            prefill=prefill,
            is_reserved=asked.reserve,
            known_blocks=decision.known_blocks,
        )

    def reserve(self, asked: RequestName) -> Done:
        """Count a selected request as active."""
        if not self._parts.reservations.reserve_selected(asked.request_id):
            raise NotFound(f"request_id: no selection of {asked.request_id!r} waits to be reserved; select again")
        return Done()

    def commit(self, asked: RequestName) -> Done:
        """The request has been sent to its workers."""
        return Done(is_known=self._parts.reservations.commit(asked.request_id))

    def first_token(self, asked: FirstTokenRequest) -> Done:
        """Learn from a prefill."""
        told = FirstToken(
            num_cached_tokens=asked.num_cached_tokens,
            queue_s=asked.queue_s,
            prefill_s=asked.prefill_s,
            transfer_s=asked.transfer_s,
            onboarded_blocks=asked.onboarded_blocks,
            onboard_s=asked.onboard_s,
        )
        return Done(is_known=self._parts.reservations.first_token(asked.request_id, told))

    def progress(self, asked: ProgressRequest) -> Done:
        """Renew a request's lease."""
        return Done(is_known=self._parts.reservations.progress(asked.request_id, asked.num_tokens))

    def free(self, asked: FreeRequest) -> Done:
        """Forget a request; learn from it if it completed."""
        ended = Ended(asked.is_completed, asked.num_output_tokens, asked.decode_s)
        return Done(is_known=self._parts.reservations.free(asked.request_id, ended))

    def explain(self, asked: RequestName) -> Explanation:
        """Why a request went where it went."""
        explanation = self._parts.selector.explain(asked.request_id)
        if explanation is None:
            raise NotFound(f"request_id: nothing is known of {asked.request_id!r} (any more)")
        return explanation

    def workers(self, _: Nothing) -> Workers:
        """All workers with the requests counted there, and all KV block managers."""
        parts = self._parts
        views = tuple(self._view(slot) for slot in parts.table.slots())
        return Workers(workers=views, managers=parts.view_managers())

    def register(self, asked: RegisterRequest) -> Done:
        """Create or renew a worker's record."""
        self._parts.registry.publish(asked.worker)
        self._parts.refresh()
        return Done()

    def withdraw(self, asked: WithdrawRequest) -> Done:
        """Take a worker out."""
        is_known = self._parts.table.slot((asked.worker_id, asked.epoch)) is not None
        self._parts.registry.withdraw(asked.worker_id, asked.epoch)
        self._parts.refresh()
        return Done(is_known=is_known)

    def register_manager(self, asked: RegisterManagerRequest) -> Done:
        """Create or renew a KV block manager's record; workers name theirs in `kv_manager_id`."""
        self._parts.managers.publish(asked.manager)
        self._parts.refresh()
        return Done()

    def withdraw_manager(self, asked: WithdrawManagerRequest) -> Done:
        """Take a KV block manager out."""
        known = {(view.manager_id, view.epoch) for view in self._parts.view_managers()}
        self._parts.managers.withdraw(asked.manager_id, asked.epoch)
        self._parts.refresh()
        return Done(is_known=(asked.manager_id, asked.epoch) in known)

    def dump(self, asked: DumpRequest) -> Dump:
        """What the router knows."""
        return self._parts.dump(asked)

    def _routing(self, asked: SelectRequest) -> RoutingRequest:
        now_s = self._parts.clock.monotonic_s()
        return RoutingRequest(
            num_prompt_tokens=len(asked.token_ids) or asked.num_prompt_tokens,
            block_hashes=self._hashes(asked),
            request_id=asked.request_id,
            max_tokens=asked.max_tokens,
            session_id=asked.session_id,
            priority=asked.priority,
            deadline_s=None if asked.deadline_ms is None else now_s + asked.deadline_ms / 1e3,
            pinned_worker=asked.pinned_worker,
            model_id=asked.model_id,
            required_tags=asked.required_tags,
            preferred_tags=asked.preferred_tags,
        )

    def _hashes(self, asked: SelectRequest) -> list[SequenceHash]:
        if not asked.token_ids:
            return [SequenceHash(bytes.fromhex(name)) for name in asked.block_hashes]
        records = [self._parts.table.record(slot) for slot in self._parts.table.slots()]
        model_ids = {asked.model_id} if asked.model_id else {record.layout.model_id for record in records}
        sizes = {record.layout.block_size for record in records if record.layout.model_id in model_ids}
        if len(model_ids) > 1:
            raise InvalidRequest(f"model_id: the workers serve {', '.join(sorted(model_ids))}; say which")
        if len(sizes) > 1:
            raise InvalidRequest(f"token_ids: the workers' block sizes differ ({sorted(sizes)}); give block_hashes")
        if not sizes:
            return []
        seed = seed_hash(model_ids.pop(), asked.lora_id, asked.cache_salt)
        return sequence_hashes(asked.token_ids, sizes.pop(), seed)

    def _keys(self, worker_ids: Sequence[str]) -> frozenset[WorkerKey]:
        names = set(worker_ids)
        records = (self._parts.table.record(slot) for slot in self._parts.table.slots())
        return frozenset(record.key for record in records if record.worker_id in names)

    def _view(self, slot: int) -> WorkerView:
        record = self._parts.table.record(slot)
        return WorkerView(
            worker_id=record.worker_id,
            epoch=record.epoch,
            role=record.role,
            state=record.state,
            slot=slot,
            publishes_events=bool(record.events_endpoint),
            num_requests=int(self._parts.selector.load.active[slot]),
            kv_manager_id=record.kv_manager_id,
        )


def _chosen(record: WorkerRecord) -> ChosenWorker:
    return ChosenWorker(
        worker_id=record.worker_id,
        epoch=record.epoch,
        model_name=record.model_name,
        role=record.role,
        endpoint=record.endpoint,
        handoff_endpoint=record.handoff_endpoint,
    )


def _typed(message_type: Any, operation: Callable[[Any], Message]) -> Callable[[bytes], Message]:
    adapter: TypeAdapter[Any] = TypeAdapter(message_type)

    def call(document: bytes) -> Message:
        try:
            asked = decode_message(adapter, document, "document")
        except ProtocolError as error:
            raise InvalidRequest(error.text) from None
        return operation(asked)

    return call
