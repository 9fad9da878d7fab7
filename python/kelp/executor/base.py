"""What a worker needs of an engine.

An executor owns a thread (or a foreign engine's processes), a KV pool and a queue. The worker submits requests
from its event loop and receives events through each request's `sink`, which the executor calls from its own
thread: a sink only hands the event over and never blocks.

Who calls what, per request:

    aggregated  submit -> Tokens* -> Completed | Failed
    prefill     submit -> Prefilled* -> Tokens(first) -> Completed; then `release_export` exactly once, because
                the blocks stay pinned (leased) until then
    decode      submit(role=Role.DECODE) -> Reserved -> [worker moves KV into the reserved blocks]
                -> `complete_import` -> Tokens* -> Completed | Failed
                or `fail_import`: the executor computes the prompt itself (local prefill)

A prompt whose leading blocks lie in a lower tier, `onboard_blocks` of them, goes like this in roles aggregated and
prefill:

    submit -> Admitted, Reserved -> [worker brings KV into the reserved blocks] -> `complete_onboard` -> as above

without `Reserved` if the prefix cache has them all by then. Blocks go down by `watch_seals`: the executor tells which
blocks are final, and those that the watcher keeps stay as they are until `release_kept`.

`abort` is allowed at any moment and idempotent; the last event is then `Completed(CANCELLED)`. An executor never
writes into reserved blocks before `complete_import`, and after an abort it keeps them out of use until
`end_import`, because a transfer may still be writing there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kelp.core.errors import KelpError
from kelp.core.kv_events import KVEventSink
from kelp.core.messages import RequestTimings, RequestUsage, SamplingParams
from kelp.core.types import BlockId, FinishReason, HandoffShape, KVLayout, Role, SequenceHash


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """What one request may ask of this executor.

    Attributes:
        max_model_tokens: Prompt plus generated tokens of one sequence.
        vocab_size: Token ids are below this.
        eos_token_ids: Ids that end a sequence unless `ignore_eos`.
        adapters: Content (`core.model_identity.adapter_digest`) of each LoRA adapter by its name.
    """

    max_model_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    adapters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExecutorLoad:
    """A snapshot, cheap enough to take at every heartbeat.

    Attributes:
        num_preemptions: Since the start, like the next two.
        num_draft_tokens: Guesses at what sequences say next that were verified.
        num_accepted_tokens: Those of them that made a step yield a token more.
        step_s: How long the step that is under way has taken so far; 0 between steps, infinite once the engine's thread
            has died.
        num_failed_steps: Steps that failed with all their requests, one after the other, up to the latest one.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    num_preemptions: int
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    step_s: float = 0.0
    num_failed_steps: int = 0


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """Where the KV pool lives, for registration with a transport.

    `owner` keeps the memory alive: a torch tensor or a numpy array.
    """

    base_address: int
    num_bytes: int
    device: str
    owner: object


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request left the queue; emitted once, before anything else. `usage` counts the prompt alone."""

    usage: RequestUsage
    first_scheduled_ns: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one sequence, in order; `log_probs` are of the sampled ids under the raw logits."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """KV of the first `num_tokens` prompt tokens is final; `block_ids` are those not yet reported.

    Cached prompt blocks are reported like computed ones. A partial last block is reported with the chunk that
    finishes the prompt.
    """

    num_tokens: int
    block_ids: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    """All blocks of an imported prompt, in order; the first `num_cached_blocks` already hold their KV.

    Of an onboarding, its `onboard_blocks` leading blocks.
    """

    block_ids: tuple[BlockId, ...]
    num_cached_blocks: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The sequence ended. `finish_reason` None: a prefill that a decode worker shall continue."""

    finish_reason: FinishReason | None
    usage: RequestUsage
    timings: RequestTimings


@dataclass(frozen=True, slots=True)
class Failed:
    """The executor gave the request up.

    Nothing of it is held any more but announced blocks until `release_export`, and reserved ones until `end_import`.
    """

    error: KelpError


ExecutorEvent = Admitted | Tokens | Prefilled | Reserved | Completed | Failed
Sink = Callable[[ExecutorEvent], None]


@dataclass(frozen=True, slots=True)
class ExecutorRequest:
    """One sequence to run.

    Attributes:
        prompt: `[num_tokens] int32`, not modified by anybody after submission.
        role: See the module docstring.
        num_generated: How many of the last prompt tokens are earlier output of the same sequence (a resumed
            request): they count towards `max_tokens`, `min_tokens`, output penalties and the seed's index.
        lora_name: Adapter to compute with; empty for none. `seed_hash` already tells its KV apart.
        lora_digest: Content of the adapter that `seed_hash` stands for, as in `ExecutorLimits.adapters`.
        deadline_s: `time.monotonic()` value after which the executor fails the request with DeadlineExceeded.
        tenant: `core.hashing.tenant_digest` of the cache salt; empty: of the empty salt.
        onboard_blocks: Leading full prompt blocks that the worker can bring from lower tiers; fewer than the prompt
            has tokens for, so that at least one token is computed.
    """

    request_id: str
    prompt: npt.NDArray[np.int32]
    role: Role
    sampling: SamplingParams
    seed_hash: SequenceHash
    sink: Sink = field(repr=False)
    num_generated: int = 0
    deadline_s: float | None = None
    lora_name: str = ""
    lora_digest: str = ""
    tenant: bytes = b""
    onboard_blocks: int = 0

    @property
    def num_original_tokens(self) -> int:
        """Length of the client's own prompt: where the output starts."""
        return len(self.prompt) - self.num_generated

    @property
    def num_tokens_to_come(self) -> int:
        """Most tokens that this request may still generate."""
        return self.sampling.max_tokens - self.num_generated


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A full block whose KV is final.

    Attributes:
        parent: The block before it; None for the first of its sequence.
        position: Its index in the sequence.
        tenant: See `ExecutorRequest`.
    """

    block_id: BlockId
    sequence_hash: SequenceHash
    parent: SequenceHash | None
    position: int
    tenant: bytes


SealWatch = Callable[[Sequence[SealedBlock]], int]
"""Takes sealed blocks of one tenant and says how many of them, from the first on, it keeps."""

EvictionWatch = Callable[[Sequence[SequenceHash]], None]
"""Told of blocks that have just left the prefix cache, before anything is written over them."""


class Executor(Protocol):
    """One running engine. All methods are thread-safe and return at once unless they say otherwise."""

    @property
    def layout(self) -> KVLayout:
        """Shape of the KV pool."""

    @property
    def limits(self) -> ExecutorLimits:
        """Per-request limits."""

    @property
    def handoff_shape(self) -> HandoffShape:
        """Which handoff this engine speaks."""

    @property
    def pool_memory(self) -> PoolMemory:
        """The KV pool's memory; valid until `close`."""

    def watch_kv(self, sink: KVEventSink) -> None:
        """Report every block that enters or leaves the prefix cache, in order, from the executor's thread.

        To be called once, before the first `submit`. The sink only hands the event over and never blocks.
        """

    def submit(self, request: ExecutorRequest) -> None:
        """Queue a request; returns at once, except that a request's first guide may take up to a second to compile.

        Raises:
            PromptTooLong: It could never fit into the model or the pool, even alone.
            InvalidRequest: A token id is out of range, the prompt is empty, the id is in use, `lora_name` is none of
                `limits.adapters`, or the guide cannot be compiled or forbids the earlier output.
            NotSupported: This executor follows no guides.
            NotFound: The adapter of that name has another content here.
            CapacityError: The waiting queue is full.
        """

    def abort(self, request_id: str) -> None:
        """End a request at the next step; unknown ids are ignored."""

    def complete_import(
        self, request_id: str, first_token: int, first_log_prob: float, num_transferred_blocks: int
    ) -> None:
        """The reserved blocks hold the prompt's KV; continue after `first_token`.

        The first token counts as generated (max_tokens, penalties, stop ids) but is not emitted again.
        """

    def fail_import(self, request_id: str) -> None:
        """The KV will not come and no transfer writes any more: compute the prompt here, first token included."""

    def end_import(self, request_id: str) -> None:
        """After an abort or failure: no transfer writes into the reserved blocks any more; they may be freed.

        Required once for each `Reserved` request that was aborted or failed before `complete_import` or `fail_import`;
        ignored for others, because an abort may overtake the `Reserved` event.
        """

    def release_export(self, request_id: str) -> None:
        """Unpin the blocks of a prefill request (finished, failed or running); idempotent."""

    def load(self) -> ExecutorLoad:
        """Current load."""

    def close(self) -> None:
        """Stop the engine; every live request gets `Failed`. Blocks until the thread has ended."""


class TieredExecutor(Executor, Protocol):
    """An executor whose blocks can go to lower tiers and come back; any other serves without them."""

    def watch_seals(self, watch: SealWatch, watermark: float | None, on_evicted: EvictionWatch | None = None) -> None:
        """Tell of final blocks from the executor's thread; what the watch keeps is not evicted until `release_kept`.

        To be called at most once, before the first `submit`. Watches never block. What is not kept is told of again
        when others were sealed or released, unless it has been evicted.

        With `on_evicted`, kept blocks are evicted after all others, and none of them delays a decode: an eighth of the
        pool at most is denied to new requests, and nothing to growing ones.

        Args:
            watch: See `SealWatch`.
            watermark: None tells of blocks when they are sealed (write-through). Else of cached blocks that are next
                to be evicted and were not kept before, while less than this share of the pool is free (write-back).
            on_evicted: See `EvictionWatch`; told of all blocks, kept or not.
        """

    def release_kept(self, block_ids: Sequence[BlockId]) -> None:
        """Let go of kept blocks, each once, evicted ones or not; without any, tell again of what was not kept."""

    def count_cached(self, hashes: Sequence[SequenceHash]) -> int:
        """How many leading ones of these blocks the prefix cache holds right now: a hint, it may change at once."""

    def complete_onboard(self, request_id: str, num_blocks: int) -> None:
        """The first `num_blocks` reserved blocks hold their KV, cached ones included: compute the rest.

        Fewer than were reserved is fine. No transfer writes into the others any more. Answers `Reserved` of a request
        with `onboard_blocks` exactly once, unless it was aborted: then `end_import`.
        """
