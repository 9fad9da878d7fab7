"""Configuration of KV below the workers' own pools: events, the block manager and its tiers; part of `core.config`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from kelp.core.config_values import Group, Positive

_Share = Annotated[float, Field(gt=0, le=1)]
_Bytes = Annotated[int, Field(ge=0)]
EvictionName = Literal["cost", "lru", "lfu", "s3-fifo"]
_SHARED_MEMORY = Path("/dev/shm")


def default_arena_folder() -> Path:
    """Memory that outlives a process: tmpfs where there is one."""
    base = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return base / f"kelp-{os.getuid()}"


class EventsConfig(Group):
    """KV events: how workers tell routers what their caches hold."""

    enabled: bool = True
    """Publish; routers can only guess what a worker holds that does not."""
    host: str = "127.0.0.1"
    """Address the event sockets bind and announce."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Of the events; 0 takes a free one."""
    replay_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where missed events and snapshots are asked for; 0 takes a free one."""
    flush_interval_s: Positive = 0.01
    """Longest time that an event waits for others to travel with it: one message and one wake-up serve them all."""
    digest_interval_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """How often a worker says what its events should add up to; three times this without a sign is silence."""
    max_queued_events: Annotated[int, Field(ge=16)] = 65536
    """Events that wait for the publishing thread; beyond, the engine's thread files them itself."""
    replay_batches: Annotated[int, Field(ge=1)] = 8192
    """Past batches kept to be repeated; older gaps take a snapshot."""
    replay_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024 * 1024
    """Most memory of those batches."""
    max_message_bytes: Annotated[int, Field(ge=65536)] = 4 * 1024 * 1024
    """A worker's larger message is refused."""
    max_buffered_batches: Annotated[int, Field(ge=16)] = 4096
    """Batches per worker that wait at the router while earlier ones are asked for."""
    request_timeout_s: Positive = 5.0
    """A replay or snapshot that brings nothing for this long has failed."""
    max_backoff_s: Positive = 10.0
    """Longest wait before a failed request is repeated; it starts at a fortieth and doubles."""
    audit_interval_s: Positive = 10.0
    """How often a quiet worker without digests (vLLM, SGLang) is asked for what may have been missed."""
    drop_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For fault tests: this share of batches is never sent."""
    duplicate_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For fault tests: this share is sent twice."""
    reorder_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For fault tests: this share is sent after the batch that follows."""


class KvManagerConfig(Group):
    """The KV block manager (model `kv_block_manager`): one per host, shared by its workers."""

    enabled: bool = True
    """Whether `kelp serve` starts it, and whether workers look for one."""
    host_bytes: _Bytes = 0
    """Host memory for KV (tier G2); 0 takes `host_memory_fraction` of what is free at the start, 4 GiB at most."""
    host_memory_fraction: _Share = 0.1
    """Share of free memory that an automatically sized host tier takes."""
    arena_folder: Path = Field(default_factory=default_arena_folder)
    """Where the host tier's memory is mapped from; on tmpfs it survives a crash of the manager."""
    use_huge_pages: bool = True
    """Ask the kernel for huge pages where it gives them on advice (`/dev/shm` mounted with `huge=advise`)."""
    eviction: EvictionName = "cost"
    """Which block leaves a full tier first; `cost` weighs what recomputing it takes against how likely it is wanted."""
    lease_ttl_s: Positive = 10.0
    """Blocks that a worker reads are held this long without its heartbeat."""
    tenant_share: _Share = 1.0
    """Most of each tier that the blocks of one `cache_salt` may take (of the object store: of `object_tier.max_bytes`);
    beyond, its own blocks make room."""
    max_pinned_share: _Share = 0.5
    """Most of the host tier that pinned blocks may take."""
    max_operations: Annotated[int, Field(ge=1)] = 1024
    """Operations of workers that may wait; further ones are refused with KELP_OVERLOADED."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Of the manager's KV events; 0 takes a free one."""


class DiskTierConfig(Group):
    """KV on local disk (tier G3), kept over restarts."""

    path: Path | None = None
    """Folder of the slot files; without one there is no disk tier."""
    max_bytes: _Bytes = 16 * 1024**3
    """Preallocated at the first start."""
    min_offers: Annotated[int, Field(ge=1, le=1000)] = 1
    """A block is written when it has been offered this often; above 1 spares the SSD what is never asked for again."""
    max_write_bytes_per_s: _Bytes = 0
    """Bound on what is written, for the SSD's life; 0 for none. Blocks beyond it wait, in a bounded queue."""
    direct_io: Literal["auto", "always", "never"] = "auto"
    """O_DIRECT: `auto` where the file system has it."""
    key_file: Path | None = None
    """File with 32 random bytes (or 64 hex digits): encrypts what lies on disk and in the object store."""
    key_variable: str = ""
    """Environment variable with 64 hex digits, instead of `key_file`."""


class ObjectTierConfig(Group):
    """KV in an S3-compatible object store (tier G4), shared between hosts."""

    bucket: str = ""
    """Without one there is no object tier. Credentials come from the standard AWS sources."""
    prefix: str = "kelp"
    """Of all object keys."""
    endpoint: str = ""
    """`http(s)://host:port` of a store that is not AWS."""
    region: str = "us-east-1"
    """Of the bucket."""
    object_bytes: Annotated[int, Field(ge=1, le=64 * 1024**2)] = 2 * 1024**2
    """Blocks are grouped into objects of about this size."""
    max_bytes: _Bytes = 0
    """Of all models and hosts below the prefix; beyond, objects are deleted: of tenants beyond their share first, then
    the oldest. 0 for no bound."""
    timeout_s: Positive = 2.0
    """A request that takes longer has failed."""
    max_failures: Annotated[int, Field(ge=1)] = 3
    """Failures in a row after which the store is left alone for `retry_after_s`."""
    retry_after_s: Positive = 5.0
    """How long; doubles up to a minute while it stays away."""
    refresh_s: Positive = 30.0
    """How often the store is asked what other hosts have put there."""


def _unquoted_off(value: object) -> object:
    """YAML reads `off` as False."""
    return "off" if value is False else value


class OffloadConfig(Group):
    """What workers keep below their own pool, and when they bring it back."""

    mode: Annotated[Literal["write-through", "write-back", "off"], BeforeValidator(_unquoted_off)] = "write-through"
    """Offer blocks to the manager when they are full, or when they are next to be evicted, or never."""
    max_blocks_in_flight: Annotated[int, Field(ge=1)] = 64
    """Blocks held for the manager to read; what is sealed beyond is not offered (and counted)."""
    write_back_watermark: _Share = 0.1
    """With `write-back`, blocks are offered while less than this share of the pool is free."""
    onboard: Literal["auto", "always", "never"] = "auto"
    """Bring a prompt's blocks back when that is predicted to be faster than computing them, or always, or never."""
    use_other_hosts: bool = False
    """Where no manager serves this host, one of another host of the same registry does: workers READ from its memory,
    and it from theirs, over the network."""
    min_onboard_blocks: Annotated[int, Field(ge=1)] = 2
    """Prompts that lack fewer blocks are computed without asking."""
    onboard_timeout_s: Positive = 10.0
    """What has not come after this long is computed."""
    call_timeout_s: Positive = 1.0
    """A call to the manager that takes longer has failed; the worker goes on without it and tries again later."""
    verify_checksums: bool = True
    """Check every block again after it has been read into the worker's own memory (CPU pools)."""
