"""The few calls of etcd that a registry needs: blocking, bounded in time, and every failure an OSError.

The messages are aetcd's; the channel is grpcio's blocking one, because records are read and written in threads and a
second event loop with gRPC in one process disturbs the first (decision 0014). A member that fails is left for the next
one, by a new connection each time: gRPC's own would come back only after its pauses. While etcd is away one caller at a
time looks whether it is back and all others hear so at once, so that no thread waits for it but that one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import grpc
from aetcd import rpc

from kelp.core.config_registry import EtcdAddress, RegistryConfig
from kelp.core.errors import ConfigError
from kelp.core.peer_auth import read_private

CALL_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 64 * 1024 * 1024
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
)
_ANSWERS = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)
"""These another member would answer as well."""
ResultT = TypeVar("ResultT")


class Entry(NamedTuple):
    """One key; `revision` is of its last change."""

    key: str
    value: bytes
    revision: int


class Reading(NamedTuple):
    """All keys below a prefix in their order, at one revision of the store."""

    entries: tuple[Entry, ...]
    revision: int


class _Link:
    """A connection to one member, and what proves who we are."""

    def __init__(self, endpoint: str, credentials: grpc.ChannelCredentials | None, login: tuple[str, str]) -> None:
        self.endpoint = endpoint
        self._channel = (
            grpc.insecure_channel(endpoint, _OPTIONS)
            if credentials is None
            else grpc.secure_channel(endpoint, credentials, _OPTIONS)
        )
        self.kv, self.lease = rpc.KVStub(self._channel), rpc.LeaseStub(self._channel)
        self.with_: dict[str, object] = {"timeout": CALL_TIMEOUT_S}
        user, password = login
        if user:
            asked = rpc.AuthenticateRequest(name=user, password=password)
            answer = rpc.AuthStub(self._channel).Authenticate(asked, timeout=CALL_TIMEOUT_S)
            self.with_["metadata"] = (("token", answer.token),)

    def close(self) -> None:
        self._channel.close()


class EtcdClient:
    """See the module docstring; may be used by several threads. Every method raises OSError while etcd cannot answer.

    Raises:
        ConfigError: A file with a secret or a certificate cannot be read; names the field.
    """

    def __init__(self, config: RegistryConfig, address: EtcdAddress) -> None:
        self._endpoints = address.endpoints
        self._login = (address.user, _password(config) if address.user else "")
        self._credentials = _credentials(config) if address.is_tls else None
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._trouble = ""
        self._num_failures = 0
        self._link: _Link | None = None

    def read_below(self, prefix: str) -> Reading:
        """Everything whose key begins with `prefix`, which ends in a slash."""
        asked = rpc.RangeRequest(key=prefix.encode(), range_end=prefix[:-1].encode() + b"0")
        answer = self._call(lambda link: link.kv.Range(asked, **link.with_))
        return Reading(tuple(map(_entry, answer.kvs)), answer.header.revision)

    def read(self, key: str) -> Entry | None:
        """One key."""
        answer = self._call(lambda link: link.kv.Range(rpc.RangeRequest(key=key.encode()), **link.with_))
        return _entry(answer.kvs[0]) if answer.kvs else None

    def put(self, key: str, value: bytes, lease_id: int) -> bool:
        """Write a key that goes with a lease; False if there is no such lease."""
        asked = rpc.PutRequest(key=key.encode(), value=value, lease=lease_id)
        return self._found(lambda link: link.kv.Put(asked, **link.with_))

    def delete_if(self, key: str, revision: int) -> None:
        """Remove a key unless it has changed since `revision`."""
        raw = key.encode()
        is_same = rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, key=raw, mod_revision=revision)
        removal = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=raw))
        asked = rpc.TxnRequest(compare=[is_same], success=[removal])
        self._call(lambda link: link.kv.Txn(asked, **link.with_))

    def grant(self, ttl_s: int) -> int:
        """A new lease, which ends unless it is kept alive."""
        answer = self._call(lambda link: link.lease.LeaseGrant(rpc.LeaseGrantRequest(TTL=ttl_s), **link.with_))
        return int(answer.ID)

    def keep_alive(self, lease_id: int) -> bool:
        """Begin a lease's time anew; False if there is no such lease."""

        def renew(link: _Link) -> int:
            answers = link.lease.LeaseKeepAlive(iter((rpc.LeaseKeepAliveRequest(ID=lease_id),)), **link.with_)
            try:
                return int(next(answers).TTL)
            finally:
                answers.cancel()

        return self._call(renew) > 0

    def revoke(self, lease_id: int) -> None:
        """End a lease and the keys that go with it; idempotent."""
        self._found(lambda link: link.lease.LeaseRevoke(rpc.LeaseRevokeRequest(ID=lease_id), **link.with_))

    def close(self) -> None:
        """Let go of the connection."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def _found(self, ask: Callable[[_Link], object]) -> bool:
        try:
            self._call(ask)
        except FileNotFoundError:
            return False
        return True

    def _call(self, ask: Callable[[_Link], ResultT]) -> ResultT:
        is_probe = bool(self._trouble)
        if is_probe and not self._probing.acquire(blocking=False):
            raise ConnectionError(self._trouble)
        try:
            result = self._ask_members(ask)
        except ConnectionError as error:
            self._trouble = str(error)
            raise
        finally:
            if is_probe:
                self._probing.release()
        self._trouble = ""
        return result

    def _ask_members(self, ask: Callable[[_Link], ResultT]) -> ResultT:
        """One member after another, and one more than there are: a connection may be older than a restart."""
        deadline_s = time.monotonic() + CALL_TIMEOUT_S * len(self._endpoints)
        said: dict[str, str] = {}
        for _ in range(len(self._endpoints) + 1):
            endpoint, link = self._endpoints[self._num_failures % len(self._endpoints)], None
            try:
                link = self._open(endpoint)
                return ask(link)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise FileNotFoundError(error.details()) from None
                said[endpoint] = f"etcd {endpoint}: {error.code().name}: {error.details()}"
                self._leave(link)
                if error.code() in _ANSWERS:
                    break
            except ValueError:
                # gRPC's word for a connection that is closed: another thread has had its reasons.
                said[endpoint] = f"etcd {endpoint}: the connection was closed"
            if time.monotonic() > deadline_s:
                break
        raise ConnectionError("; ".join(said.values()))

    def _open(self, endpoint: str) -> _Link:
        with self._lock:
            if self._link is None:
                self._link = _Link(endpoint, self._credentials, self._login)
            return self._link

    def _leave(self, link: _Link | None) -> None:
        """The next call is the next member's, unless somebody has gone there already."""
        with self._lock:
            if self._link is not link:
                return
            self._link = None
            self._num_failures += 1
        if link is not None:
            link.close()


def _entry(found: rpc.KeyValue) -> Entry:
    return Entry(found.key.decode(errors="replace"), found.value, found.mod_revision)


def _password(config: RegistryConfig) -> str:
    if config.password_file is None:
        raise ConfigError("registry.password_file: registry.url names a user, whose password is missing")
    return read_private(config.password_file, "registry.password_file").decode()


def _credentials(config: RegistryConfig) -> grpc.ChannelCredentials:
    files = {name: getattr(config, name) for name in ("ca_file", "key_file", "cert_file")}
    ca, key, cert = (None if path is None else _read(path, name) for name, path in files.items())
    if (key is None) != (cert is None):
        raise ConfigError("registry.cert_file, registry.key_file: one is of no use without the other")
    return grpc.ssl_channel_credentials(ca, key, cert)


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"registry.{name}: {path}: {error.strerror}") from None
