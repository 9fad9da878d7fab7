"""What NIXL is told of a pool in device memory, without a device and without NIXL."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kelp.core.types import KVLayout
from kelp.transport.base import Region
from kelp.transport.layout import descriptor_rows, device_number, pool_region
from kelp.transport.nixl import NixlAgent
from kelp.transport.nixl import agent as agent_module

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


def scratch_at_64(region: Region) -> tuple[Region, object]:
    return Region(64, 1, region.block_bytes, region.device), None


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> NixlAgent:
    api = SimpleNamespace(
        nixlBind=nixlBind,
        nixl_agent=RecordingAgent,
        nixl_agent_config=lambda **_: object(),
        nixl_thread_sync_t=SimpleNamespace(NIXL_THREAD_SYNC_STRICT=object()),
    )
    monkeypatch.setattr(agent_module, "import_nixl", lambda: api)
    monkeypatch.setattr(agent_module, "_scratch_block", scratch_at_64)
    return NixlAgent("decode")


@pytest.mark.parametrize(
    ("device", "memory_type", "number"), [("cpu", "DRAM", 0), ("cuda:0", "VRAM", 0), ("cuda:3", "VRAM", 3)]
)
def test_a_pool_is_registered_as_the_memory_that_it_is(agent: NixlAgent, device: str, memory_type: str, number: int):
    region = pool_region(LAYOUT, 4096, device)
    agent.register(region, owner=None)
    pool, scratch = agent._agent.registered
    assert pool == ([(4096, LAYOUT.num_blocks * LAYOUT.block_bytes, number, "")], memory_type)
    assert scratch == ([(64, LAYOUT.block_bytes, number, "")], memory_type)
    (_, rows, prepared_type), _ = agent._agent.prepared
    assert prepared_type == memory_type
    assert rows.tolist() == [[4096 + block * LAYOUT.block_bytes, LAYOUT.block_bytes, number] for block in range(4)]
    agent.close()


def test_blocks_that_lie_apart_are_registered_with_what_lies_between_them(agent: NixlAgent) -> None:
    agent.register(Region(4096, 3, 100, "cpu", stride_bytes=128), owner=None)
    assert agent._agent.registered[0] == ([(4096, 2 * 128 + 100, 0, "")], "DRAM")
    assert agent._agent.prepared[0][1].tolist() == [[4096, 100, 0], [4224, 100, 0], [4352, 100, 0]]
    agent.close()


def test_a_device_without_a_number_is_the_first():
    assert device_number(Region(0, 1, 64, "cuda")) == 0
    assert descriptor_rows(Region(128, 2, 64, "cuda:1")).tolist() == [[128, 64, 1], [192, 64, 1]]
