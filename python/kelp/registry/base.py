"""Worker and router records, and the contracts of every registry backend.

A registry is a hint, never an authority: routers keep serving from the last snapshot when it is lost
(`registry.view`), and traffic decides what is really alive.
"""

from __future__ import annotations

import re
from typing import Annotated, Protocol

from pydantic import AfterValidator, Field, TypeAdapter

from kelp.core.types import HandoffShape, KVLayout, Role, WorkerKey, WorkerState
from kelp.core.wire import Message, VersionName

_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Share = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
_HOST_AND_PORT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]):([0-9]{1,5})")
_MAX_PORT = 65535


def _endpoint(text: str) -> str:
    found = _HOST_AND_PORT.fullmatch(text)
    if found is None or not 1 <= int(found.group(1)) <= _MAX_PORT:
        raise ValueError(f"{text!r} is not host:port, IPv6 addresses in brackets, ports up to {_MAX_PORT}")
    return text


def _endpoint_or_none(text: str) -> str:
    return _endpoint(text) if text else text


_Endpoint = Annotated[str, Field(max_length=256), AfterValidator(_endpoint)]
_EndpointOrNone = Annotated[str, Field(max_length=256), AfterValidator(_endpoint_or_none)]


class LayoutRecord(Message):
    """`core.types.KVLayout` on the wire."""

    num_blocks: Annotated[int, Field(ge=1, lt=2**31)]
    num_layers: Annotated[int, Field(ge=1, lt=2**16)]
    num_kv_heads: Annotated[int, Field(ge=1, lt=2**16)]
    block_size: Annotated[int, Field(ge=1, lt=2**16)]
    head_dim: Annotated[int, Field(ge=1, lt=2**16)]
    dtype: _Name
    model_id: _Name

    @classmethod
    def of(cls, layout: KVLayout) -> LayoutRecord:
        """The record of a layout."""
        return cls(
            num_blocks=layout.num_blocks,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            block_size=layout.block_size,
            head_dim=layout.head_dim,
            dtype=layout.dtype,
            model_id=layout.model_id,
        )

    def is_compatible(self, other: LayoutRecord) -> bool:
        """Whether the two workers may exchange blocks: all but the pool size is equal."""
        return self.model_copy(update={"num_blocks": other.num_blocks}) == other


class StampedRecord(Message):
    """Anything that stays in a registry only while somebody renews it.

    Attributes:
        heartbeat_ns: Wall clock at the last renewal.
    """

    heartbeat_ns: Annotated[int, Field(ge=0, lt=2**63)] = 0


class WorkerRecord(StampedRecord):
    """One worker as it describes itself.

    Attributes:
        worker_id: `<endpoint>/<model_name>`; stable over restarts.
        epoch: Random per incarnation; a new one means that the worker's KV is gone.
        endpoint: `host:port` of the tritonserver's gRPC service.
        direct_endpoint: `host:port` of the worker's own socket for routers (decision 0010); empty for workers that are
            reached through Triton alone.
        handoff_endpoint: `host:port` of the KV handoff service; empty for workers that never prefill for others.
        events_endpoint: `host:port` of the ZMQ PUB socket with the worker's KV events; empty for a worker that does not
            publish, whose residency routers can only guess.
        replay_endpoint: `host:port` of the ZMQ ROUTER socket that repeats missed events and gives snapshots.
        max_step_tokens: Token budget of one step; 0 if unknown.
        max_running: Sequences that run at once; 0 if unknown.
        kv_manager_id: The block manager that keeps this worker's lower tiers; empty for none.
        tags: Where the worker stands, `zone` and `rack` for example; requests may require or prefer values.
        asks_token: Its event sockets serve those who know the peers' token (docs/security.md).
        version: What its model is called where several versions serve side by side (`model.version`).
        text_id: `core.model_identity.text_identity` of its model; empty if unknown.
    """

    worker_id: _Name
    epoch: _Name
    model_name: _Name
    role: Role
    state: WorkerState
    endpoint: _Endpoint
    direct_endpoint: _EndpointOrNone = ""
    handoff_endpoint: _EndpointOrNone = ""
    handoff_shape: HandoffShape = HandoffShape.RENDEZVOUS
    layout: LayoutRecord
    events_endpoint: _EndpointOrNone = ""
    replay_endpoint: _EndpointOrNone = ""
    kv_manager_id: Annotated[str, Field(max_length=256)] = ""
    max_step_tokens: _Count = 0
    max_running: _Count = 0
    tags: Annotated[dict[_Name, _Name], Field(max_length=16)] = {}
    asks_token: bool = False
    version: VersionName = "base"
    text_id: Annotated[str, Field(max_length=256)] = ""
    num_running: _Count = 0
    num_waiting: _Count = 0
    num_free_blocks: _Count = 0

    @property
    def key(self) -> WorkerKey:
        """This incarnation's name."""
        return self.worker_id, self.epoch


class RouterRecord(StampedRecord):
    """One router as others of the same workers find it.

    Attributes:
        router_id: `<endpoint>/<model instance>`; stable over restarts.
        epoch: When it started, wall-clock nanoseconds; a greater one is a later incarnation.
        loads_endpoint: `host:port` of the ZMQ PUB socket with what it has under way.
        answers_endpoint: `host:port` of the ZMQ ROUTER socket that gives snapshots and explanations.
    """

    router_id: _Name
    epoch: Annotated[int, Field(ge=0, lt=2**63)]
    loads_endpoint: _Endpoint
    answers_endpoint: _Endpoint


class KvManagerRecord(StampedRecord):
    """One KV block manager as the workers of its host and the routers find it.

    Attributes:
        manager_id: `<endpoint>/<model_name>`; stable over restarts.
        epoch: Random per incarnation.
        host: Name of the host whose workers it serves.
        endpoint: `host:port` of the tritonserver's gRPC service.
        events_endpoint: `host:port` of the ZMQ PUB socket with its KV events (tiers host, disk and object).
        replay_endpoint: `host:port` of the ZMQ ROUTER socket that repeats missed events and gives snapshots.
        shares_objects: It finds blocks in an object store that other hosts have put there, before its events tell.
        asks_token: Its event sockets serve those who know the peers' token (docs/security.md).
    """

    manager_id: _Name
    epoch: _Name
    host: _Name
    endpoint: _Endpoint
    model_name: _Name
    events_endpoint: _EndpointOrNone = ""
    replay_endpoint: _EndpointOrNone = ""
    shares_objects: bool = False
    asks_token: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """This incarnation's name."""
        return self.manager_id, self.epoch


class TrafficRecord(StampedRecord):
    """How requests are shared among versions of a model; there is at most one in a registry, and it never expires.

    Attributes:
        shares: By `WorkerRecord.version`, relative to each other; a version without one gets nothing.
        before: The shares that these have replaced; empty: none had been set.
    """

    shares: Annotated[dict[VersionName, _Share], Field(max_length=16)]
    before: Annotated[dict[VersionName, _Share], Field(max_length=16)] = {}

    @property
    def key(self) -> tuple[str, str]:
        """There is only one."""
        return "traffic", ""


class Incarnation(Protocol):
    """Anything whose every start has a name of its own."""

    @property
    def key(self) -> tuple[str, str]:
        """Id and epoch."""


WORKER_RECORD: TypeAdapter[WorkerRecord] = TypeAdapter(WorkerRecord)
ROUTER_RECORD: TypeAdapter[RouterRecord] = TypeAdapter(RouterRecord)
TRAFFIC_RECORD: TypeAdapter[TrafficRecord] = TypeAdapter(TrafficRecord)
KV_MANAGER_RECORD: TypeAdapter[KvManagerRecord] = TypeAdapter(KvManagerRecord)


class Registry(Protocol):
    """Where workers publish themselves. Calls may block on I/O: keep them off event loops."""

    def publish(self, record: WorkerRecord) -> None:
        """Create or renew a record.

        Raises:
            OSError: The registry cannot be reached.
        """

    def withdraw(self, worker_id: str, epoch: str) -> None:
        """Remove the record if it still is of this epoch; idempotent."""

    def snapshot(self) -> list[WorkerRecord]:
        """All live records.

        Raises:
            OSError: The registry cannot be reached.
        """


class RouterRegistry(Protocol):
    """Where the routers of the same workers publish themselves. Calls may block on I/O."""

    def publish(self, record: RouterRecord) -> None:
        """Create or renew a record.

        Raises:
            OSError: The registry cannot be reached.
        """

    def withdraw(self, router_id: str, epoch: int) -> None:
        """Remove the record if it still is of this epoch; idempotent."""

    def snapshot(self) -> list[RouterRecord]:
        """All live records.

        Raises:
            OSError: The registry cannot be reached.
        """
