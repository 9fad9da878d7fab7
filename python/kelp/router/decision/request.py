"""What the decision may know of a request; no text, no sampling, no client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kelp.core.types import SequenceHash


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """One request (or one sequence of it) to be placed.

    Attributes:
        num_prompt_tokens: Prompt length.
        block_hashes: Names of the prompt's full blocks, in order.
        request_id: Names the decision (`explain`, `reserve`, `free`); unique among live requests of a router.
        max_tokens: Most tokens to be generated.
        session_id: Requests of one session prefer the worker that served it last; empty for none.
        priority: Higher goes first in the router's queue.
        deadline_s: Value of the router's monotonic clock.
        pinned_worker: A worker id (or model name) that must serve it; empty for any.
        model_id: What the worker must serve; empty where all serve the same.
        required_tags: Tags that a worker must have, by name.
        preferred_tags: Tags that make a worker cheaper.
        tenant: Whose it is: tenants share what there is too little of; empty for those without a cache salt.
        is_resumed: Part of the answer is with the client: it waits for nobody, and is not refused for want of time.
    """

    num_prompt_tokens: int
    block_hashes: Sequence[SequenceHash]
    request_id: str = ""
    max_tokens: int = 16
    session_id: str = ""
    priority: int = 0
    deadline_s: float | None = None
    pinned_worker: str = ""
    model_id: str = ""
    required_tags: Mapping[str, str] = field(default_factory=dict)
    preferred_tags: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""
    is_resumed: bool = False
