"""A request of a simulation while it lives, and its work on one worker or two."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kelp.core.types import WorkerKey
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import FirstToken
from kelp.sim.members import Member
from kelp.sim.requests import SimRequest
from kelp.sim.routing import Routing
from kelp.sim.sequence import SimSequence

MAX_TOKENS = 4096
"""What every client allows: the router must not know how long an answer will be."""


@dataclass(slots=True, eq=False)
class Leg:
    """One request on one worker.

    Attributes:
        sequence: Its work there; None before it got there.
        is_ready: That has come so far that KV can move: it has its first token (prefill), or its blocks (import).
        is_handing_over: Of a prefill: its KV is being read.
    """

    job: Job
    member: Member
    sequence: SimSequence | None = None
    is_ready: bool = False
    is_handing_over: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """A request that has not ended.

    Attributes:
        num_generated: Output that the client got in earlier attempts.
        prefill: None where the decode worker computes the prompt.
        decode: None for a single token that the prefill worker says.
        first_token_s: When a worker said it; infinite before.
        told: Of a disaggregated one: what the prefill worker told.
        avoid: Workers that failed it.
    """

    index: int
    request: SimRequest
    router: Routing
    request_id: str
    num_generated: int = 0
    prefill: Leg | None = None
    decode: Leg | None = None
    first_token_s: float = math.inf
    told: FirstToken | None = None
    avoid: frozenset[WorkerKey] = field(default_factory=frozenset)

    @property
    def num_left(self) -> int:
        """Tokens that this attempt has to bring."""
        return self.request.num_output_tokens - self.num_generated

    @property
    def num_known_tokens(self) -> int:
        """Prompt, and output of earlier attempts."""
        return self.request.num_prompt_tokens + self.num_generated

    @property
    def legs(self) -> list[Leg]:
        """Those of this attempt, prefill first."""
        return [leg for leg in (self.prefill, self.decode) if leg is not None]

    def wanted(self) -> RoutingRequest:
        """What the router is asked."""
        return RoutingRequest(
            num_prompt_tokens=self.num_known_tokens,
            block_hashes=self.request.block_hashes,
            request_id=self.request_id,
            max_tokens=MAX_TOKENS,
            session_id=self.request.session_id,
        )

    def start_over(self, failed: WorkerKey) -> None:
        """Forget the attempt, but not what the client got from it."""
        if self.decode is not None and self.decode.sequence is not None:
            self.num_generated += self.decode.sequence.num_generated
        if self.first_token_s < math.inf:
            self.num_generated = max(self.num_generated, 1)
        self.avoid |= {failed}
        self.part()

    def part(self) -> None:
        """Let go of the legs, and they of their sequences: reference counts alone must free everything."""
        for leg in self.legs:
            if not leg.is_handing_over:
                leg.sequence = None
        self.prefill = self.decode = self.told = None
