"""One sequence of a request inside the router: what was asked, what has been generated, what it cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kelp.core.errors import DeadlineExceeded
from kelp.core.messages import Finished, GenerateCommand, Progress, Rendezvous, SamplingParams
from kelp.core.preprocess_messages import PreparedPrompt
from kelp.core.types import FinishReason, Role
from kelp.router.decision.request import RoutingRequest
from kelp.router.request_ids import sequence_name
from kelp.router.suspects import Suspicion


@dataclass(slots=True)
class Job:
    """One sequence on its way.

    Attributes:
        tenant_hex: `core.hashing.tenant_digest` of the cache salt, hex.
        routing: What the decision may know, but for the prompt.
        deadline_s: `time.monotonic()` value.
        generated: Tokens received so far, over all attempts.
        prefill_event: What the prefill worker told last, if there was one.
        decode_event: What the decode or aggregated worker told last.
        worker_ids: Workers of the latest attempt.
        first_sent_ns: Wall clock when the request's first token had been handed to Triton; sequence 0 alone has it.
        last_received_ns: Wall clock when the latest token came from a worker.
        suspicion: The request's, which its sequences share.
    """

    request_id: str
    prompt: PreparedPrompt
    sampling: SamplingParams
    deadline_s: float
    arrival_ns: int
    lora_name: str = ""
    tenant_hex: str = ""
    routing: RoutingRequest = RoutingRequest(0, ())
    generated: list[int] = field(default_factory=list)
    prefill_event: Progress | Finished | None = None
    decode_event: Progress | Finished | None = None
    worker_ids: tuple[str, ...] = ()
    first_sent_ns: int = 0
    last_received_ns: int = 0
    suspicion: Suspicion = field(default_factory=Suspicion)
    _num_commands: Iterator[int] = field(default_factory=itertools.count)

    def sibling(self, index: int) -> Job:
        """The job of sequence `index` of the same request, to be asked of the job of sequence 0."""
        seed = (self.sampling.seed + index) % 2**64
        return Job(
            request_id=f"{self.request_id}-{index}",
            prompt=self.prompt,
            sampling=self.sampling.model_copy(update={"seed": seed}),
            deadline_s=self.deadline_s,
            arrival_ns=self.arrival_ns,
            lora_name=self.lora_name,
            tenant_hex=self.tenant_hex,
            routing=replace(self.routing, request_id=sequence_name(self.routing.request_id, index)),
            suspicion=self.suspicion,
        )

    def routing_request(self) -> RoutingRequest:
        """What is to be placed now: after an attempt, what was generated belongs to the prompt."""
        return replace(
            self.routing,
            num_prompt_tokens=len(self.prompt.input_ids) + len(self.generated),
            block_hashes=self.prompt.block_hashes,
            max_tokens=max(1, self.sampling.max_tokens - len(self.generated)),
            deadline_s=self.deadline_s,
            tenant=self.tenant_hex,
            model_id=self.prompt.message.model_id,
            is_resumed=bool(self.generated),
        )

    def tokens(self) -> npt.NDArray[np.int32]:
        """Prompt and everything generated: what a (further) attempt starts from."""
        if not self.generated:
            return self.prompt.input_ids
        return np.concatenate([self.prompt.input_ids, np.array(self.generated, dtype=np.int32)])

    def command(
        self, role: Role, rendezvous: Rendezvous | None, num_generated: int, known_blocks: int | None = None
    ) -> GenerateCommand:
        """The worker's command.

        Args:
            role: What it shall do.
            rendezvous: Where it meets the other worker.
            num_generated: How much of the prompt is earlier output.
            known_blocks: Leading blocks of the client's own prompt that the worker has in any tier; None if unknown.

        Raises:
            DeadlineExceeded: No time is left.
        """
        return GenerateCommand(
            request_id=f"{self.request_id}.{next(self._num_commands)}",
            role=role,
            sampling=self.sampling,
            seed_hash_hex=self.prompt.message.seed_hash_hex,
            num_generated=num_generated,
            rendezvous=rendezvous,
            remaining_ms=self.remaining_s() * 1e3,
            lora_name=self.lora_name,
            lora_digest=self.prompt.message.lora_digest,
            lower_tier_blocks=known_blocks if role is not Role.DECODE and not num_generated else None,
            tenant_hex=self.tenant_hex,
            wants_receipt=bool(self.suspicion.deaths),
        )

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Whether the tokens so far are a whole answer, should the worker that knew it be lost."""
        if not self.generated:
            return None
        ends = frozenset(self.sampling.stop_token_ids)
        if not self.sampling.ignore_eos:
            ends |= eos_token_ids
        if self.generated[-1] in ends and len(self.generated) >= self.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.generated) >= self.sampling.max_tokens else None

    def remaining_s(self) -> float:
        """Time left.

        Raises:
            DeadlineExceeded: None is.
        """
        remaining_s = self.deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceeded("deadline_ms: passed before the request was finished")
        return remaining_s
