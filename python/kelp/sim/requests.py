"""What goes into a simulation and what comes out of it, one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.types import SequenceHash


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request of a workload.

    Attributes:
        arrival_s: Virtual time, never before the request in front of it.
        num_prompt_tokens: ISL.
        num_output_tokens: OSL; the simulated client asks for exactly that many.
        block_hashes: Names of the prompt's full blocks (of the workload's block size), in order.
        session_id: Conversation or agent that it belongs to; empty where the trace does not tell.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_hashes: Sequence[SequenceHash]
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by arrival.

    Attributes:
        name: For reports, `mooncake_synthetic` for example.
        block_size: Tokens per block of `block_hashes`.
    """

    name: str
    block_size: int
    requests: Sequence[SimRequest]


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What became of one request; times are virtual seconds.

    Attributes:
        index: Position in the workload.
        worker: Position of the decode (or aggregated) worker in the fleet; -1 if refused.
        num_cached_tokens: Prompt tokens that were not computed.
        first_token_s: When the first token reached the client; infinite if refused.
        end_s: When the last did.
    """

    index: int
    worker: int
    num_cached_tokens: int
    first_token_s: float
    end_s: float
