"""What router and worker say on a direct channel: MessagePack arrays in frames, typed and bounded.

Commands and events stay the JSON of `core.messages`, as bytes: writing and reading it costs less than 5 us, and both
transports check the same documents. What every step costs, tokens with their log-probs, is MessagePack.

Where there is a token, the two first show that they know it (`core.peer_handshake`, a message a frame). Then the router
speaks: `Hello`, answered by `Welcome` or `Refusal`; then `Start`, `Cancel` and `Control`, answered by `Outputs`. A
number names a request on its connection; numbers only grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, TypeVar

import msgspec

from kelp.client.direct.frames import LENGTH
from kelp.core.errors import ProtocolError
from kelp.core.wire import MAX_MESSAGE_BYTES

PROTOCOL_VERSION = 1
MAX_HELLO_BYTES = 4096
"""Of a router's frame before the two have agreed that they mean each other."""
MAX_WELCOME_BYTES = 16 * 1024
"""Of a worker's until then; a refusal has room for its text."""
MAX_ROUTER_FRAME_BYTES = 64 * 1024 * 1024
MAX_WORKER_FRAME_BYTES = 16 * 1024 * 1024
MAX_OUTPUTS = 1024
"""In one frame."""
MAX_OUTPUT_TOKENS = 65536
"""In one output."""

_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
_Version = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Document = Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]
_Tokens = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**31)], ...], msgspec.Meta(max_length=MAX_OUTPUT_TOKENS)
]
_LogProbs = Annotated[tuple[float, ...], msgspec.Meta(max_length=MAX_OUTPUT_TOKENS)]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all that is sent."""


class Hello(_Frame, frozen=True, tag=0):
    """Router: whom it means. A worker that is another one, or another incarnation, refuses."""

    version: _Version
    worker_id: _Name
    epoch: _Name


class Start(_Frame, frozen=True, tag=1):
    """Router: run this; `command` is a GenerateCommand, `prompt` `[num_tokens] int32` little-endian."""

    number: _Number
    command: _Document
    prompt: bytes


class Cancel(_Frame, frozen=True, tag=2):
    """Router: end that request; it still says how it ended. One that has ended is none of our concern."""

    number: _Number


class Control(_Frame, frozen=True, tag=3):
    """Router: a DrainCommand or StatusCommand; answered by one output whose event is a WorkerStatus."""

    number: _Number
    command: _Document


class Welcome(_Frame, frozen=True, tag=0):
    """Worker: it is the one."""

    version: _Version


class Refusal(_Frame, frozen=True, tag=1):
    """Worker: a typed error (`core.errors.from_message`); it closes the connection."""

    error: _Text


class Output(_Frame, frozen=True):
    """What one request has to say.

    Attributes:
        event: A WorkerEvent, or the WorkerStatus that was asked for; empty for none.
        error: A typed error, which is the last thing of its request; empty for none.
        is_last: Nothing more comes of this request.
    """

    number: _Number
    token_ids: _Tokens
    log_probs: _LogProbs
    event: _Document = b""
    error: _Text = ""
    is_last: bool = False


class Outputs(_Frame, frozen=True, tag=2):
    """Worker: all that its requests on this connection had to say when its loop woke up."""

    items: Annotated[tuple[Output, ...], msgspec.Meta(max_length=MAX_OUTPUTS)]


def handshake_names(worker_id: str, epoch: str, endpoint: str) -> tuple[str, ...]:
    """What the proofs of a direct channel name: nobody can pass them on to another worker, or from another address."""
    return "direct", worker_id, epoch, endpoint


RouterFrame = Hello | Start | Cancel | Control
WorkerFrame = Welcome | Refusal | Outputs

_encoder = msgspec.msgpack.Encoder()
_router_decoder: msgspec.msgpack.Decoder[RouterFrame] = msgspec.msgpack.Decoder(RouterFrame)
_worker_decoder: msgspec.msgpack.Decoder[WorkerFrame] = msgspec.msgpack.Decoder(WorkerFrame)
_FrameT = TypeVar("_FrameT")


def encode_frame(frame: RouterFrame | WorkerFrame) -> bytearray:
    """With its length in front."""
    buffer = bytearray(LENGTH.size)
    _encoder.encode_into(frame, buffer, LENGTH.size)
    LENGTH.pack_into(buffer, 0, len(buffer) - LENGTH.size)
    return buffer


def decode_router_frame(raw: bytes, what: str) -> RouterFrame:
    """What a router sent.

    Raises:
        ProtocolError: It is nothing that a router may send; names the place.
    """
    return _decode(_router_decoder, raw, what)


def decode_worker_frame(raw: bytes, what: str) -> WorkerFrame:
    """What a worker sent.

    Raises:
        ProtocolError: It is nothing that a worker may send; names the place.
    """
    return _decode(_worker_decoder, raw, what)


def _decode(decoder: msgspec.msgpack.Decoder[_FrameT], raw: bytes, what: str) -> _FrameT:
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{what}: frame of {len(raw)} bytes: {error}") from None


def encode_outputs(outputs: Iterable[Output]) -> Iterator[bytearray]:
    """As few frames as the limits allow."""
    batch: list[Output] = []
    num_tokens = 0
    for output in _bounded(outputs):
        if batch and (len(batch) == MAX_OUTPUTS or num_tokens + len(output.token_ids) > MAX_OUTPUT_TOKENS):
            yield encode_frame(Outputs(tuple(batch)))
            batch, num_tokens = [], 0
        batch.append(output)
        num_tokens += len(output.token_ids)
    if batch:
        yield encode_frame(Outputs(tuple(batch)))


def _bounded(outputs: Iterable[Output]) -> Iterator[Output]:
    for output in outputs:
        ids, log_probs = output.token_ids, output.log_probs
        while len(ids) > MAX_OUTPUT_TOKENS:
            yield Output(output.number, ids[:MAX_OUTPUT_TOKENS], log_probs[:MAX_OUTPUT_TOKENS])
            ids, log_probs = ids[MAX_OUTPUT_TOKENS:], log_probs[MAX_OUTPUT_TOKENS:]
        if ids is not output.token_ids:
            output = Output(output.number, ids, log_probs, output.event, output.error, output.is_last)
        yield output
