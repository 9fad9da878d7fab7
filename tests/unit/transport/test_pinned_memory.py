"""What CUDA is told of host memory, without CUDA."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kelp.transport.nixl import pinned


class Runtime:
    def __init__(self, status: int = 0) -> None:
        self.calls: list[tuple[object, ...]] = []
        self._status = status

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls.append(("register", address, num_bytes, flags))
        return self._status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


def with_cuda(monkeypatch: pytest.MonkeyPatch, driver: Path, runtime: Runtime, is_available: bool = True) -> None:
    cuda = SimpleNamespace(is_available=lambda: is_available, cudart=lambda: runtime)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(pinned, "_DRIVER", driver)


def test_memory_is_pinned_and_unpinned_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = Runtime()
    with_cuda(monkeypatch, tmp_path, runtime)
    assert pinned.pin_host_memory(4096, 8192)
    pinned.unpin_host_memory(4096)
    assert runtime.calls == [("register", 4096, 8192, 1), ("unregister", 4096)]


def test_a_refusal_of_cuda_costs_only_the_pinning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_cuda(monkeypatch, tmp_path, Runtime(status=2))
    assert not pinned.pin_host_memory(4096, 8192)


def test_without_a_gpu_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = Runtime()
    with_cuda(monkeypatch, tmp_path / "none", runtime)
    assert not pinned.pin_host_memory(4096, 8192)
    with_cuda(monkeypatch, tmp_path, runtime, is_available=False)
    assert not pinned.pin_host_memory(4096, 8192)
    assert runtime.calls == []
