"""What routers, workers and registries tell each other as JSON, and how they show who they are."""

from __future__ import annotations

import msgspec
import numpy as np

from fuzz.examples import (
    COMMAND,
    DESCRIPTION,
    LAYOUT,
    MANAGER,
    RICH_COMMAND,
    ROUTER,
    TRAFFIC,
    WORKER,
    document_parser,
)
from fuzz.parsers import Family, Parser, WrongOutcome
from fuzz.triton_answers import ANSWERS, triton_end
from kelp.client.direct.sockets import parse_endpoint
from kelp.core.clock import FakeClock
from kelp.core.errors import InvalidRequest, PeerRefused, ProtocolError
from kelp.core.handoff_messages import (
    HANDOFF_COMMAND,
    HANDOFF_EVENT,
    PEER_DESCRIPTION,
    Acknowledge,
    Announce,
    Attach,
    HandoffFailed,
    Heartbeat,
    LeaseRenewed,
    PrefillDone,
)
from kelp.core.messages import (
    WORKER_COMMAND,
    WORKER_EVENT,
    WORKER_STATUS,
    CancelCommand,
    DrainCommand,
    Finished,
    Progress,
    StatusCommand,
    WorkerCommand,
    WorkerStatus,
)
from kelp.core.peer_auth import WORKER_COMMAND_PROOF, PeerToken, seal, unseal
from kelp.core.peer_handshake import Initiator, Responder
from kelp.core.types import FinishReason, KVLayout, Role
from kelp.core.wire import decode_message, encode_message
from kelp.registry.base import KV_MANAGER_RECORD, ROUTER_RECORD, TRAFFIC_RECORD, WORKER_RECORD, WorkerRecord
from kelp.registry.etcd import EtcdRecords
from kelp.registry.etcd_client import Entry, Reading
from kelp.registry.kinds import WORKER_SUFFIX
from kelp.registry.record_seal import RecordSeal
from kelp.router.feed.publisher import publisher_of
from kelp.transport.base import Region
from kelp.transport.layout import device_number, peer_region
from kelp.transport.metadata import pack_metadata, unpack_metadata
from kelp.worker.exchange_channel import read_command, read_prompt

_TOKEN = PeerToken(b"t" * 16)
_SCOPE = ("w", "e")
_POOL = KVLayout(**{**LAYOUT.model_dump(), "num_blocks": 8})
_STATUS = WorkerStatus(
    worker="w", epoch="e", role=Role.DECODE, state="ready", num_running=1, num_waiting=0, num_blocks=4,
    num_free_blocks=3, num_cached_blocks=0, num_leases=0,
)  # fmt: skip


def _command_tensors(raw: bytes) -> WorkerCommand:
    tensors = {"command": np.array([raw], dtype=np.object_), "input_ids": np.zeros(2, np.int32)}
    read_prompt(tensors)
    return read_command(tensors, _TOKEN, _SCOPE)


def _pool_of(raw: bytes) -> Region:
    """What a reader does with a description before it connects."""
    description = decode_message(PEER_DESCRIPTION, raw, "description")
    region = peer_region(_POOL, description)
    device_number(region)
    unpack_metadata("nixl", bytes.fromhex(description.agent_metadata_hex))
    return region


WORKER_DOCUMENTS = Family(
    "worker_documents",
    (
        document_parser(
            "worker command", WORKER_COMMAND, COMMAND, RICH_COMMAND, DrainCommand(), CancelCommand(request_id="r"),
            StatusCommand(),
        ),
        document_parser("worker event", WORKER_EVENT, Finished(finish_reason=FinishReason.STOP), Progress()),
        document_parser("worker status", WORKER_STATUS, _STATUS),
        Parser(
            "command tensor", _command_tensors,
            (seal(_TOKEN, WORKER_COMMAND_PROOF, _SCOPE, encode_message(COMMAND), bytes(8)),
             encode_message(StatusCommand())),
            "json", (ProtocolError, PeerRefused, InvalidRequest),
        ),
        Parser("answers through Triton", triton_end, tuple(map(msgspec.msgpack.encode, ANSWERS)), "msgpack", ()),
    ),
)  # fmt: skip


def _handshake(raw: bytes) -> bytes:
    """What a stranger says to either end."""
    heard = _frames(raw)
    responder, initiator = Responder(_TOKEN, _SCOPE, "peer"), Initiator(_TOKEN, _SCOPE, "peer")
    answer = b"".join(responder.take(one) for one in heard[:2])
    if responder.is_done:
        raise WrongOutcome("a stranger was believed")
    for one in heard[2:3]:
        initiator.prove(one)
        raise WrongOutcome("a stranger was believed")
    return answer


def _unsealed(raw: bytes) -> bytes:
    unseal(None, "handoff", _SCOPE, raw)
    unseal(_TOKEN, "handoff", _SCOPE, raw)
    raise WrongOutcome("a stranger was believed")


def _frames(raw: bytes) -> list[bytes]:
    try:
        return msgspec.msgpack.decode(raw, type=list[bytes])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []


HANDOFF = Family(
    "handoff",
    (
        document_parser("handoff command", HANDOFF_COMMAND, Attach(handoff_id="h"), Heartbeat(number=1), Acknowledge()),
        document_parser(
            "handoff event", HANDOFF_EVENT, Announce(num_tokens=4, block_ids=(1, 2)),
            PrefillDone(first_token=1, first_log_prob=-0.5), LeaseRenewed(heartbeat=1, ttl_s=2.0),
            HandoffFailed(message="KELP_OVERLOADED: full"),
        ),
        document_parser("description", PEER_DESCRIPTION, DESCRIPTION),
        Parser("pool of a description", _pool_of, (encode_message(DESCRIPTION),), "json"),
        Parser("metadata", lambda raw: unpack_metadata("nixl", raw), (pack_metadata("nixl", "a", b"x"),)),
        Parser(
            "handshake", _handshake,
            (msgspec.msgpack.encode([Initiator(_TOKEN, _SCOPE, "p").opening, b"\xc1KELPHS3" + bytes(32)]),
             msgspec.msgpack.encode([b"", b"", b"\xc1KELPHS2" + bytes(64)])),
            "msgpack", (PeerRefused,),
        ),
        Parser("sealed by a stranger", _unsealed, (seal(PeerToken(b"s" * 16), "handoff", _SCOPE, b"{}"),),
               refusals=(PeerRefused,)),
    ),
)  # fmt: skip
_WORKERS = RecordSeal(WORKER_SUFFIX, WORKER_RECORD, None)
_SEALED_WORKERS = RecordSeal(WORKER_SUFFIX, WORKER_RECORD, _TOKEN)


def _worker_record(raw: bytes) -> WorkerRecord:
    """A record, and what a router asks of it."""
    record = _WORKERS.read(raw, _WORKERS.place("w"))
    publisher = publisher_of(record)
    for endpoint in (publisher.endpoint, publisher.replay_endpoint, record.direct_endpoint, record.handoff_endpoint):
        if endpoint:
            parse_endpoint(endpoint)
    record.layout.is_compatible(LAYOUT)
    encode_message(record)
    return record


class _Keys:
    """An etcd that somebody else has filled."""

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self._entries = entries

    def read_below(self, prefix: str) -> Reading:
        return Reading(self._entries, 1)


def _etcd(raw: bytes) -> list[WorkerRecord]:
    frames = _frames(raw)
    pairs = zip(frames[::2], frames[1::2], strict=False)
    entries = tuple(Entry(key.decode(errors="replace"), value, 1) for key, value in pairs)
    records: EtcdRecords[WorkerRecord] = EtcdRecords(_Keys(entries), "kelp/", _SEALED_WORKERS, 5.0, FakeClock())  # type: ignore[arg-type]
    return records.live()


REGISTRY = Family(
    "registry",
    (
        Parser("worker record in use", _worker_record, (encode_message(WORKER),), "json"),
        document_parser("worker record", WORKER_RECORD, WORKER),
        document_parser("router record", ROUTER_RECORD, ROUTER),
        document_parser("manager record", KV_MANAGER_RECORD, MANAGER),
        document_parser("traffic record", TRAFFIC_RECORD, TRAFFIC),
        Parser(
            "sealed record", lambda raw: _SEALED_WORKERS.read(raw, _SEALED_WORKERS.place("w")),
            (_SEALED_WORKERS.written(WORKER, _SEALED_WORKERS.place("w")),), refusals=(ProtocolError, PeerRefused),
        ),
        Parser(
            "etcd", _etcd,
            (msgspec.msgpack.encode([b"kelp/w" + WORKER_SUFFIX.encode(),
                                     _SEALED_WORKERS.written(WORKER, _SEALED_WORKERS.place("w"))]),),
            "msgpack",
        ),
    ),
)  # fmt: skip
