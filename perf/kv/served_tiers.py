"""Servers whose tiers hold a prompt where a case wants it, so that no sample finds it anywhere else.

`first` is a host with three workers, a small arena, a disk and the store: its worker STORER computes a prompt, UPPER
onboards it from the arena, and LOWER, later, from disk. `second` is another host, which has only the store in common
with it. `plain` has no block manager.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from perf.kv.asking import Asker
from perf.kv.store import REGION, Store
from perf.serving import deployment
from perf.serving.deployment import Variant
from perf.suite import BenchError

STORER, UPPER, LOWER = "decode", "decode_1", "decode_2"
ONLY = "decode"
GROUP_BLOCKS = 8

_JOIN_S = 60.0
_POLL_S = 0.1
_NUM_POOL_BLOCKS = 1024
_REGISTRY_EXPIRY_S = 60
"""Whoever is kept from the cores for a while, on a busy machine, is not lost."""
STORE_TIMEOUT_S = 30
"""The store shares the cores with everybody else here."""
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class ServedTiers:
    """All of them, up."""

    plain: Asker
    first: Asker
    second: Asker


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Blocks that fit into the arena and onto the disk, and bytes of one."""

    arena_blocks: int
    disk_blocks: int
    block_bytes: int


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Look again and again.

    Raises:
        BenchError: It does not come true.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise BenchError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def options_of(settings: dict[str, object]) -> tuple[str, ...]:
    """As `kelp serve` takes them."""
    return tuple(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))


def arena_folder(name: str, work: Path) -> Path:
    """Memory of one server; the folder goes with it."""
    return _SHARED_MEMORY / f"{work.name}-{name}"


def common_settings(threads: int) -> dict[str, object]:
    """What all servers have: as many threads, however many workers share a host."""
    return {
        "executor.threads": threads,
        "executor.num_blocks": _NUM_POOL_BLOCKS,
        "registry.expiry_s": _REGISTRY_EXPIRY_S,
    }


def _tier_settings(name: str, work: Path, sizes: TierSizes, store: Store, bucket: str) -> dict[str, object]:
    return {
        "kv_manager.arena_folder": arena_folder(name, work),
        "kv_manager.host_bytes": sizes.arena_blocks * sizes.block_bytes,
        "kv_manager.eviction": "lru",
        "object_tier.bucket": bucket,
        "object_tier.endpoint": store.endpoint,
        "object_tier.region": REGION,
        "object_tier.timeout_s": STORE_TIMEOUT_S,
        "object_tier.object_bytes": GROUP_BLOCKS * sizes.block_bytes,
        "offload.onboard": "always",
    }


def wait_joined(asker: Asker, num_workers: int) -> None:
    """Wait until a manager knows its workers.

    Raises:
        BenchError: They do not come.
    """
    name = 'kelp_kv_manager_held{kind="workers"}'
    wait_for(lambda: asker.manager_stats().get(name, 0) >= num_workers, f"{num_workers} workers to join", _JOIN_S)


def serve(stack: ExitStack, work: Path, variant: Variant) -> Asker:
    """Start a server; it ends with the stack.

    Raises:
        BenchError: It does not come up.
    """
    served = stack.enter_context(deployment.running("aggregated", work, variant))
    return stack.enter_context(Asker(served.grpc_endpoint))


@contextmanager
def running(work: Path, sizes: TierSizes, store: Store, threads: int) -> Iterator[ServedTiers]:
    """Serve while the block runs.

    Raises:
        BenchError: A server does not come up.
    """
    bucket, common = store.make_bucket("kelp-served"), common_settings(threads)
    first = {
        **common,
        **_tier_settings("first", work, sizes, store, bucket),
        "disk_tier.path": work / "disk",
        "disk_tier.max_bytes": sizes.disk_blocks * (sizes.block_bytes + 4096),
    }
    second = {**common, **_tier_settings("second", work, sizes, store, bucket)}
    with ExitStack() as stack:
        plain_options = options_of({**common, "kv_manager.enabled": "false"})
        plain = serve(stack, work, Variant("plain", plain_options))
        first_options = ("--decode", "3", *options_of(first))
        tiers = ServedTiers(
            plain=plain,
            first=serve(stack, work, Variant("first", first_options, store.environment)),
            second=serve(stack, work, Variant("second", options_of(second), store.environment)),
        )
        wait_joined(tiers.first, 3)
        wait_joined(tiers.second, 1)
        yield tiers
