"""What prefill and decode workers say to each other about a handoff."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from kelp.core.wire import Count, Message, Name, TokenId


class Announce(Message):
    """Prefill to decode: KV of the first `num_tokens` prompt tokens is readable in these blocks.

    `block_ids` are the blocks added since the previous announcement, in prompt order.
    """

    kind: Literal["announce"] = "announce"
    num_tokens: Count
    block_ids: tuple[Count, ...]


class PrefillDone(Message):
    """Prefill to decode: all KV is readable; decoding continues from `first_token`."""

    kind: Literal["done"] = "done"
    first_token: TokenId
    first_log_prob: float


class LeaseRenewed(Message):
    """Prefill to decode: answer to the heartbeat numbered `heartbeat`."""

    kind: Literal["renewed"] = "renewed"
    heartbeat: Count
    ttl_s: Annotated[float, Field(gt=0, le=3600)]


class HandoffFailed(Message):
    """Prefill to decode: this handoff will not complete; `message` carries the typed error."""

    kind: Literal["failed"] = "failed"
    message: Annotated[str, Field(max_length=4000)]


HandoffEvent = Annotated[Announce | PrefillDone | LeaseRenewed | HandoffFailed, Field(discriminator="kind")]


class Attach(Message):
    """Decode to prefill, first on the stream: claim a handoff. Counts as heartbeat 0."""

    kind: Literal["attach"] = "attach"
    handoff_id: Name


class Heartbeat(Message):
    """Decode to prefill: still reading; extend the lease."""

    kind: Literal["heartbeat"] = "heartbeat"
    number: Count


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

    worker: Name
    epoch: Name
    agent_name: Name
    agent_metadata_hex: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=1_000_000)]
    base_address: Annotated[int, Field(ge=0, lt=2**64)]
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d{1,3})$")]
    num_blocks: Annotated[int, Field(ge=1, lt=2**31)]
    num_layers: Annotated[int, Field(ge=1, lt=2**16)]
    num_kv_heads: Annotated[int, Field(ge=1, lt=2**16)]
    block_size: Annotated[int, Field(ge=1, lt=2**16)]
    head_dim: Annotated[int, Field(ge=1, lt=2**16)]
    dtype: Name
    model_id: Name


HANDOFF_EVENT: TypeAdapter[HandoffEvent] = TypeAdapter(HandoffEvent)
HANDOFF_COMMAND: TypeAdapter[HandoffCommand] = TypeAdapter(HandoffCommand)
PEER_DESCRIPTION: TypeAdapter[PeerDescription] = TypeAdapter(PeerDescription)
