"""What the block manager and its object-store process say to each other, over a socket pair.

One request, one answer, in turns. Blocks never travel here: both sides map the arena. MessagePack, decoded by type;
nothing is ever unpickled. The key of encryption travels here too, because it must stand neither in arguments nor in an
environment.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kelp.core.errors import ProtocolError
from kelp.core.types import SequenceHash
from kelp.kv.tiers.base import BlockRecord

PutOutcome = Literal["stored", "present", "mismatch", "failed"]
GetOutcome = Literal["read", "missing", "damaged", "failed"]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the values inside messages."""


class ArenaMap(_Struct, frozen=True):
    """The host arena as another process maps it: slot *s* is `block_bytes` bytes at `offset_bytes + s * stride_bytes`.

    Attributes:
        path: File of the arena.
    """

    path: str
    offset_bytes: int
    num_slots: int
    block_bytes: int
    stride_bytes: int


class StoreAddress(_Struct, frozen=True):
    """Where the objects are; see `ObjectTierConfig`."""

    bucket: str
    endpoint: str
    region: str


class Block(_Struct, frozen=True, array_like=True):
    """A `BlockRecord` without its tenant; `parent` is empty for none."""

    sequence_hash: bytes
    parent: bytes
    position: int
    checksum: bytes

    @classmethod
    def of(cls, record: BlockRecord) -> Block:
        """The record, as it travels."""
        return cls(record.sequence_hash, record.parent or b"", record.position, record.checksum)

    def record(self, tenant: bytes) -> BlockRecord:
        """The record of a block of `tenant`."""
        parent = SequenceHash(self.parent) if self.parent else None
        return BlockRecord(SequenceHash(self.sequence_hash), parent, self.position, tenant, self.checksum)


class GroupWrite(_Struct, frozen=True):
    """A whole group; `is_forced` writes it even if the store has an object of its name."""

    key: str
    tenant: bytes
    slots: tuple[int, ...]
    blocks: tuple[Block, ...]
    is_forced: bool


class GroupRead(_Struct, frozen=True):
    """Consecutive blocks of a group, from its `first`-th on, and the arena slots that they are wanted in."""

    key: str
    tenant: bytes
    first: int
    names: tuple[bytes, ...]
    slots: tuple[int, ...]


class GroupContent(_Struct, frozen=True):
    """How reading went; `blocks` are those that are right, in the order asked for."""

    outcome: GetOutcome
    blocks: tuple[Block | None, ...] = ()


class Listed(_Struct, frozen=True, array_like=True):
    """An object of the store."""

    key: str
    num_bytes: int
    modified_s: float


class Request(_Struct, frozen=True, tag_field="request", tag=str.lower):
    """Base of what is asked."""


class Answer(_Struct, frozen=True, tag_field="answer", tag=str.lower):
    """Base of what is answered."""


class Hello(Request, frozen=True):
    """First: what the process works on.

    Attributes:
        encryption_key: Empty where nothing is encrypted.
        timeout_s: Of calls that list and delete; what moves blocks is bounded by the other side.
        num_lanes: Groups that are moved at once.
    """

    address: StoreAddress
    arena: ArenaMap
    space: bytes
    group_blocks: int
    num_lanes: int
    timeout_s: float
    encryption_key: bytes


class Ready(Answer, frozen=True):
    """The process is at work."""


class Refused(Answer, frozen=True):
    """It cannot be done: of the request, or for good if it answers `Hello`. The reason is for the log."""

    reason: str


class Put(Request, frozen=True):
    """Write whole groups, `num_lanes` at most."""

    groups: tuple[GroupWrite, ...]


class PutDone(Answer, frozen=True):
    """By group; `failure` is the reason if any failed."""

    outcomes: tuple[PutOutcome, ...]
    failure: str = ""


class Get(Request, frozen=True):
    """Read from groups, `num_lanes` at most."""

    groups: tuple[GroupRead, ...]


class GetDone(Answer, frozen=True):
    """By group; `failure` is the reason if any failed."""

    groups: tuple[GroupContent, ...]
    failure: str = ""


class Ask(Request, frozen=True):
    """Which objects exist: the first, and, only if that one does, all others."""

    keys: tuple[str, ...]


class Asked(Answer, frozen=True):
    """By key."""

    found: tuple[bool, ...]


class Spaces(Request, frozen=True):
    """The folders right below `root`."""

    root: str


class SpacesDone(Answer, frozen=True):
    """Their prefixes."""

    prefixes: tuple[str, ...]


class List(Request, frozen=True):
    """One page of the objects below `prefix`, from where `token` says."""

    prefix: str
    token: str = ""


class ListDone(Answer, frozen=True):
    """`token` is empty at the end."""

    objects: tuple[Listed, ...]
    token: str


class Delete(Request, frozen=True):
    """Delete objects, `bucket.PAGE_OBJECTS` at most; those that are not there count as deleted."""

    keys: tuple[str, ...]


class DeleteDone(Answer, frozen=True):
    """How many are gone; `failure` is the reason if not all are."""

    num_deleted: int
    failure: str = ""


AnyRequest = Hello | Put | Get | Ask | Spaces | List | Delete
AnyAnswer = Ready | Refused | PutDone | GetDone | Asked | SpacesDone | ListDone | DeleteDone


_NO_MESSAGE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_requests = msgspec.msgpack.Decoder(AnyRequest)
_answers = msgspec.msgpack.Decoder(AnyAnswer)


def encode(message: AnyRequest | AnyAnswer) -> bytes:
    """For the wire."""
    return msgspec.msgpack.encode(message)


def decode_request(raw: bytes) -> AnyRequest:
    """From the wire.

    Raises:
        ProtocolError: It is none.
    """
    try:
        request: AnyRequest = _requests.decode(raw)
    except _NO_MESSAGE as error:
        raise ProtocolError(f"object store process: {error}") from error
    return request


def decode_answer(raw: bytes) -> AnyAnswer:
    """From the wire.

    Raises:
        ProtocolError: It is none.
    """
    try:
        answer: AnyAnswer = _answers.decode(raw)
    except _NO_MESSAGE as error:
        raise ProtocolError(f"object store process: {error}") from error
    return answer
