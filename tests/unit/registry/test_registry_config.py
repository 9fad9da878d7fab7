"""How an etcd is addressed, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.core.config import load_config
from kelp.core.config_registry import EtcdAddress, RegistryConfig, parse_etcd_url
from kelp.core.errors import ConfigError
from kelp.registry.access import open_registry
from kelp.registry.base import RouterRecord


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("etcd://host:2379", EtcdAddress(("host:2379",), "/kelp", "", False)),
        ("etcd://a:1,[fd00::1]:2/prod/eu/", EtcdAddress(("a:1", "[fd00::1]:2"), "/prod/eu", "", False)),
        ("etcds://kelp@a.example:2379/x", EtcdAddress(("a.example:2379",), "/x", "kelp", True)),
    ],
)
def test_an_address_says_where_an_etcd_is_and_what_there_is_ours(url: str, address: EtcdAddress) -> None:
    assert parse_etcd_url(url) == address
    assert load_config({"registry.url": url}).registry.etcd == address


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://a:1", "is not etcd://"),
        ("a:2379", "is not etcd://"),
        ("etcd://", "'' is not host:port"),
        ("etcd://a", "'a' is not host:port"),
        ("etcd://a:1,", "'' is not host:port"),
        ("etcd://a:0", "'a:0' is not host:port"),
        ("etcd://a:65536", "'a:65536' is not host:port"),
        ("etcd://a:1/x y", "prefix '/x y'"),
        ("etcd://a:1//x", "prefix '//x'"),
    ],
)
def test_a_bad_address_is_refused_in_one_line_at_load(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="^.*registry.url: ") as caught:
        load_config({"registry.url": url})
    assert reason in caught.value.text
    assert "\n" not in caught.value.text


@pytest.mark.parametrize("url", ["etcd://u:hunter2@a:1", "etcd://u:hun/ter2@a:1", "u:hunter2@a:1"])
def test_a_password_in_an_address_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.password_file") as caught:
        load_config({"registry.url": url})
    assert "hun" not in caught.value.text


def test_without_an_address_the_registry_is_the_directory(tmp_path: Path) -> None:
    registry = open_registry(RegistryConfig(path=tmp_path), None)
    registry.routers.publish(RouterRecord(router_id="r", epoch=1, loads_endpoint="h:1", answers_endpoint="h:2"))
    assert [path.name for path in tmp_path.iterdir()] == ["r.router.json"]


def test_files_that_cannot_be_used_are_refused_by_their_field(tmp_path: Path) -> None:
    secret, missing = tmp_path / "password", tmp_path / "missing"
    secret.write_text("open sesame")
    secret.chmod(0o644)
    bad = {
        "password_file: registry.url names a user": RegistryConfig(url="etcd://u@a:1"),
        "password_file: .* others may open it": RegistryConfig(url="etcd://u@a:1", password_file=secret),
        "password_file: .*: No such file": RegistryConfig(url="etcd://u@a:1", password_file=missing),
        "ca_file: .*: No such file": RegistryConfig(url="etcds://a:1", ca_file=missing),
        "cert_file, registry.key_file": RegistryConfig(url="etcds://a:1", cert_file=secret),
    }
    for reason, config in bad.items():
        with pytest.raises(ConfigError, match=rf"registry\.{reason}"):
            open_registry(config, None)


def test_an_etcd_that_is_not_there_is_an_error_of_the_registry_that_names_it() -> None:
    registry = open_registry(RegistryConfig(url="etcd://127.0.0.1:1"), None)
    for _ in range(2):
        with pytest.raises(OSError, match=r"etcd 127\.0\.0\.1:1: UNAVAILABLE"):
            registry.workers.snapshot()
