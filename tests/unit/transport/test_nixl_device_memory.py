"""What NIXL is told of a pool in device memory, without a device and without NIXL."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kelp.core.types import KVLayout
from kelp.transport import nixl
from kelp.transport.base import Region
from kelp.transport.layout import descriptor_rows, device_number, pool_region

LAYOUT = KVLayout(4, num_layers=2, num_kv_heads=2, block_size=4, head_dim=8, dtype="bfloat16", model_id="m")
nixlBind = SimpleNamespace(
    nixlAgentConfig=type("Config", (), {}), nixlBackendError=type("nixlBackendError", (Exception,), {})
)


class RecordingAgent:
    """The part of `nixl_agent` that registration uses."""

    def __init__(self, name: str, config: object) -> None:
        self.backends = {"UCX": object()}
        self.registered: list[tuple[list, str]] = []
        self.prepared: list[tuple[str, np.ndarray, str]] = []

    def register_memory(self, rows: list, memory_type: str) -> object:
        self.registered.append((rows, memory_type))
        return object()

    def deregister_memory(self, registered: object) -> None:
        pass

    def prep_xfer_dlist(self, agent_name: str, rows: np.ndarray, memory_type: str) -> SimpleNamespace:
        self.prepared.append((agent_name, rows, memory_type))
        return SimpleNamespace(release=lambda: None)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> nixl.NixlAgent:
    api = SimpleNamespace(
        nixlBind=nixlBind,
        nixl_agent=RecordingAgent,
        nixl_agent_config=lambda **_: object(),
        nixl_thread_sync_t=SimpleNamespace(NIXL_THREAD_SYNC_STRICT=object()),
    )
    monkeypatch.setattr(nixl, "_import_nixl", lambda: api)
    monkeypatch.setattr(nixl, "_scratch_block", lambda region: (Region(64, 1, region.block_bytes, region.device), None))
    return nixl.NixlAgent("decode")


@pytest.mark.parametrize(
    ("device", "memory_type", "number"), [("cpu", "DRAM", 0), ("cuda:0", "VRAM", 0), ("cuda:3", "VRAM", 3)]
)
def test_a_pool_is_registered_as_the_memory_that_it_is(
    agent: nixl.NixlAgent, device: str, memory_type: str, number: int
):
    region = pool_region(LAYOUT, 4096, device)
    agent.register(region, owner=None)
    pool, scratch = agent._agent.registered
    assert pool == ([(4096, LAYOUT.num_blocks * LAYOUT.block_bytes, number, "")], memory_type)
    assert scratch == ([(64, LAYOUT.block_bytes, number, "")], memory_type)
    (_, rows, prepared_type), _ = agent._agent.prepared
    assert prepared_type == memory_type
    assert rows.tolist() == [[4096 + block * LAYOUT.block_bytes, LAYOUT.block_bytes, number] for block in range(4)]
    agent.close()


def test_a_device_without_a_number_is_the_first():
    assert device_number(Region(0, 1, 64, "cuda")) == 0
    assert descriptor_rows(Region(128, 2, 64, "cuda:1")).tolist() == [[128, 64, 1], [192, 64, 1]]
