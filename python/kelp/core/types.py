"""Value types shared by all parts of kelp.

Nothing here knows about Triton, torch or NIXL. Units end the names.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

BlockId = NewType("BlockId", int)
"""Index of a KV block in one worker's pool."""

SequenceHash = NewType("SequenceHash", bytes)
"""16-byte digest of a full block and everything before it (`core.hashing`)."""


WorkerKey = tuple[str, str]
"""A worker's id and epoch: a restarted worker is another one."""


class Tier(enum.IntEnum):
    """Where a block's KV lies, fastest first; the value indexes arrays."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    OBJECT = 3


class Role(str, enum.Enum):
    """What a worker does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class WorkerState(str, enum.Enum):
    """Where a worker is in its life; only `READY` receives new requests.

    `STUCK`: it answers, but its engine does not get on; it may become `READY` again, or has to be restarted.
    """

    STARTING = "starting"
    READY = "ready"
    STUCK = "stuck"
    DRAINING = "draining"
    GONE = "gone"


class FinishReason(str, enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class HandoffShape(str, enum.Enum):
    """How an engine hands a prefilled sequence to another one.

    `RENDEZVOUS`: both start at once and meet under an id that the router made (SGLang, kelp's torch executor).
    `TICKET`: prefill returns an opaque ticket that decode needs to start (vLLM, TensorRT-LLM).
    """

    RENDEZVOUS = "rendezvous"
    TICKET = "ticket"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one worker's KV pool: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`.

    Two workers may exchange blocks only if everything but `num_blocks` is equal.
    """

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    model_id: str

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return elements * self.dtype_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_bytes

    def is_compatible(self, other: KVLayout) -> bool:
        """Whether blocks of `other` mean the same bytes as blocks of this layout."""
        return self._shape() == other._shape()

    def _shape(self) -> tuple[int, int, int, int, str, str]:
        return (
            self.num_layers,
            self.num_kv_heads,
            self.block_size,
            self.head_dim,
            self.dtype,
            self.model_id,
        )


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens occupy, the last one possibly partial."""
    return -(-num_tokens // block_size)
