"""What router, workers and handoff peers say to each other, as strict JSON documents.

Unknown keys are refused and every number is bounded: a peer's message is input like a client's. Nothing
here is ever unpickled.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from kelp.core.errors import ProtocolError
from kelp.core.guide_spec import GuideSpec
from kelp.core.types import FinishReason, Role

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Name = Annotated[str, Field(min_length=1, max_length=256)]
LoraDigest = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]
"""`core.model_identity.adapter_digest`; empty without an adapter."""
_Nanoseconds = Annotated[int, Field(ge=0, lt=2**63)]


class Message(BaseModel):
    """Base of everything that crosses a process boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=True)


class SamplingParams(Message):
    """How to choose tokens; already validated against the client-facing limits by `preprocess`.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `seed` makes token *i* of a sequence a pure
    function of (logits, seed, i), so a request can move between workers and go on with the same tokens.
    """

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 16
    min_tokens: _Count = 0
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: _Count = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    stop_token_ids: tuple[_TokenId, ...] = ()
    bad_words_ids: tuple[tuple[_TokenId, ...], ...] = ()
    ignore_eos: bool = False
    guide: GuideSpec | None = None

    @field_validator("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("must be finite")
        return value


class Rendezvous(Message):
    """Where a decode worker meets the prefill worker of its request.

    Attributes:
        handoff_id: Random name made by the router, known to both workers; also the capability to read.
        endpoint: `host:port` of the prefill worker's handoff service.
        prefill_epoch: Incarnation of the prefill worker the router chose.
    """

    handoff_id: _Name
    endpoint: _Name
    prefill_epoch: _Name


class GenerateCommand(Message):
    """Router to worker: run this request. Prompt tokens travel beside it as a tensor.

    Attributes:
        request_id: New with every command, so that cancelling one attempt spares the next.
        role: `prefill` stops after the first token and keeps the KV under a lease; `decode` fetches the
            prompt's KV through `rendezvous`; `aggregated` does all of it.
        remaining_ms: Time left until the deadline when sent; rebased to the receiver's clock.
        seed_hash_hex: `core.hashing.seed_hash` of the request, hex.
        num_generated: How many of the last prompt tokens are output of an earlier attempt: they count as
            generated for `max_tokens`, penalties and seeds, and are not emitted again.
        lora_name: Adapter to compute with; empty for none.
        lora_digest: Its content when the prompt was hashed; a worker that loaded another refuses.
    """

    op: Literal["generate"] = "generate"
    request_id: _Name
    role: Role
    sampling: SamplingParams
    seed_hash_hex: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    num_generated: _Count = 0
    rendezvous: Rendezvous | None = None
    remaining_ms: Annotated[float, Field(gt=0, lt=1e10)] | None = None
    lora_name: Annotated[str, Field(max_length=256)] = ""
    lora_digest: LoraDigest = ""


class DrainCommand(Message):
    """Stop taking new requests; answered when the running ones have ended."""

    op: Literal["drain"] = "drain"
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = 60.0


class CancelCommand(Message):
    """Router to worker: end this request; its own stream then says how it ended.

    Sent instead of cancelling the gRPC call, which Triton 2.51 does not survive unharmed: a cancellation that meets a
    response on its way keeps a reference to the model for ever, so that it never unloads.

    Attributes:
        request_id: As in `GenerateCommand`; a request that has ended, or never comes, is none of our concern.
    """

    op: Literal["cancel"] = "cancel"
    request_id: _Name


class StatusCommand(Message):
    """Report load and counts; what tests and `kelp doctor` read."""

    op: Literal["status"] = "status"


WorkerCommand = Annotated[GenerateCommand | CancelCommand | DrainCommand | StatusCommand, Field(discriminator="op")]


class RequestTimings(Message):
    """When a worker did what, wall-clock nanoseconds; 0 where it did not happen."""

    arrival_ns: _Nanoseconds = 0
    first_scheduled_ns: _Nanoseconds = 0
    prefill_done_ns: _Nanoseconds = 0
    transfer_start_ns: _Nanoseconds = 0
    transfer_done_ns: _Nanoseconds = 0
    first_token_ns: _Nanoseconds = 0
    last_token_ns: _Nanoseconds = 0


class RequestUsage(Message):
    """What a request cost on one worker; block counts as TensorRT-LLM names them."""

    cached_tokens: _Count = 0
    new_blocks: _Count = 0
    reused_blocks: _Count = 0
    transferred_blocks: _Count = 0


class Finished(Message):
    """Worker to router, on the last response of a request.

    A prefill worker says `finish_reason=None` when decode shall go on. `rendezvous` is the returned ticket.
    """

    kind: Literal["finished"] = "finished"
    finish_reason: FinishReason | None
    usage: RequestUsage = RequestUsage()
    timings: RequestTimings = RequestTimings()
    rendezvous: Rendezvous | None = None


class Progress(Message):
    """Worker to router, with the first token: what is known so far, should the stream end early."""

    kind: Literal["progress"] = "progress"
    usage: RequestUsage = RequestUsage()
    timings: RequestTimings = RequestTimings()


WorkerEvent = Annotated[Progress | Finished, Field(discriminator="kind")]


class WorkerStatus(Message):
    """What a worker holds right now; leak tests compare two of these."""

    worker: str
    epoch: str
    role: Role
    state: str
    num_running: _Count
    num_waiting: _Count
    num_blocks: _Count
    num_free_blocks: _Count
    num_cached_blocks: _Count
    num_leases: _Count
    num_preemptions: _Count = 0


class Announce(Message):
    """Prefill to decode: KV of the first `num_tokens` prompt tokens is readable in these blocks.

    `block_ids` are the blocks added since the previous announcement, in prompt order.
    """

    kind: Literal["announce"] = "announce"
    num_tokens: _Count
    block_ids: tuple[_Count, ...]


class PrefillDone(Message):
    """Prefill to decode: all KV is readable; decoding continues from `first_token`."""

    kind: Literal["done"] = "done"
    first_token: _TokenId
    first_log_prob: float


class LeaseRenewed(Message):
    """Prefill to decode: answer to the heartbeat numbered `heartbeat`."""

    kind: Literal["renewed"] = "renewed"
    heartbeat: _Count
    ttl_s: Annotated[float, Field(gt=0, le=3600)]


class HandoffFailed(Message):
    """Prefill to decode: this handoff will not complete; `message` carries the typed error."""

    kind: Literal["failed"] = "failed"
    message: Annotated[str, Field(max_length=4000)]


HandoffEvent = Annotated[Announce | PrefillDone | LeaseRenewed | HandoffFailed, Field(discriminator="kind")]


class Attach(Message):
    """Decode to prefill, first on the stream: claim a handoff. Counts as heartbeat 0."""

    kind: Literal["attach"] = "attach"
    handoff_id: _Name


class Heartbeat(Message):
    """Decode to prefill: still reading; extend the lease."""

    kind: Literal["heartbeat"] = "heartbeat"
    number: _Count


class Acknowledge(Message):
    """Decode to prefill: every needed block has arrived; the lease may end."""

    kind: Literal["acknowledge"] = "acknowledge"


HandoffCommand = Annotated[Attach | Heartbeat | Acknowledge, Field(discriminator="kind")]


class PeerDescription(Message):
    """Answer to the handshake: everything a reader needs to address a prefill worker's pool.

    Attributes:
        agent_metadata_hex: The transport agent's connection metadata, opaque, hex.
        base_address: Address of the pool in the owner's memory; block *b* is `base + b * block_bytes`.
        device: `cpu` or `cuda:<n>`.
        layout: Fields of `core.types.KVLayout`; the reader refuses any that is not compatible.
    """

    worker: _Name
    epoch: _Name
    agent_name: _Name
    agent_metadata_hex: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=1_000_000)]
    base_address: Annotated[int, Field(ge=0, lt=2**64)]
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d{1,3})$")]
    num_blocks: Annotated[int, Field(ge=1, lt=2**31)]
    num_layers: Annotated[int, Field(ge=1, lt=2**16)]
    num_kv_heads: Annotated[int, Field(ge=1, lt=2**16)]
    block_size: Annotated[int, Field(ge=1, lt=2**16)]
    head_dim: Annotated[int, Field(ge=1, lt=2**16)]
    dtype: _Name
    model_id: _Name


ModelT = TypeVar("ModelT")


def decode_message(adapter: TypeAdapter[ModelT], raw: bytes, what: str) -> ModelT:
    """Parse one wire message.

    Raises:
        ProtocolError: `raw` is too large, not JSON, or not what `adapter` allows; names the field.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{what}: {len(raw)} bytes exceed the limit of {MAX_MESSAGE_BYTES}")
    try:
        return adapter.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise ProtocolError(f"{what}: {field}: {first['msg']}") from None


def encode_message(message: BaseModel) -> bytes:
    """One wire message as JSON bytes."""
    return message.model_dump_json(exclude_defaults=False).encode()


WORKER_COMMAND: TypeAdapter[WorkerCommand] = TypeAdapter(WorkerCommand)
WORKER_EVENT: TypeAdapter[WorkerEvent] = TypeAdapter(WorkerEvent)
WORKER_STATUS: TypeAdapter[WorkerStatus] = TypeAdapter(WorkerStatus)
HANDOFF_EVENT: TypeAdapter[HandoffEvent] = TypeAdapter(HandoffEvent)
HANDOFF_COMMAND: TypeAdapter[HandoffCommand] = TypeAdapter(HandoffCommand)
PEER_DESCRIPTION: TypeAdapter[PeerDescription] = TypeAdapter(PeerDescription)
