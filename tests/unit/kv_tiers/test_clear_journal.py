from __future__ import annotations

from pathlib import Path

import pytest

from kelp.core.types import Tier
from kelp.kv.tiers.clears import LOWER_TIERS, ClearJournal, OwedClear

ONE = OwedClear(b"a" * 16, frozenset({Tier.DISK, Tier.OBJECT}))
ALL = OwedClear(None, LOWER_TIERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clears"


def test_what_is_owed_is_found_by_the_next_process(path: Path) -> None:
    assert ClearJournal(path).load() == []
    ClearJournal(path).save([ONE, ALL, ONE])
    assert sorted(ClearJournal(path).load(), key=str) == sorted([ONE, ALL], key=str)


def test_nothing_owed_leaves_no_file(path: Path) -> None:
    journal = ClearJournal(path)
    journal.save([])
    journal.save([ONE])
    journal.save([])
    assert list(path.parent.iterdir()) == []


def test_a_process_killed_while_it_writes_leaves_what_was_owed_before(path: Path) -> None:
    ClearJournal(path).save([ONE])
    path.with_name("clears.new").write_text("kelp-kv-clears-1\n*")
    assert ClearJournal(path).load() == [ONE]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-3],
        lambda raw: raw.replace(b"disk", b"dusk"),
        lambda raw: raw.replace(b"61", b"6", 1),
        lambda raw: b"",
        lambda raw: b"\xff" + raw,
        lambda raw: raw.split(b"\n", 2)[0] + b"\n1\n",
    ],
)
def test_a_journal_that_cannot_be_read_stands_for_everything(path: Path, damage) -> None:
    ClearJournal(path).save([ONE])
    path.write_bytes(damage(path.read_bytes()))
    assert ClearJournal(path).load() == [ALL]


def test_what_cannot_be_written_down_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        ClearJournal(tmp_path / "gone" / "clears").save([ONE])
