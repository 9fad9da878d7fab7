"""Slots between memory and files through NIXL's storage backends: POSIX (io_uring, else libaio) or GPUDirect Storage.

What NIXL 1.5.1 needs handling for is handled here:

- An agent of its own without UCX and without a progress thread; whoever waits polls, with growing pauses.
- Descriptors are one per slot, prepared once per region and file.
- A failed batch says neither what is wrong nor where (it fails after its last request has ended): plain calls repeat
  it. If they succeed, the backend is unfit and is not asked again.
- Releasing a transfer in flight reports success, and the bytes land later all the same. So nothing in flight is ever
  released: it is set aside until it has ended, and if it never does, agent, memory and descriptor are leaked.

GPUDirect Storage (`GDS_MT`, `GDS`) is tried first where NVIDIA's driver for it is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kelp.core.errors import ConfigError
from kelp.transport.base import FileTransfer, MoveOutcome, Region, SlotFile, StuckSlots
from kelp.transport.files import PlainFiles, check_moves, deadline_after, stuck_slots
from kelp.transport.layout import descriptor_rows
from kelp.transport.nixl.library import error_types, import_nixl, memory_type

_log = logging.getLogger(__name__)

_GDS_DRIVER = Path("/proc/driver/nvidia-fs")
_GDS: tuple[tuple[str, dict[str, str]], ...] = (("GDS_MT", {}), ("GDS", {}))
_POSIX: tuple[tuple[str, dict[str, str]], ...] = (("POSIX", {"use_uring": "true"}), ("POSIX", {"use_aio": "true"}))
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 250e-6
_Operation = Literal["READ", "WRITE"]


@dataclass(eq=False)
class _Batch:
    """One posted transfer and what it touches; `handle` is None if NIXL did not take it."""

    operation: _Operation
    file: SlotFile
    region: Region
    moves: Sequence[tuple[int, int]]
    handle: Any


class NixlFileTransfer:
    """See `base.FileTransfer`."""

    def __init__(self, files: NixlFiles, batch: _Batch) -> None:
        self._files = files
        self._batch = batch

    def wait(self, timeout_s: float) -> list[MoveOutcome]:
        """See `base.FileTransfer`."""
        left_s = deadline_after(timeout_s)
        pause_s = _FIRST_PAUSE_S
        while (is_done := self._files.poll(self._batch)) is None:
            if left_s() == 0.0:
                self._files.abandon(self._batch)
                return [MoveOutcome.LATE] * len(self._batch.moves)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if is_done:
            return [MoveOutcome.MOVED] * len(self._batch.moves)
        return self._files.repeat(self._batch, left_s())


class NixlFiles:
    """See `base.FileTransport`.

    Raises:
        ConfigError: The wheel is missing or has no storage backend that starts here.
    """

    def __init__(self) -> None:
        api = import_nixl("disk_tier.path")
        self._errors: tuple[type[Exception], ...] = (*error_types(api), RuntimeError, ValueError)
        self._plain = PlainFiles()
        self._is_fit = True
        self._is_closed = False
        self._agent_name = f"files:{uuid.uuid4().hex}"
        self._memory: dict[Region, Any] = {}
        self._slots: dict[int, Any] = {}
        self._registered: list[Any] = []
        self._owners: list[object] = []
        self._abandoned: list[_Batch] = []
        config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
        self._agent = api.nixl_agent(self._agent_name, config)
        self._backend, self.name = self._start_backend()

    def _start_backend(self) -> tuple[str, str]:
        candidates = (*_GDS, *_POSIX) if _GDS_DRIVER.exists() else _POSIX
        reasons = []
        for backend, options in candidates:
            try:
                self._agent.create_backend(backend, options)
            except self._errors as error:
                reasons.append(f"{backend} {options}: {error}")
                continue
            return backend, " ".join(["NIXL", backend, *options])
        raise ConfigError(f"disk_tier.path: nixl: no storage backend starts: {'; '.join(reasons)}")

    def register(self, region: Region, owner: object) -> None:
        """See `base.FileTransport`."""
        self._plain.register(region, owner)
        self._owners.append(owner)
        kind = memory_type(region.device)
        self._memory[region] = self._prepare((region.base_address, region.span_bytes, 0, ""), region, kind)

    def attach(self, file: SlotFile) -> None:
        """See `base.FileTransport`."""
        rows = Region(0, file.num_slots, file.slot_bytes, "cpu")
        self._slots[file.fd] = self._prepare((0, rows.span_bytes, file.fd, ""), rows, "FILE", file.fd)

    def _prepare(self, whole: tuple[int, int, int, str], slots: Region, kind: str, fd: int | None = None) -> Any:
        rows = descriptor_rows(slots)
        if fd is not None:
            rows[:, 2] = fd
        side = "NIXL_INIT_AGENT" if fd is None else self._agent_name
        try:
            self._registered.append(self._agent.register_memory([whole], kind, backends=[self._backend]))
            return self._agent.prep_xfer_dlist(side, rows, kind, backends=[self._backend])
        except self._errors as error:
            self._is_fit = False
            _log.warning("files: %s does not take %s, plain calls do instead: %s", self.name, kind, error)
            return None

    def start_read(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        """See `base.FileTransport`."""
        if not self._is_fit:
            return self._plain.start_read(file, region, moves)
        return NixlFileTransfer(self, self._post(_Batch("READ", file, region, moves, None)))

    def start_write(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        """See `base.FileTransport`."""
        if not self._is_fit:
            return self._plain.start_write(file, region, moves)
        return NixlFileTransfer(self, self._post(_Batch("WRITE", file, region, moves, None)))

    def _post(self, batch: _Batch) -> _Batch:
        check_moves(batch.file, batch.region, batch.moves)
        memory, slots = self._memory[batch.region], self._slots[batch.file.fd]
        rows = np.asarray(batch.moves, np.int32).reshape(-1, 2)
        local, remote = np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1])
        try:
            batch.handle = self._agent.make_prepped_xfer(batch.operation, memory, local, slots, remote)
            self._agent.transfer(batch.handle)
        except self._errors as error:
            _log.warning("files: %s: %s of %d slots: %s", self.name, batch.operation, len(batch.moves), error)
        return batch

    def poll(self, batch: _Batch) -> bool | None:
        """Whether a batch succeeded; None while it runs. For `NixlFileTransfer`."""
        if batch.handle is None:
            return False
        try:
            state = self._agent.check_xfer_state(batch.handle)
        except self._errors:
            state = "ERR"
        if state == "PROC":
            return None
        with contextlib.suppress(*self._errors):
            batch.handle.release()
        return bool(state == "DONE")

    def repeat(self, batch: _Batch, timeout_s: float) -> list[MoveOutcome]:
        """Move a batch that has failed by plain calls, which say what is wrong with which slot."""
        start = self._plain.start_read if batch.operation == "READ" else self._plain.start_write
        outcomes = start(batch.file, batch.region, batch.moves).wait(timeout_s)
        if all(outcome is MoveOutcome.MOVED for outcome in outcomes) and self._is_fit:
            self._is_fit = False
            _log.warning("files: %s fails where plain calls do not: they take over", self.name)
        return outcomes

    def abandon(self, batch: _Batch) -> None:
        """Set a batch aside that did not end in time. For `NixlFileTransfer`."""
        _log.error("files: %s of %d slots has not ended in time", batch.operation, len(batch.moves))
        self._abandoned.append(batch)

    def stuck(self) -> StuckSlots:
        """See `base.FileTransport`."""
        self._abandoned = [batch for batch in self._abandoned if self.poll(batch) is None]
        own = stuck_slots([(batch.file, batch.region, move) for batch in self._abandoned for move in batch.moves])
        plain = self._plain.stuck()
        return StuckSlots(own.memory | plain.memory, own.files | plain.files)

    def close(self) -> bool:
        """See `base.FileTransport`."""
        if self._is_closed:
            return not self._abandoned
        is_clean = not self.stuck().memory
        self._is_closed = True
        self._plain.close()
        if self._abandoned:
            _leaked.append(self)
            return False
        for prepared in (*self._memory.values(), *self._slots.values()):
            if prepared is not None:
                prepared.release()
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._owners.clear()
        del self._agent
        return is_clean


_leaked: list[NixlFiles] = []
"""Agents with a transfer that never ended: destroying them would free what the kernel still uses."""
