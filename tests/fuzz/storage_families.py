"""What lies in files and object stores: others, or an earlier process that died, may have left anything there."""

from __future__ import annotations

import atexit
import functools
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import msgspec
from botocore.awsrequest import AWSResponse

from fuzz.parsers import Family, Label, Parser, WrongOutcome
from kelp.core.errors import RetryableTransferError
from kelp.core.types import SequenceHash, Tier
from kelp.kv.tiers.arena_file import ArenaShape, claim_arena
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.clears import ClearJournal
from kelp.kv.tiers.disk.folder import Manifest, claim_folder
from kelp.kv.tiers.objects.bucket import Bucket
from kelp.kv.tiers.objects.header import GroupSpace, StoredBlock, pack_header, unpack_header
from kelp.kv.tiers.objects.messages import (
    ArenaMap,
    Ask,
    Asked,
    Delete,
    DeleteDone,
    Get,
    GetDone,
    GroupContent,
    GroupRead,
    GroupWrite,
    Hello,
    List,
    ListDone,
    Listed,
    Put,
    PutDone,
    Ready,
    Spaces,
    SpacesDone,
    StoreAddress,
    decode_answer,
    decode_request,
    encode,
)
from kelp.kv.tiers.objects.messages import Block as WireBlock
from kelp.kv.tiers.objects.names import KeySpace
from kelp.kv.tiers.records import RecordFormat, SlotRecord
from kelp.supervisor.run_state import WantedWorkers, read_wanted

_SPACE, _TENANT, _CHECK = b"s" * 16, b"t" * 16, b"c" * 8
_GROUP = GroupSpace(_SPACE, _TENANT, 64)
_FIRST = BlockRecord(SequenceHash(b"a" * 16), None, 0, _TENANT, _CHECK)
_SECOND = BlockRecord(SequenceHash(b"b" * 16), SequenceHash(b"a" * 16), 1, _TENANT, _CHECK)
_HEADER = pack_header(_GROUP, [StoredBlock(_FIRST), StoredBlock(_SECOND)])
_HEADER_BODY_BYTES = 56 + 2 * 80
_FORMAT = RecordFormat(_SPACE)
_RECORD = _FORMAT.pack(3, SlotRecord(_FIRST, 64))
_RECORD_BODY_BYTES = 116
_CRC = struct.Struct("<I")
_KEYS = KeySpace("p", _SPACE, 2)


def _header(raw: bytes) -> object:
    """A header whose CRC is right, whatever else it says: who can write to the store can compute one."""
    body = raw[:_HEADER_BODY_BYTES]
    blocks = unpack_header((body + _CRC.pack(zlib.crc32(body))).ljust(4096, b"\0"), _GROUP, 2)
    unpack_header(raw, _GROUP, 2)
    return Label("none" if blocks is None else f"{len(blocks)} blocks")


def _record(raw: bytes) -> object:
    body = raw[:_RECORD_BODY_BYTES]
    crc = zlib.crc32(body, zlib.crc32((3).to_bytes(8, "little"), zlib.crc32(_SPACE)))
    record = _FORMAT.unpack(3, (body + _CRC.pack(crc)).ljust(128, b"\0"))
    _FORMAT.unpack(3, raw)
    return record


@functools.cache
def _holder() -> str:
    holder = tempfile.mkdtemp(prefix="kelp-fuzz-")
    atexit.register(shutil.rmtree, holder, ignore_errors=True)
    return holder


def _file(*names: str) -> Path:
    path = Path(_holder(), *names)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def _journal(raw: bytes) -> object:
    path = _file("clears")
    path.write_bytes(raw)
    owed = ClearJournal(path).load()
    ClearJournal(path).save(owed)
    if ClearJournal(path).load() != owed and len(set(owed)) == len(owed) and owed == sorted(owed, key=str):
        raise WrongOutcome("a journal that is written again says something else")
    return owed


def _manifest(raw: bytes) -> object:
    """Another process's manifest in the folder that this one wants."""
    root = _file("disk", "any").parent
    path = _file("disk", f"v1-{_SPACE.hex()}", "manifest.json")
    path.write_bytes(raw)
    folder = claim_folder(root, _SPACE)
    try:
        folder.write_manifest(Manifest({"num_layers": 1}, 64, 4096, 1, ""))
        return Label("ours" if folder.path == path.parent else "another")
    finally:
        folder.release()


def _arena(raw: bytes) -> object:
    """A file in the arena folder that a dead process left."""
    path = _file("arena", "arena-0")
    path.write_bytes(raw)
    shape = ArenaShape(_SPACE, 64, 1)
    if raw[:1] == b"k":
        with path.open("r+b") as file:
            file.truncate(shape.file_bytes)
    claimed = claim_arena(path.parent, _SPACE, 64)
    try:
        return Label("adopted" if claimed.shape else "fresh")
    finally:
        claimed.remove()


def _wanted(raw: bytes) -> object:
    path = _file("run", "wanted.json")
    path.write_bytes(raw)
    return read_wanted(path.parent)


def _key(raw: bytes) -> object:
    name = _KEYS.parse(raw.decode(errors="replace"))
    return Label("none" if name is None else str(name.is_usable))


@functools.cache
def _bucket() -> tuple[Bucket, list[AWSResponse]]:
    """A bucket whose store says what it is told to say."""
    bucket = Bucket(StoreAddress("b", "http://127.0.0.1:9", "us-east-1"), 1.0)
    bucket._session.set_credentials("a", "b")
    answers: list[AWSResponse] = []
    bucket._client.meta.events.register("before-send.s3", lambda **_: answers[0])
    return bucket, answers


class _Body:
    """What botocore reads an answer from."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def stream(self, *_: Any, **__: Any) -> Any:
        yield self._raw

    def read(self, *_: Any) -> bytes:
        raw, self._raw = self._raw, b""
        return raw


def _s3(raw: bytes) -> object:
    """What an object store, or whatever answers in its place, says to each call."""
    try:
        status, headers, body = msgspec.msgpack.decode(raw, type=tuple[int, dict[str, str], bytes])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if not 100 <= status < 600:
        return None
    bucket, answers = _bucket()
    said: list[str] = []
    calls = (
        lambda: bucket.size_bytes("k"), lambda: bucket.page("p", ""), lambda: bucket.folders("r"),
        lambda: bucket.delete(["k", "l"]),
    )  # fmt: skip
    for call in calls:
        answers[:] = [AWSResponse("http://127.0.0.1:9/b", status, headers, _Body(body))]
        try:
            said.append(type(call()).__name__)
        except RetryableTransferError as error:
            said.append(type(error).__name__)
    return Label(f"{status} {' '.join(said)}")


_XML = '<?xml version="1.0" encoding="UTF-8"?>'
_LISTING = (
    f"{_XML}<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
    "<Contents><Key>p/k</Key><Size>10</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
    "<CommonPrefixes><Prefix>p/a/</Prefix></CommonPrefixes></ListBucketResult>"
).encode()
_DELETED = f"{_XML}<DeleteResult><Error><Key>k</Key><Code>Denied</Code></Error></DeleteResult>".encode()
_FAILED = f"{_XML}<Error><Code>SlowDown</Code><Message>later</Message></Error>".encode()
_WIRE_BLOCK = WireBlock.of(_SECOND)
STORAGE = Family(
    "storage",
    (
        Parser("object header", _header, (_HEADER[:_HEADER_BODY_BYTES], _HEADER)),
        Parser("slot record", _record, (_RECORD[:_RECORD_BODY_BYTES], _RECORD)),
        Parser("object name", _key, (_KEYS.key(_TENANT, _FIRST.sequence_hash).encode(),)),
        Parser(
            "journal of clears", _journal,
            (f"kelp-kv-clears-1\n{_TENANT.hex()} {Tier.DISK.name.lower()}\n* host disk object\n2\n".encode(),),
            memory_factor=8,
        ),
        Parser(
            "manifest", _manifest,
            (Manifest({"num_layers": 1}, 64, 4096, 1, "").encode().encode(),
             Manifest({"num_layers": 1}, 64, 4096, 1, "", 2).encode().encode()), "json",
        ),
        Parser("arena", _arena, (ArenaShape(_SPACE, 64, 1).header(), ArenaShape(_SPACE, 64, 2).header())),
        Parser(
            "wanted workers", _wanted, (WantedWorkers(num_prefill=1, num_decode=2).model_dump_json().encode(),), "json"
        ),
        Parser(
            "request to the object store's process", decode_request,
            tuple(map(encode, (
                Hello(StoreAddress("b", "e", "r"), ArenaMap("p", 0, 1, 64, 4096), _SPACE, 2, 4, 1.0, b""),
                Put((GroupWrite("k", _TENANT, (0,), (_WIRE_BLOCK,), False),)),
                Get((GroupRead("k", _TENANT, 0, (b"a" * 16,), (0,)),)), Ask(("k",)), List("p"), Spaces("r"),
                Delete(("k",)),
            ))), "msgpack",
        ),
        Parser(
            "its answer", decode_answer,
            tuple(map(encode, (
                Ready(), PutDone(("stored",)), GetDone((GroupContent("read", (_WIRE_BLOCK, None)),)), Asked((True,)),
                SpacesDone(("p",)), ListDone((Listed("k", 1, 1.0),), "t"), DeleteDone(1, "no"),
            ))), "msgpack",
        ),
        Parser(
            "object store", _s3,
            tuple(map(msgspec.msgpack.encode, (
                (200, {"content-length": "10", "content-type": "application/xml"}, _LISTING), (200, {}, _DELETED),
                (503, {}, _FAILED), (404, {}, b""), (200, {}, b""),
            ))), "msgpack", (),
        ),
    ),
)  # fmt: skip
