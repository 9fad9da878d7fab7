"""What stays behind, planted here."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from kelp.chaos.leaks import (
    Footprint,
    Leak,
    count_by_kind,
    held,
    left_after,
    left_in_life,
    mapped_below,
    take_footprint,
)
from kelp.core.messages import WorkerStatus
from kelp.core.types import Role

QUIET = WorkerStatus(
    worker="host:1/decode",
    epoch="e",
    role=Role.DECODE,
    state="ready",
    num_running=0,
    num_waiting=0,
    num_blocks=10,
    num_free_blocks=6,
    num_cached_blocks=4,
    num_leases=0,
)


def footprint(mapped: set[str], existing: set[str], unfinished: set[str] | None = None) -> Footprint:
    return Footprint({7: "stub"}, frozenset(mapped), frozenset(existing), frozenset(unfinished or ()))


def test_a_quiet_worker_holds_nothing_and_cached_blocks_are_no_leak() -> None:
    assert held({"decode": QUIET}) == []


def test_blocks_leases_and_slots_that_nobody_asked_for_are_leaks() -> None:
    busy = QUIET.model_copy(update={"num_free_blocks": 3, "num_leases": 2, "num_running": 1, "num_waiting": 1})
    assert held({"decode": busy}) == [
        Leak("blocks", "decode holds 3"),
        Leak("leases", "decode holds 2"),
        Leak("slots", "decode holds 2"),
    ]


def test_a_worker_that_does_not_answer_is_told() -> None:
    assert [leak.kind for leak in held({"decode": None, "prefill": QUIET})] == ["process"]


def test_shared_memory_that_was_mapped_once_and_now_belongs_to_nobody_is_a_leak() -> None:
    now = footprint(mapped={"/m/alive"}, existing={"/m/alive", "/m/dead", "/m/foreign"}, unfinished={"/r/.new-1"})
    assert left_in_life(now, {"/m/alive", "/m/dead", "/m/removed"}) == [
        Leak("shared-memory", "/m/dead is mapped by no process of the fleet"),
        Leak("file", "/r/.new-1"),
    ]


def test_after_the_end_everything_that_was_ever_mapped_must_be_gone() -> None:
    now = Footprint({7: "stub"}, frozenset(), frozenset({"/m/a", "/m/foreign"}))
    leaks = left_after(now, {"/m/a", "/m/b"}, ["/t/x"], [8001])
    assert count_by_kind(leaks) == {"process": 1, "shared-memory": 1, "file": 1, "port": 1}


def test_only_files_below_the_folder_that_still_exist_count_as_mapped() -> None:
    maps = "\n".join(
        (
            "7f00-7f01 rw-s 00000000 00:1a 12   /dev/shm/kelp_0_8001_region",
            "7f01-7f02 rw-s 00000000 00:1a 13   /dev/shm/gone (deleted)",
            "7f02-7f03 r-xp 00000000 08:01 14   /usr/lib/libc.so.6",
            "7f03-7f04 rw-p 00000000 00:00 0",
        )
    )
    assert mapped_below(Path("/dev/shm"), maps) == {"/dev/shm/kelp_0_8001_region"}


def test_a_footprint_shows_what_a_process_has_mapped_and_what_a_writer_left_half_done(tmp_path: Path) -> None:
    registry, memory = tmp_path / "registry", tmp_path / "shm"
    registry.mkdir()
    memory.mkdir()
    (registry / ".new-abc").touch()
    (registry / "decode.worker.json").touch()
    (memory / "unmapped").write_bytes(b"x")
    with (memory / "mapped").open("w+b") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):
            found = take_footprint({os.getpid(): "python", 2**30: "gone"}, registry, memory)
    assert found.mapped == {str(memory / "mapped")}
    assert found.existing == {str(memory / "mapped"), str(memory / "unmapped")}
    assert found.unfinished == {str(registry / ".new-abc")}
