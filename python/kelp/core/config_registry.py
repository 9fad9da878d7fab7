"""Configuration of where processes find each other, and how an etcd is addressed; part of `core.config`."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from kelp.core.config_values import Group, Positive
from kelp.core.errors import ConfigError

_FORM = "etcd://[user@]host:port[,host:port]/prefix (etcds:// for TLS)"
_URL = re.compile(r"(?P<scheme>[a-z0-9+.-]+)://(?:(?P<user>[^@/]*)@)?(?P<endpoints>[^/@]*)(?P<prefix>/.*)?", re.DOTALL)
_ENDPOINT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._-]+)+")
_DEFAULT_PREFIX = "/kelp"
_MAX_PORT = 65535


def default_registry_folder() -> Path:
    """Registry of servers started without a config file: one per user and host."""
    return Path(tempfile.gettempdir()) / f"kelp-{os.getuid()}" / "registry"


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """Where an etcd is, and what there is ours.

    Attributes:
        endpoints: `host:port` of its members.
        prefix: Begins every key; deployments with different ones do not see each other.
        user: Of etcd's own authentication; empty for none.
    """

    endpoints: tuple[str, ...]
    prefix: str
    user: str
    is_tls: bool


def parse_etcd_url(url: str) -> EtcdAddress:
    """What `registry.url` says.

    Raises:
        ConfigError: It is not of the form, or holds a password; says what is wrong without repeating that.
    """
    if ":" in url.partition("://")[2].rpartition("@")[0] or ("://" not in url and "@" in url):
        raise ConfigError("registry.url: no passwords here, it is shown to everybody; use registry.password_file")
    found = _URL.fullmatch(url)
    if found is None or found["scheme"] not in ("etcd", "etcds"):
        raise ConfigError(f"registry.url: {url!r} is not {_FORM}")
    user, endpoints = found["user"] or "", tuple(found["endpoints"].split(","))
    for endpoint in endpoints:
        port = _ENDPOINT.fullmatch(endpoint)
        if port is None or not 1 <= int(port[1]) <= _MAX_PORT:
            raise ConfigError(f"registry.url: {endpoint!r} is not host:port, with a port up to {_MAX_PORT}; {_FORM}")
    prefix = (found["prefix"] or "").rstrip("/") or _DEFAULT_PREFIX
    if _PREFIX.fullmatch(prefix) is None:
        raise ConfigError(f"registry.url: prefix {prefix!r}: letters, digits, '.', '_' and '-' between slashes only")
    return EtcdAddress(endpoints, prefix, user, found["scheme"] == "etcds")


class RegistryConfig(Group):
    """Where workers, routers and KV block managers find each other."""

    url: str = ""
    """An etcd, for several hosts: `etcd://[user@]host:port[,host:port]/prefix`, `etcds://` for TLS; empty for the
    directory of `path`."""
    password_file: Path | None = None
    """File with the password of the user in `url`, readable by its owner alone."""
    ca_file: Path | None = None
    """Certificates (PEM) of the authorities that may vouch for an `etcds://`; the system's without one."""
    cert_file: Path | None = None
    """Own certificate (PEM), for an `etcds://` that asks for one,"""
    key_file: Path | None = None
    """and its key."""
    path: Path = Field(default_factory=default_registry_folder)
    """Directory of records, one file each, for one host."""
    last_seen_path: Path | None = None
    """Folder in which routers of this host note what the registry says, to start from while it is away; without one,
    beside `path`, where notes of `kelp serve` end with its run."""
    heartbeat_s: Positive = 1.0
    """How often a worker renews its record."""
    expiry_s: Positive = 5.0
    """A record not renewed for this long belongs to a dead worker; etcd counts whole seconds, 2 at least."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        if url:
            parse_etcd_url(url)
        return url

    @property
    def etcd(self) -> EtcdAddress | None:
        """The etcd; None for the directory."""
        return parse_etcd_url(self.url) if self.url else None
