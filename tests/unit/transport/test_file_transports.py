"""Slots between memory and files: plain calls and NIXL move the same bytes and tell the same troubles apart."""

from __future__ import annotations

import importlib.util
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kelp.core.errors import ConfigError
from kelp.transport import files, open_file_transport
from kelp.transport.base import FileTransport, MoveOutcome, Region, SlotFile
from kelp.transport.files import PlainFiles

SLOT_BYTES, NUM_SLOTS = 8192, 16
needs_nixl = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="the nixl wheel is not installed",
)
MOVED, SHORT, LATE = MoveOutcome.MOVED, MoveOutcome.SHORT, MoveOutcome.LATE


def nixl_files() -> FileTransport:
    from kelp.transport.nixl.files import NixlFiles

    return NixlFiles()


KINDS = [PlainFiles, pytest.param(nixl_files, marks=[needs_nixl, pytest.mark.nixl])]


class Memory:
    """Page-aligned slots with a stride."""

    def __init__(self) -> None:
        self.stride = SLOT_BYTES + 4096
        self.owner = np.frombuffer(mmap.mmap(-1, NUM_SLOTS * self.stride), np.uint8)
        self.region = Region(self.owner.ctypes.data, NUM_SLOTS, SLOT_BYTES, "cpu", self.stride)
        self.slots = self.owner.reshape(NUM_SLOTS, self.stride)[:, :SLOT_BYTES]


class Rig:
    def __init__(self, make: Callable[[], FileTransport], path: Path, flags: int) -> None:
        self.transport = make()
        self.memory = Memory()
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | flags)
        os.posix_fallocate(self.fd, 0, NUM_SLOTS * SLOT_BYTES)
        self.file = SlotFile(self.fd, NUM_SLOTS, SLOT_BYTES)
        self.transport.register(self.memory.region, self.memory.owner)
        self.transport.attach(self.file)

    def write(self, *moves: tuple[int, int]) -> list[MoveOutcome]:
        return self.transport.start_write(self.file, self.memory.region, moves).wait(20)

    def read(self, *moves: tuple[int, int]) -> list[MoveOutcome]:
        return self.transport.start_read(self.file, self.memory.region, moves).wait(20)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[], FileTransport]:
    return request.param


@pytest.fixture(params=[0, os.O_DIRECT], ids=["cached", "direct"])
def rig(request: pytest.FixtureRequest, make: Callable[[], FileTransport], tmp_path: Path) -> Iterator[Rig]:
    try:
        rig = Rig(make, tmp_path / "slots", request.param)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    yield rig
    assert rig.transport.close() and rig.transport.close()
    os.close(rig.fd)


def test_slots_land_where_they_were_sent_and_come_back(rig: Rig) -> None:
    source = np.random.default_rng(1).integers(0, 256, rig.memory.slots.shape, dtype=np.uint8)
    rig.memory.slots[:] = source
    assert rig.write(*((slot, NUM_SLOTS - 1 - slot) for slot in range(NUM_SLOTS))) == [MOVED] * NUM_SLOTS
    assert rig.path.read_bytes() == source[::-1].tobytes()
    rig.memory.owner[:] = 0
    assert rig.read((3, 0), (4, 15)) == [MOVED, MOVED]
    expected = np.zeros((NUM_SLOTS, rig.memory.stride), np.uint8)
    expected[3, :SLOT_BYTES], expected[4, :SLOT_BYTES] = source[15], source[0]
    assert (rig.memory.owner.reshape(expected.shape) == expected).all()
    assert rig.transport.stuck().memory == frozenset()


def test_transfers_overlap(rig: Rig) -> None:
    rig.memory.slots[:] = np.arange(NUM_SLOTS, dtype=np.uint8)[:, None]
    rig.write(*((slot, slot) for slot in range(NUM_SLOTS)))
    rig.memory.slots[:] = 0
    started = [rig.transport.start_read(rig.file, rig.memory.region, [(slot, slot)]) for slot in range(NUM_SLOTS)]
    assert all(transfer.wait(20) == [MOVED] for transfer in reversed(started))
    assert (rig.memory.slots == np.arange(NUM_SLOTS, dtype=np.uint8)[:, None]).all()


def test_a_slot_beyond_the_end_of_the_file_is_short_and_the_others_are_read(rig: Rig) -> None:
    rig.memory.slots[:] = 7
    rig.write(*((slot, slot) for slot in range(NUM_SLOTS)))
    os.truncate(rig.path, 5 * SLOT_BYTES)
    rig.memory.slots[:] = 0
    assert rig.read((0, 4), (1, 5), (2, 0)) == [MOVED, SHORT, MOVED]
    assert (rig.memory.slots[[0, 2]] == 7).all()
    assert rig.read((3, 1)) == [MOVED]


def test_what_the_system_refuses_has_failed(rig: Rig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SLOT_BYTES, hard))
    try:
        assert rig.write((0, 0), (1, 8)) == [MOVED, MoveOutcome.FAILED]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_no_space_is_told_apart(make: Callable[[], FileTransport]) -> None:
    transport, memory = make(), Memory()
    fd = os.open("/dev/full", os.O_RDWR)
    file = SlotFile(fd, NUM_SLOTS, SLOT_BYTES)
    transport.register(memory.region, memory.owner)
    transport.attach(file)
    assert transport.start_write(file, memory.region, [(0, 0)]).wait(20) == [MoveOutcome.NO_SPACE]
    assert transport.close()
    os.close(fd)


class Pipe:
    """A file that gives nothing until somebody writes into it, with a transport that reads it."""

    def __init__(self, transport: FileTransport) -> None:
        self.transport, self.memory = transport, Memory()
        self._read_end, self._write_end = os.pipe()
        self.file = SlotFile(self._read_end, 1, SLOT_BYTES)
        transport.register(self.memory.region, self.memory.owner)
        transport.attach(self.file)

    def give(self) -> None:
        os.write(self._write_end, b"\7" * SLOT_BYTES)
        deadline_s = time.monotonic() + 20
        while self.transport.stuck().memory:
            assert time.monotonic() < deadline_s, "the transfer never ended"

    def close(self) -> None:
        os.close(self._write_end)
        os.close(self._read_end)


@needs_nixl
@pytest.mark.nixl
def test_memory_of_an_abandoned_transfer_is_stuck_until_the_bytes_have_landed() -> None:
    transport = nixl_files()
    if "use_uring" not in transport.name:
        pytest.skip("io_uring is refused here, and libaio would block in the post")
    pipe = Pipe(transport)
    assert transport.start_read(pipe.file, pipe.memory.region, [(5, 0)]).wait(0.01) == [LATE]
    assert transport.stuck().memory == {(pipe.memory.region, 5)}
    assert transport.stuck().files == {(pipe.file.fd, 0)}
    assert not pipe.memory.slots.any()
    pipe.give()
    assert (pipe.memory.slots[5] == 7).all()
    assert transport.stuck().files == frozenset()
    assert transport.close()
    pipe.close()


@needs_nixl
@pytest.mark.nixl
def test_closing_over_a_stuck_transfer_leaks_it_on_purpose() -> None:
    from kelp.transport.nixl import files as nixl_module

    transport = nixl_files()
    if "use_uring" not in transport.name:
        pytest.skip("io_uring is refused here, and libaio would block in the post")
    pipe = Pipe(transport)
    transport.start_read(pipe.file, pipe.memory.region, [(5, 0)]).wait(0.01)
    assert not transport.close() and not transport.close()
    assert nixl_module._leaked.pop() is transport
    pipe.give()
    assert (pipe.memory.slots[5] == 7).all()
    pipe.close()


def test_plain_calls_that_hang_are_stuck_until_they_return(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pipe has no positions, so the plain call is given one that reads it without.
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: os.readv(fd, buffers))
    transport = PlainFiles()
    pipe = Pipe(transport)
    assert transport.start_read(pipe.file, pipe.memory.region, [(2, 0)]).wait(0.01) == [LATE]
    assert transport.stuck().memory == {(pipe.memory.region, 2)}
    assert not transport.close()
    assert files._leaked.pop() is transport
    pipe.give()
    assert (pipe.memory.slots[2] == 7).all()
    pipe.close()


@needs_nixl
@pytest.mark.nixl
def test_a_backend_that_fails_where_plain_calls_do_not_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(nixl_files, tmp_path / "slots", 0)
    monkeypatch.setattr(rig.transport, "poll", lambda batch: False)
    rig.memory.slots[:] = 9
    assert rig.write((0, 3), (1, 4)) == [MOVED, MOVED]
    assert isinstance(rig.transport.start_read(rig.file, rig.memory.region, [(2, 3)]), files._PlainTransfer)
    assert rig.read((2, 3)) == [MOVED]
    rig.transport.close()
    os.close(rig.fd)


def test_without_a_wheel_plain_calls_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from kelp.transport.nixl import files as nixl_module

    def refuse(field: str) -> None:
        raise ConfigError(f"{field}: no wheel")

    monkeypatch.setattr(nixl_module, "import_nixl", refuse)
    transport = open_file_transport(is_direct=True)
    assert isinstance(transport, PlainFiles)
    assert transport.close()


def test_what_goes_through_the_page_cache_is_moved_by_plain_calls() -> None:
    transport = open_file_transport(is_direct=False)
    assert isinstance(transport, PlainFiles)
    assert transport.close()


class RecordingAgent:
    """The part of `nixl_agent` that starting a backend uses; starts `works` only."""

    works: tuple[str, str] = ("", "")
    tried: list[tuple[str, str]]

    def __init__(self, name: str, config: object) -> None:
        type(self).tried = []

    def create_backend(self, backend: str, options: dict[str, str]) -> None:
        self.tried.append((backend, *options) if options else (backend, ""))
        if self.tried[-1] != self.works:
            raise RuntimeError("not here")


@pytest.mark.parametrize(
    ("has_driver", "works", "name"),
    [
        (False, ("POSIX", "use_uring"), "NIXL POSIX use_uring"),
        (False, ("POSIX", "use_aio"), "NIXL POSIX use_aio"),
        (True, ("GDS_MT", ""), "NIXL GDS_MT"),
        (True, ("GDS", ""), "NIXL GDS"),
        (True, ("POSIX", "use_uring"), "NIXL POSIX use_uring"),
        (False, ("GDS", ""), None),
    ],
)
def test_the_best_backend_that_starts_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_driver: bool, works: tuple[str, str], name: str | None
) -> None:
    from kelp.transport.nixl import files as nixl_module

    api = SimpleNamespace(nixlBind=SimpleNamespace(), nixl_agent=RecordingAgent, nixl_agent_config=lambda **_: object())
    monkeypatch.setattr(nixl_module, "import_nixl", lambda field: api)
    monkeypatch.setattr(nixl_module, "_GDS_DRIVER", tmp_path if has_driver else tmp_path / "none")
    monkeypatch.setattr(RecordingAgent, "works", works)
    if name is None:
        with pytest.raises(ConfigError, match="disk_tier.path: nixl: no storage backend starts"):
            nixl_module.NixlFiles()
    else:
        assert nixl_module.NixlFiles().name == name
