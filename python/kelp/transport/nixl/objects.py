"""Memory to and from an S3-compatible store through NIXL's OBJ backend.

What NIXL 1.5.1 needs handling for is handled here:

- An agent of its own without UCX and without a progress thread: its requests run on threads of the AWS SDK, whoever
  waits polls.
- An object is written whole; a READ takes any range, and one that goes beyond the object's end is *done* with less.
- A failed request says neither why nor whether the object exists; only `exist` tells a missing object from a store
  that does not answer.
- Every key of a request needs a device number of its own.
- A request that is stuck cannot be ended, and destroying its agent may hang: the owner is a process that can be killed
  (`kv.tiers.objects`). For the same reason the SDK's own retries are bounded by that process's environment.

Not thread-safe: one thread owns an agent.
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kelp.core.errors import ConfigError, RetryableTransferError
from kelp.transport.base import TransferState
from kelp.transport.nixl.library import error_types, import_nixl, typed_error


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Where objects are.

    Attributes:
        endpoint: `http(s)://host:port`; empty for AWS.
    """

    bucket: str
    endpoint: str
    region: str


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """AWS credentials; the token of temporary ones, else empty."""

    access_key: str
    secret_key: str
    session_token: str


@dataclass(frozen=True, slots=True)
class Part:
    """A range of an object and the memory that it is read into."""

    offset_bytes: int
    address: int
    num_bytes: int


class ObjectTransfer:
    """One posted request."""

    def __init__(self, objects: NixlObjects, handle: Any, registered: Any) -> None:
        self._objects = objects
        self._handle = handle
        self._registered = registered

    def poll(self) -> TransferState:
        """Progress.

        Raises:
            RetryableTransferError: The store refused it, has no such object or did not answer.
        """
        return self._objects.poll(self._handle)

    def release(self) -> None:
        """Forget a request that has ended."""
        self._objects.release(self._handle, self._registered)


class NixlObjects:
    """Objects of one bucket. Making one takes about 0.1 s and does not talk to the store.

    Raises:
        ConfigError: The wheel is missing, has no OBJ backend or does not take the settings.
    """

    def __init__(self, store: ObjectStore, credentials: Credentials) -> None:
        api = import_nixl("object_tier.bucket")
        self._errors = error_types(api)
        self._name = f"objects:{uuid.uuid4().hex}"
        self._numbers = itertools.count(1)
        self._agent: Any = api.nixl_agent(self._name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        if "OBJ" not in self._agent.get_plugin_list():
            raise ConfigError("object_tier.bucket: the nixl wheel has no OBJ backend")
        load_errors: tuple[type[Exception], ...] = (*self._errors, RuntimeError, ValueError)
        try:
            self._agent.create_backend("OBJ", _parameters(store, credentials))
        except load_errors as error:
            raise ConfigError(f"object_tier.bucket: nixl: the OBJ backend does not start: {error}") from error

    def register(self, address: int, num_bytes: int) -> None:
        """Memory that requests read from and write to; it must outlive the agent."""
        with self._typed("register"):
            self._agent.register_memory([(address, num_bytes, 0, "")], "DRAM")

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Which objects there are; asked all at once. Blocks.

        Raises:
            RetryableTransferError: The store refused or did not answer.
        """
        with self._typed("exist"):
            rows = [(0, 0, next(self._numbers), key) for key in keys]
            return [found is not None for found in self._agent.query_memory(rows, "OBJ", "OBJ")]

    def write(self, key: str, address: int, num_bytes: int) -> ObjectTransfer:
        """Make an object of registered memory; it appears at once and whole, or not at all."""
        return self._post("WRITE", key, [Part(0, address, num_bytes)])

    def read(self, key: str, parts: Sequence[Part]) -> ObjectTransfer:
        """Read ranges of an object into registered memory."""
        return self._post("READ", key, parts)

    def _post(self, operation: str, key: str, parts: Sequence[Part]) -> ObjectTransfer:
        number = next(self._numbers)
        with self._typed(operation):
            registered = self._agent.register_memory([(0, 0, number, key)], "OBJ")
            memory = self._agent.get_xfer_descs([(part.address, part.num_bytes, 0) for part in parts], "DRAM")
            ranges = self._agent.get_xfer_descs([(part.offset_bytes, part.num_bytes, number) for part in parts], "OBJ")
            handle = self._agent.initialize_xfer(operation, memory, ranges, self._name)
            transfer = ObjectTransfer(self, handle, registered)
            try:
                state = self._agent.transfer(handle)
            except self._errors:
                transfer.release()
                raise
        if state == "ERR":
            transfer.release()
            raise RetryableTransferError(f"object store: {operation} was refused")
        return transfer

    def poll(self, handle: Any) -> TransferState:
        """State of a request; for `ObjectTransfer`."""
        with self._typed("request"):
            state = self._agent.check_xfer_state(handle)
        if state == "ERR":
            raise RetryableTransferError("object store: the request failed")
        return TransferState.DONE if state == "DONE" else TransferState.RUNNING

    def release(self, handle: Any, registered: Any) -> None:
        """Free a request; for `ObjectTransfer`."""
        with contextlib.suppress(*self._errors):
            handle.release()
            self._agent.deregister_memory(registered)

    @contextlib.contextmanager
    def _typed(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise typed_error(error, f"object store: {what.lower()}") from error


def _parameters(store: ObjectStore, credentials: Credentials) -> dict[str, str]:
    parameters = {
        "access_key": credentials.access_key,
        "secret_key": credentials.secret_key,
        "bucket": store.bucket,
        "region": store.region,
        "scheme": "http" if store.endpoint.startswith("http://") else "https",
        "use_virtual_addressing": "false" if store.endpoint or "." in store.bucket else "true",
        "req_checksum": "required",
        "resp_checksum": "required",
    }
    if credentials.session_token:
        parameters["session_token"] = credentials.session_token
    if store.endpoint:
        parameters["endpoint_override"] = store.endpoint
    return parameters
