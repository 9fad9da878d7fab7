"""Who waits for an etcd that is away: one caller at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kelp.core.config_registry import RegistryConfig
from kelp.registry.etcd_client import EtcdClient


@pytest.fixture
def client() -> EtcdClient:
    """Of an etcd that is not there."""
    config = RegistryConfig(url="etcd://127.0.0.1:1")
    assert config.etcd is not None
    return EtcdClient(config, config.etcd)


def test_while_one_caller_looks_for_etcd_the_others_hear_at_once_that_it_is_away(
    client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="UNAVAILABLE"):
        client.read("/kelp/a")
    looks, may_end = threading.Event(), threading.Event()

    def look(ask: object) -> object:
        looks.set()
        assert may_end.wait(60.0)
        raise ConnectionError("still away")

    monkeypatch.setattr(client, "_ask_members", look)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.read, "/kelp/a")
        assert looks.wait(60.0)
        try:
            with pytest.raises(OSError, match="UNAVAILABLE"):
                client.read("/kelp/b")
        finally:
            may_end.set()
        with pytest.raises(OSError, match="still away"):
            first.result()


def test_once_it_is_back_nobody_is_refused(client: EtcdClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="UNAVAILABLE"):
        client.read("/kelp/a")
    monkeypatch.setattr(client, "_ask_members", lambda ask: 7)
    inside = threading.Barrier(2)

    def meet(ask: object) -> int:
        inside.wait(60.0)
        return 7

    assert client._call(lambda link: 0) == 7
    monkeypatch.setattr(client, "_ask_members", meet)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(client._call, (lambda link: 0, lambda link: 0))) == [7, 7]
