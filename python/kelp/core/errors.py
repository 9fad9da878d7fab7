"""Every error kelp raises on purpose, and how each reaches a client.

    KelpError
    ├── InvalidRequest
    │   ├── PromptTooLong
    │   └── NotSupported
    ├── Unauthenticated
    ├── NotFound
    ├── ConfigError
    ├── CapacityError
    │   └── NoWorker
    ├── TransferError
    │   ├── RetryableTransferError
    │   └── FatalTransferError
    ├── WorkerLost
    │   ├── PeerRefused
    │   ├── WorkerDied
    │   ├── WorkerDraining
    │   └── WorkerStuck
    ├── EngineFailed
    ├── MigrationsExceeded
    ├── PoisonRequest
    ├── RequestCancelled
    ├── DeadlineExceeded
    ├── ProtocolError
    └── InternalError

Triton prepends text to some messages and turns every error of a Python model into HTTP 400
(docs/architecture.md, "Errors"), so the stable name of an error is the one `[KELP_<CODE>]` token in its
text. `from_message` finds it again on the other side of a wire.
"""

from __future__ import annotations

import re
from typing import ClassVar

_TOKEN = re.compile(r"\[KELP_([A-Z_]+)\]\s*")
_MAX_MESSAGE_CHARS = 2000


class KelpError(Exception):
    """Base of all typed errors.

    Attributes:
        code: Stable name, shown as `[KELP_<code>]`.
        http_status: What an HTTP frontend of ours answers.
        grpc_status: Name of the gRPC status code.
        triton_code: Name of the `TritonError` code.
        is_retryable: Whether another attempt, on other workers or later, may succeed.
    """

    code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    triton_code: ClassVar[str] = "INTERNAL"
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        self.text = _TOKEN.sub("", message)[:_MAX_MESSAGE_CHARS]
        super().__init__(f"[KELP_{self.code}] {self.text}")


class InvalidRequest(KelpError):
    """A field of the request is missing, malformed or out of range."""

    code = "INVALID_ARGUMENT"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    triton_code = "INVALID_ARG"


class PromptTooLong(InvalidRequest):
    """The prompt, or prompt plus `max_tokens`, exceeds what the model or the KV pool can hold."""

    code = "PROMPT_TOO_LONG"
    http_status = 413


class NotSupported(InvalidRequest):
    """A known field asks for something that this deployment does not do."""

    code = "NOT_SUPPORTED"
    grpc_status = "UNIMPLEMENTED"
    triton_code = "UNSUPPORTED"


class Unauthenticated(KelpError):
    """The caller has not shown the token that is asked for."""

    code = "UNAUTHENTICATED"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    triton_code = "INVALID_ARG"


class NotFound(KelpError):
    """A named model, worker or handoff does not exist."""

    code = "NOT_FOUND"
    is_retryable = True
    http_status = 404
    grpc_status = "NOT_FOUND"
    triton_code = "NOT_FOUND"


class ConfigError(KelpError):
    """The configuration or the machine cannot serve; raised at load, never per request."""

    code = "CONFIG"
    grpc_status = "FAILED_PRECONDITION"
    triton_code = "INVALID_ARG"


class CapacityError(KelpError):
    """No room now: queue, blocks or workers are exhausted."""

    code = "OVERLOADED"
    http_status = 503
    grpc_status = "RESOURCE_EXHAUSTED"
    triton_code = "UNAVAILABLE"
    is_retryable = True


class NoWorker(CapacityError):
    """Nobody is there to do the work: workers have gone, or none has what is demanded; nothing is too busy."""

    code = "NO_WORKER"
    grpc_status = "UNAVAILABLE"


class TransferError(KelpError):
    """Moving KV blocks between workers or tiers failed."""

    code = "TRANSFER"
    grpc_status = "UNAVAILABLE"
    triton_code = "UNAVAILABLE"
    http_status = 503
    is_retryable = True


class RetryableTransferError(TransferError):
    """The same transfer may succeed against the same peer."""

    code = "TRANSFER_RETRYABLE"


class FatalTransferError(TransferError):
    """The peer or its memory is gone; only another source or recomputation helps."""

    code = "TRANSFER_FATAL"


class WorkerLost(KelpError):
    """A worker died or stopped answering."""

    code = "WORKER_LOST"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    triton_code = "UNAVAILABLE"
    is_retryable = True


class WorkerDied(WorkerLost):
    """A worker's process has ended; to clients it is a lost worker like any other."""


class WorkerDraining(WorkerLost):
    """A worker leaves on purpose: it takes no new requests, and gives up those that still run."""

    code = "WORKER_DRAINING"


class WorkerStuck(WorkerLost):
    """A worker lives, but its engine or one of its requests does not get on."""

    code = "WORKER_STUCK"


class EngineFailed(KelpError):
    """A step of a worker's engine failed, and with it all requests that the engine had; the worker serves on."""

    code = "ENGINE_FAILED"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    triton_code = "UNAVAILABLE"
    is_retryable = True


class MigrationsExceeded(KelpError):
    """The request failed on one worker after the other, `router.max_migrations` times and once more."""

    code = "MIGRATIONS_EXCEEDED"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    triton_code = "UNAVAILABLE"
    is_retryable = True


class PeerRefused(WorkerLost):
    """The other process does not know this deployment's token, or another incarnation was meant."""

    code = "PEER_REFUSED"


class PoisonRequest(KelpError):
    """The processes of several workers ended because of this request, it seems, so no other one gets it.

    Refused like a bad request, because clients repeat by themselves what looks like a failure of the server.
    """

    code = "POISON_REQUEST"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    triton_code = "INVALID_ARG"


class RequestCancelled(KelpError):
    """The client cancelled or went away."""

    code = "CANCELLED"
    http_status = 499
    grpc_status = "CANCELLED"
    triton_code = "CANCELLED"


class DeadlineExceeded(KelpError):
    """`deadline_ms`, or a limit derived from it, passed."""

    code = "DEADLINE_EXCEEDED"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"
    triton_code = "UNAVAILABLE"


class ProtocolError(KelpError):
    """A peer sent something that its protocol does not allow."""

    code = "PROTOCOL"
    is_retryable = True


class InternalError(KelpError):
    """A bug of ours, caught at the outermost guard."""

    code = "INTERNAL"


def _subclasses(cls: type[KelpError]) -> list[type[KelpError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _subclasses(sub))]


def error_types() -> dict[str, type[KelpError]]:
    """All error types by their code; of several with one code, the one that names it."""
    return {error_type.code: error_type for error_type in _subclasses(KelpError) if "code" in vars(error_type)}


def from_message(message: str) -> KelpError:
    """Rebuild the typed error from text that crossed a wire.

    Text without a known token came from Triton or gRPC, not from us: the server, not the request, is at
    fault, so it reads as a lost worker.
    """
    found = _TOKEN.search(message)
    error_type = error_types().get(found.group(1)) if found else None
    if found is None or error_type is None:
        return WorkerLost(message)
    return error_type(message[found.end() :])
