"""Names, limits and error mapping of the handoff service: gRPC with JSON documents of `core.messages`.

Generic handlers, so no generated code. Messages larger than the limits are refused by gRPC before they are
held in memory. Where there is a token, the question for the description, the description and the message that claims a
handoff are sealed with it (`core.peer_auth`). A handoff's name is random and claimed once: nobody can claim it again.
"""

from __future__ import annotations

import grpc

from kelp.core.errors import CapacityError, DeadlineExceeded, KelpError, PeerRefused, ProtocolError, WorkerLost
from kelp.core.wire import MAX_MESSAGE_BYTES

SERVICE = "kelp.Handoff"
DESCRIBE = "Describe"
ATTACH = "Attach"

DESCRIBE_PROOF, DESCRIPTION_PROOF, ATTACH_PROOF = "describe", "description", "attach"
NONCE_BYTES = 32
_MAX_COMMAND_BYTES = 16 * 1024

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_COMMAND_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_COMMAND_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


def rpc_path(method: str) -> str:
    """Full name of a method, as gRPC puts it on the wire."""
    return f"/{SERVICE}/{method}"


def proof_scope(endpoint: str, epoch: str) -> tuple[str, ...]:
    """What proofs name: a prefill worker's incarnation, at its address."""
    return "handoff", endpoint, epoch


def from_rpc_error(error: grpc.RpcError, endpoint: str) -> KelpError:
    """What a failed call to `endpoint` means for a request."""
    code = error.code()
    text = f"handoff service {endpoint}: {code.name}: {error.details()}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return CapacityError(text)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(text)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return PeerRefused(text)
    if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT):
        return ProtocolError(text)
    return WorkerLost(text)
