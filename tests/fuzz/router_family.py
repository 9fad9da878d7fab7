"""What clients of the standalone router say over HTTP and gRPC."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from fuzz.parsers import Family, Label, Parser, check_text
from kelp.core.errors import KelpError, Unauthenticated
from kelp.core.types import Role
from kelp.router.api.auth import Authenticator
from kelp.router.api.rpc import document_of
from unit.router_api.api_rig import ApiRig, api_rig, worker

_NOT_READ = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def _rig() -> ApiRig:
    rig = api_rig()
    rig.register(worker("a", tags={"zone": "a"}), worker("b", role=Role.PREFILL, tags={"zone": "a"}))
    return rig


def _calls(raw: bytes) -> object:
    """Several calls in a row, as one client or many make them over HTTP."""
    try:
        calls = msgspec.msgpack.decode(raw, type=list[tuple[str, bytes]])
    except _NOT_READ:
        return None
    rig = _rig()
    said: list[str] = []
    for name, document in calls[:8]:
        try:
            json_format.Parse(rig.operations.call(name, document), Struct())
            said.append(name)
        except KelpError as error:
            check_text(str(error))
            said.append(type(error).__name__)
    return Label(" ".join(said))


def _rpc(raw: bytes) -> object:
    """One call over gRPC, whose messages are Structs."""
    try:
        message = Struct.FromString(raw)
    except DecodeError:
        return None
    return type(_rig().operations.call("select", document_of(message))).__name__


def _struct_call(raw: bytes) -> object:
    """The same, of a document that any client library would take."""
    message = Struct()
    try:
        message.update(json.loads(raw))
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return _rpc(message.SerializeToString())


def _call(name: str, **document: Any) -> tuple[str, bytes]:
    return name, json.dumps(document).encode()


def _struct(**document: Any) -> bytes:
    message = Struct()
    message.update(document)
    return message.SerializeToString()


_SELECT = {"request_id": "q", "token_ids": [1, 2, 3, 4, 5], "reserve": True}
_HASHED = {
    "request_id": "q2",
    "block_hashes": ["0" * 32],
    "num_prompt_tokens": 7,
    "required_tags": {"zone": "a"},
    "preferred_tags": {"zone": "b"},
    "avoid": ["host:1/a"],
    "session_id": "s",
    "priority": 1,
    "deadline_ms": 5.0,
}
_RECORD = worker("c", events_endpoint="h:1").model_dump(mode="json")
ROUTER_API = Family(
    "router_api",
    (
        Parser(
            "calls", _calls,
            tuple(map(msgspec.msgpack.encode, (
                [_call("select", **_SELECT), _call("commit", request_id="q"),
                 _call("first_token", request_id="q", num_cached_tokens=1, prefill_s=0.1, onboarded_blocks=[0, 1]),
                 _call("progress", request_id="q"), _call("explain", request_id="q"),
                 _call("free", request_id="q", num_output_tokens=3, decode_s=0.5)],
                [_call("select", **_HASHED), _call("reserve", request_id="q2"), _call("workers"), _call("dump"),
                 _call("explain", request_id="q2")],
                [_call("register", worker=_RECORD), _call("select", **{**_SELECT, "pinned_worker": "c"}),
                 _call("withdraw", worker_id="host:1/c", epoch="epoch of c")],
                [_call("register_manager", manager={"manager_id": "m", "epoch": "e", "host": "h", "endpoint": "h:1",
                                                    "model_name": "k"}),
                 _call("withdraw_manager", manager_id="m", epoch="e")],
            ))), "msgpack", (),
        ),
        Parser("a call over gRPC", _rpc, (_struct(**_SELECT), _struct(**_HASHED)), "bytes", (KelpError,)),
        Parser("a Struct over gRPC", _struct_call, (json.dumps(_SELECT).encode(), json.dumps(_HASHED).encode()), "json",
               (KelpError,)),
        Parser(
            "authorization", lambda raw: Authenticator("secret").check(raw.decode("utf-8", "surrogateescape")),
            (b"Bearer secret", b"Bearer other", b"Basic x"), "bytes", (Unauthenticated,),
        ),
    ),
)  # fmt: skip
