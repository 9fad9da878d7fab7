"""What clients of the standalone router say, and what they hear; the same documents over HTTP and gRPC."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kelp.core.types import Role, Tier, WorkerState
from kelp.core.wire import Count, Message, Name, TokenId
from kelp.registry.base import KvManagerRecord, WorkerRecord

_HashHex = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
# Control characters mark the names that routers make themselves.
_RequestId = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Text = Annotated[str, Field(max_length=256)]
_Tags = Annotated[dict[Name, Name], Field(max_length=16)]
_Seconds = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]


class SelectRequest(Message):
    """Where should this go?

    Attributes:
        request_id: The caller's name for it, unique among its live requests.
        token_ids: The prompt; or else `block_hashes` and `num_prompt_tokens`.
        block_hashes: kelp's sequence hashes of the prompt's full blocks, hex, in order.
        model_id: Part of block identity; empty takes the workers' own, if they agree.
        lora_id: Adapter's identity; part of block identity, like `cache_salt`.
        deadline_ms: From now.
        pinned_worker: Worker id or model name that must serve it.
        avoid: Worker ids that have just failed this request; taken only if nothing else is left.
        allow_prefill: Whether a separate prefill worker may be chosen.
        reserve: Count the request as active there at once, which spares a call and keeps simultaneous requests apart.
    """

    request_id: _RequestId
    token_ids: tuple[TokenId, ...] = ()
    block_hashes: tuple[_HashHex, ...] = ()
    num_prompt_tokens: Count = 0
    model_id: _Text = ""
    lora_id: _Text = ""
    cache_salt: _Text = ""
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 16
    session_id: _Text = ""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    deadline_ms: Annotated[float, Field(gt=0, lt=1e10)] | None = None
    pinned_worker: _Text = ""
    required_tags: _Tags = {}
    preferred_tags: _Tags = {}
    avoid: Annotated[tuple[Name, ...], Field(max_length=1024)] = ()
    allow_prefill: bool = True
    reserve: bool = False

    @model_validator(mode="after")
    def _has_a_prompt(self) -> SelectRequest:
        if bool(self.token_ids) == bool(self.num_prompt_tokens):
            raise ValueError("give either token_ids, or num_prompt_tokens with block_hashes")
        if self.token_ids and self.block_hashes:
            raise ValueError("block_hashes: not beside token_ids, which they are computed from")
        return self


class RequestName(Message):
    """Names a request of an earlier `select`."""

    request_id: _RequestId


class FirstTokenRequest(RequestName):
    """The prompt has been computed; times as the workers measured them.

    Attributes:
        onboarded_blocks: By tier, device first, prompt blocks that were brought up from there, in `onboard_s` seconds.
    """

    num_cached_tokens: Count = 0
    queue_s: _Seconds = 0.0
    prefill_s: _Seconds = 0.0
    transfer_s: _Seconds = 0.0
    onboarded_blocks: Annotated[tuple[Count, ...], Field(max_length=len(Tier))] = ()
    onboard_s: _Seconds = 0.0


class ProgressRequest(RequestName):
    """That many more tokens came; renews the request's lease."""

    num_tokens: Count = 1


class FreeRequest(RequestName):
    """The request has ended, well or not."""

    is_completed: bool = True
    num_output_tokens: Count = 0
    decode_s: _Seconds = 0.0


class RegisterRequest(Message):
    """A worker says that it lives; to be repeated within the registry's expiry."""

    worker: WorkerRecord


class WithdrawRequest(Message):
    """A worker leaves."""

    worker_id: Name
    epoch: Name


class RegisterManagerRequest(Message):
    """A KV block manager says that it lives; to be repeated within the registry's expiry."""

    manager: KvManagerRecord


class WithdrawManagerRequest(Message):
    """A KV block manager leaves."""

    manager_id: Name
    epoch: Name


class Nothing(Message):
    """A request without fields."""


class ChosenWorker(Message):
    """One worker of a selection, with what is needed to reach it."""

    worker_id: str
    epoch: str
    model_name: str
    role: Role
    endpoint: str
    handoff_endpoint: str


class Selection(Message):
    """The answer to `select`; without `prefill` the decode worker computes the prompt.

    Attributes:
        known_blocks: Leading prompt blocks that the worker which computes the prompt has in any tier: of more it need
            not ask its KV block manager. None where it had better ask.
    """

    request_id: str
    decode: ChosenWorker
    prefill: ChosenWorker | None
    is_reserved: bool
    known_blocks: int | None = None


class Done(Message):
    """The answer to calls that have nothing to tell; `is_known` is false for a request that has lapsed or ended."""

    is_known: bool = True


class WorkerView(Message):
    """One worker as the router sees it; `kv_manager_id` names who keeps its lower tiers."""

    worker_id: str
    epoch: str
    role: Role
    state: WorkerState
    slot: int
    publishes_events: bool
    num_requests: int
    kv_manager_id: str = ""


class ManagerView(Message):
    """One KV block manager as the router sees it; `events` says how far its blocks are known."""

    manager_id: str
    epoch: str
    host: str
    endpoint: str
    events: str


class Workers(Message):
    """All workers and KV block managers that the router knows."""

    workers: tuple[WorkerView, ...]
    managers: tuple[ManagerView, ...] = ()


class DumpRequest(Message):
    """What does the router know?

    Attributes:
        worker_id: Name this worker's (or KV block manager's) blocks too; empty for the counts alone.
        offset: Skip so many of them, for the next page.
    """

    worker_id: _Text = ""
    offset: Count = 0


class Dump(Message):
    """What the router knows: live requests, and what its index holds of each worker.

    Attributes:
        requests: Ids of the requests that count as active.
        index: Counts of the index by name.
        num_blocks: By id of worker or KV block manager, how many blocks it is known to hold in each tier, fastest
            first; a manager's are not counted again for its workers.
        hashes: Names of the asked worker's blocks, hex, a page of each tier.
    """

    requests: tuple[str, ...]
    index: dict[str, int]
    num_blocks: dict[str, tuple[int, ...]]
    hashes: tuple[tuple[str, ...], ...] = ()
