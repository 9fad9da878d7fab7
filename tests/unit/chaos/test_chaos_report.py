"""What a run says of itself, and what it reads off metrics."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kelp.chaos.done import Done
from kelp.chaos.faults import Fault, FaultKind, Phase
from kelp.chaos.leaks import Leak
from kelp.chaos.load import Answered
from kelp.chaos.questions import Question
from kelp.chaos.report import Report
from kelp.chaos.scrape import Increase
from kelp.chaos.storage_faults import put_in_place
from kelp.chaos.tier_faults import damage
from kelp.chaos.verdict import Judgement, Outcome, Tally
from kelp.cli.chaos import parse_duration_s, parse_store
from kelp.core.errors import ConfigError

KILL = Fault(1.0, FaultKind.WORKER_KILLED, "decode", Phase.DECODING)


def make_report(*judgements: Judgement, leaks: tuple[Leak, ...] = (), unhealed: tuple[str, ...] = ()) -> Report:
    tally = Tally()
    for judgement in judgements:
        tally.add(judgement)
    troubles = [
        Answered("chaos-1", Question("hi", 1), judgement, 2.0, 3.0)
        for judgement in judgements
        if judgement.outcome is Outcome.FAILED
    ]
    done = [Done(KILL, 1.1, True, "decode (17) decoding"), Done(KILL, 2.1, False, "decode is down")]
    return Report({"seed": 9}, tally, 3, 0.0, done, troubles, leaks, unhealed)


@pytest.mark.parametrize(
    ("report", "is_clean"),
    [
        (make_report(Judgement(Outcome.COMPLETED), Judgement(Outcome.SHED, "OVERLOADED")), True),
        (make_report(Judgement(Outcome.FAILED, "WORKER_LOST")), False),
        (make_report(Judgement(Outcome.WRONG, num_wrong_tokens=1)), False),
        (make_report(Judgement(Outcome.HUNG)), False),
        (make_report(leaks=(Leak("blocks", "decode holds 1"),)), False),
        (make_report(unhealed=("decode",)), False),
        (make_report().extended((), ("kelp serve ended with SIGKILL",)), False),
    ],
)
def test_a_run_is_clean_only_if_nothing_came_of_it(report: Report, is_clean: bool) -> None:
    assert report.is_clean is is_clean


def test_the_time_after_the_last_fault_counts_as_a_gap() -> None:
    report = make_report()
    assert (report.longest_gap_s, replace(report, ended_s=9.1).longest_gap_s) == (1.1, 8.0)


def test_faults_that_are_tried_on_after_the_schedule_leave_no_gap_behind() -> None:
    late = Done(KILL, 30.0, True, "decode (17) decoding")
    report = make_report()
    assert round(replace(report, ended_s=4.1, faults=[*report.faults, late]).longest_gap_s, 6) == 3.0


def test_what_cannot_be_done_here_is_no_kind_that_found_nobody() -> None:
    full, gone = Fault(1.0, FaultKind.DISK_FULL), Fault(2.0, FaultKind.STORE_GONE)
    faults = [
        Done(full, 1.0, False, "needs root", is_possible=False),
        Done(gone, 2.0, False, "nothing was asked of it"),
    ]
    report = replace(make_report(), faults=faults)
    assert (report.kinds_not_done, report.kinds_impossible) == ((FaultKind.STORE_GONE,), (FaultKind.DISK_FULL,))


def test_the_report_names_seed_faults_failures_and_leaks() -> None:
    report = make_report(
        Judgement(Outcome.FAILED, "WORKER_LOST", "[KELP_WORKER_LOST] gone"), leaks=(Leak("leases", "prefill holds 2"),)
    )
    document = json.loads(report.to_json())
    assert document["options"]["seed"] == 9
    assert document["failed_by_code"] == {"WORKER_LOST": 1}
    assert (document["migrated"], document["hangs"], document["wrong_tokens"]) == (3, 0, 0)
    assert [fault["done"] for fault in document["faults"]] == [True, False]
    assert (document["kinds_not_done"], document["longest_gap_s"]) == ([], 1.1)
    assert document["troubles"][0]["text"] == "[KELP_WORKER_LOST] gone"
    screen = io.StringIO()
    for table in report.tables():
        Console(width=160, file=screen).print(table)
    text = screen.getvalue()
    for word in ("worker-killed/decoding", "decode is down", "[KELP_WORKER_LOST] gone", "prefill holds 2"):
        assert word in text


def test_a_counter_that_starts_anew_still_only_goes_up() -> None:
    increase = Increase()
    for value in (2.0, 5.0, 1.0, 4.0):
        increase.see("front", {"kelp_retries_total": value}, "kelp_retries_total")
    increase.see("front", {}, "kelp_retries_total")
    assert increase.total == 9.0


@pytest.mark.parametrize("piece_bytes", [64, 128])
def test_damage_changes_one_byte_of_each_piece_that_holds_anything(tmp_path: Path, piece_bytes: int) -> None:
    path = tmp_path / "slots"
    content = bytearray(10 * 128 + 7)
    for piece in (0, 3, 9):
        content[piece * 128 : piece * 128 + 60] = bytes([7]) * 60
    path.write_bytes(content)
    assert damage(path, random.Random(1), piece_bytes) == 3
    changed = [place for place, (old, new) in enumerate(zip(content, path.read_bytes(), strict=True)) if old != new]
    assert [place // 128 for place in changed] == [0, 3, 9]
    assert all(content[place] for place in changed)


@pytest.mark.parametrize("in_the_way", ["nothing", "file", "folder"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_the_registry_is_put_away_and_back_whatever_a_writer_has_made_meanwhile(
    tmp_path: Path, in_the_way: str, is_folder: bool
) -> None:
    source, target = tmp_path / "source", tmp_path / "registry"
    source.mkdir() if is_folder else source.touch()
    if in_the_way == "folder":
        target.mkdir()
        (target / "decode.worker.json").touch()
    elif in_the_way == "file":
        target.touch()
    put_in_place(source, target)
    assert target.is_dir() is is_folder
    assert not source.exists()
    assert not target.is_dir() or not list(target.iterdir())


def test_durations_have_units() -> None:
    assert [parse_duration_s(text) for text in ("60s", "30m", "2h", "1.5")] == [60.0, 1800.0, 7200.0, 1.5]
    for text in ("", "0", "5d", "-3s"):
        with pytest.raises(ConfigError, match="duration"):
            parse_duration_s(text)


def test_a_store_is_named_by_host_port_and_bucket() -> None:
    store = parse_store("127.0.0.1:8333/kelp")
    assert (store.host, store.port, store.bucket) == ("127.0.0.1", 8333, "kelp")
    assert store.settings("http://relay")["object_tier.endpoint"] == "http://relay"
    for text in ("8333/kelp", "127.0.0.1:8333", "http://127.0.0.1:8333/kelp", ""):
        with pytest.raises(ConfigError, match="HOST:PORT/BUCKET"):
            parse_store(text)
