"""Shares of versions: set, shown, refused, taken back."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.cli.traffic import parse_shares, report
from kelp.core.config import RegistryConfig
from kelp.core.errors import ConfigError, NotFound
from kelp.core.types import Role, WorkerState
from kelp.registry.access import RegistryAccess, open_registry
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.supervisor.traffic import Traffic


def record(name: str, version: str, role: Role = Role.DECODE, **changes: object) -> WorkerRecord:
    layout = LayoutRecord(
        num_blocks=64, num_layers=1, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", model_id=f"id-{version}"
    )
    fields = {"worker_id": f"host:1/{name}", "epoch": "e", "model_name": name, "role": role, "endpoint": "host:1"}
    fields |= {"state": WorkerState.READY, "layout": layout, "version": version, **changes}
    return WorkerRecord.model_validate(fields)


@pytest.fixture
def registry(tmp_path: Path) -> RegistryAccess:
    """Two versions, one of them with a prefill worker."""
    access = open_registry(RegistryConfig(path=tmp_path), None)
    access.workers.publish(record("decode", "base"))
    access.workers.publish(record("decode_v2", "v2"))
    access.workers.publish(record("prefill_v2", "v2", Role.PREFILL))
    access.workers.publish(record("decode_v3", "v3", state=WorkerState.DRAINING))
    return access


def shown(traffic: Traffic) -> dict[str, float | None]:
    return {version.version: version.share for version in traffic.versions()}


def test_without_shares_every_version_is_shown_without_one(registry: RegistryAccess) -> None:
    traffic = Traffic(registry, "base")
    assert shown(traffic) == {"base": None, "v2": None, "v3": None}
    lines = report(traffic.versions()).splitlines()
    assert "1 decode, 1 prefill (of 2 workers)   model id-v2" in lines[1]
    assert "ready: none (of 1 workers)" in lines[2]


def test_shares_are_relative_and_outlive_whoever_set_them(registry: RegistryAccess, tmp_path: Path) -> None:
    Traffic(registry, "base").set({"base": 3, "v2": 1})
    again = open_registry(RegistryConfig(path=tmp_path, expiry_s=0.001), None)
    assert Traffic(again, "base").shares() == {"base": 3, "v2": 1}
    assert shown(Traffic(registry, "base")) == {"base": 0.75, "v2": 0.25, "v3": 0.0}


def test_back_undoes_the_last_change_and_does_it_again(registry: RegistryAccess) -> None:
    traffic = Traffic(registry, "base")
    traffic.set({"base": 9, "v2": 1})
    assert traffic.back() == {"base": 1}
    assert traffic.back() == {"base": 9, "v2": 1} == traffic.shares()


def test_back_needs_something_to_go_back_to(registry: RegistryAccess) -> None:
    with pytest.raises(ConfigError, match="no earlier shares"):
        Traffic(registry, "base").back()


@pytest.mark.parametrize("shares", [{"v9": 1.0}, {"base": 1.0, "v3": 1.0}], ids=["unknown", "draining"])
def test_a_version_that_nobody_serves_gets_no_share(registry: RegistryAccess, shares: dict[str, float]) -> None:
    with pytest.raises(NotFound, match="no ready decode worker; there are base, v2"):
        Traffic(registry, "base").set(shares)


def test_somebody_must_get_something(registry: RegistryAccess) -> None:
    with pytest.raises(ConfigError, match="one version must get something"):
        Traffic(registry, "base").set({"base": 0, "v9": 0})


def test_shares_are_read_as_they_are_typed() -> None:
    assert parse_shares(["base=90", "v2=0.5"]) == {"base": 90, "v2": 0.5}


@pytest.mark.parametrize("text", ["v2", "v2=", "=1", "v2=-1", "v2=many", "v2=inf", "v2=nan"])
def test_what_is_no_share_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="must be version=share"):
        parse_shares([text])


def test_a_version_is_named_once() -> None:
    with pytest.raises(ConfigError, match="each version once"):
        parse_shares(["v2=1", "v2=2"])
