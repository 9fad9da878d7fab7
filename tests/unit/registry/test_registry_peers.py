"""Records in a folder that others can write: those that a peer wrote count, and they are the writer's own."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from kelp.core.clock import FakeClock
from kelp.core.errors import ProtocolError
from kelp.core.peer_auth import PeerToken
from kelp.registry.base import RouterRecord
from kelp.registry.directory import RouterDirectory
from kelp.registry.record_seal import Refusals

TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)


def record(router_id: str = "r") -> RouterRecord:
    return RouterRecord(router_id=router_id, epoch=1, loads_endpoint="host:1", answers_endpoint="host:2")


def names(directory: RouterDirectory) -> list[str]:
    return [found.router_id for found in directory.snapshot()]


def test_records_of_peers_count_and_anybody_may_read_them(tmp_path: Path) -> None:
    clock = FakeClock()
    RouterDirectory(tmp_path, 5.0, clock, TOKEN).publish(record())
    assert names(RouterDirectory(tmp_path, 5.0, clock, TOKEN)) == ["r"]
    assert names(RouterDirectory(tmp_path, 5.0, clock)) == ["r"]
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text().splitlines()[0])["router_id"] == "r"


@pytest.mark.parametrize("writer", [None, OTHER], ids=["nothing", "another token"])
def test_records_of_strangers_do_not_count_and_are_said_once(
    tmp_path: Path, writer: PeerToken | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    RouterDirectory(tmp_path, 5.0, clock, writer).publish(record())
    directory = RouterDirectory(tmp_path, 5.0, clock, TOKEN)
    assert names(directory) == names(directory) == []
    assert caplog.text.count("nobody who knows the token of peers.token_file wrote it") == 1


@pytest.mark.parametrize("change", ["content", "name"])
def test_a_record_that_was_changed_or_copied_to_another_name_does_not_count(tmp_path: Path, change: str) -> None:
    clock = FakeClock()
    directory = RouterDirectory(tmp_path, 5.0, clock, TOKEN)
    directory.publish(record())
    (path,) = tmp_path.iterdir()
    if change == "content":
        path.write_bytes(path.read_bytes().replace(b"host:1", b"evil:1"))
    else:
        path.rename(path.with_name(f"s{path.name}"))
    assert names(directory) == []


def test_sweeping_leaves_strangers_what_they_still_renew(tmp_path: Path) -> None:
    clock = FakeClock()
    RouterDirectory(tmp_path, 5.0, clock).publish(record())
    (path,) = tmp_path.iterdir()
    now_ns = clock.wall_ns()
    os.utime(path, ns=(now_ns, now_ns))
    directory = RouterDirectory(tmp_path, 5.0, clock, TOKEN)
    assert directory.sweep() == 0 and path.exists()
    clock.advance(6.0)
    assert directory.sweep() == 1 and not path.exists()


def test_a_place_whose_name_has_line_breaks_takes_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Refusals().note("x", ProtocolError("registry record a\nI kelp llm: well\r: no record"))
    (line,) = [item.getMessage() for item in caplog.records]
    assert line == r"ignored: [KELP_PROTOCOL] registry record a\nI kelp llm: well\r: no record"
