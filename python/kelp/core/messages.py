"""What router and workers say to each other."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, field_validator

from kelp.core.guide_spec import GuideSpec
from kelp.core.types import FinishReason, Role, Tier
from kelp.core.wire import Count, LoraDigest, Message, Name, Nanoseconds, TokenId

MAX_WORDS = 65536
"""Stop tokens, bad words, and tokens of one bad word; clients may name far fewer (`router.max_stop_words`)."""


class SamplingParams(Message):
    """How to choose tokens; already validated against the client-facing limits by `preprocess`.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `seed` makes token *i* of a sequence a pure
    function of (logits, seed, i), so a request can move between workers and go on with the same tokens.
    """

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 16
    min_tokens: Count = 0
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_WORDS)] = ()
    bad_words_ids: Annotated[
        tuple[Annotated[tuple[TokenId, ...], Field(max_length=MAX_WORDS)], ...], Field(max_length=MAX_WORDS)
    ] = ()
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

    handoff_id: Name
    endpoint: Name
    prefill_epoch: Name


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
        tenant_hex: `core.hashing.tenant_digest` of the cache salt, hex; empty: of the empty salt.
        lower_tier_blocks: How many leading full prompt blocks are known to lie in the worker's own cache and its block
            manager's tiers together: a worker that has as many need not ask its manager. None: it had better ask.
        wants_receipt: The worker says something before it begins: should it die then, it may have died of this.
    """

    op: Literal["generate"] = "generate"
    request_id: Name
    role: Role
    sampling: SamplingParams
    seed_hash_hex: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    num_generated: Count = 0
    rendezvous: Rendezvous | None = None
    remaining_ms: Annotated[float, Field(gt=0, lt=1e10)] | None = None
    lora_name: Annotated[str, Field(max_length=256)] = ""
    lora_digest: LoraDigest = ""
    tenant_hex: Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")] = ""
    lower_tier_blocks: Count | None = None
    wants_receipt: bool = False


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
    request_id: Name


class StatusCommand(Message):
    """Report load and counts; what tests and `kelp doctor` read."""

    op: Literal["status"] = "status"


WorkerCommand = Annotated[GenerateCommand | CancelCommand | DrainCommand | StatusCommand, Field(discriminator="op")]


class RequestTimings(Message):
    """When a worker did what, wall-clock nanoseconds; 0 where it did not happen."""

    arrival_ns: Nanoseconds = 0
    first_scheduled_ns: Nanoseconds = 0
    prefill_done_ns: Nanoseconds = 0
    transfer_start_ns: Nanoseconds = 0
    transfer_done_ns: Nanoseconds = 0
    onboard_start_ns: Nanoseconds = 0
    onboard_done_ns: Nanoseconds = 0
    first_token_ns: Nanoseconds = 0
    last_token_ns: Nanoseconds = 0


class RequestUsage(Message):
    """What a request cost on one worker; block counts as TensorRT-LLM names them.

    Attributes:
        cached_tokens: Prompt tokens that were not computed, onboarded ones included.
        onboarded_blocks: Blocks that came from lower tiers.
        onboarded_tiers: The same by `Tier` where they were found; empty if nobody said so.
    """

    cached_tokens: Count = 0
    new_blocks: Count = 0
    reused_blocks: Count = 0
    transferred_blocks: Count = 0
    onboarded_blocks: Count = 0
    onboarded_tiers: Annotated[tuple[Count, ...], Field(max_length=len(Tier))] = ()


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
    num_running: Count
    num_waiting: Count
    num_blocks: Count
    num_free_blocks: Count
    num_cached_blocks: Count
    num_leases: Count
    num_preemptions: Count = 0


WORKER_COMMAND: TypeAdapter[WorkerCommand] = TypeAdapter(WorkerCommand)
WORKER_EVENT: TypeAdapter[WorkerEvent] = TypeAdapter(WorkerEvent)
WORKER_STATUS: TypeAdapter[WorkerStatus] = TypeAdapter(WorkerStatus)
