"""What a fuzzing process takes for a finding, and what for an outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import process
from fuzz.parsers import Family, Parser, WrongOutcome, check_text, shape
from fuzz.process import Notebook, Watched


def _faulty(data: bytes) -> str:
    if data == b"slow":
        process.SLOW_S = -1.0
    if data == b"value":
        raise ValueError("a fault")
    if data == b"key":
        raise KeyError("another")
    return "fine"


def _noted(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.glob("finding-*.bin"))


def test_each_kind_of_fault_is_noted_once_with_its_input(tmp_path: Path) -> None:
    outcomes: list[str] = []
    watched = Watched(_faulty, Notebook(tmp_path), outcomes.append)
    for data in (b"fine", b"value", b"key", b"value"):
        watched(data)
    assert _noted(tmp_path) == [b"key", b"value"]
    assert any("ValueError: a fault" in path.read_text() for path in tmp_path.glob("finding-*.txt"))
    assert [outcome.split()[0] for outcome in outcomes] == ["fine", "ValueError", "KeyError", "ValueError"]


def test_what_takes_too_long_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SLOW_S", 60.0)
    watched = Watched(_faulty, Notebook(tmp_path), lambda _: None)
    watched(b"fine")
    assert not _noted(tmp_path)
    watched(b"slow")
    assert _noted(tmp_path) == [b"slow"]


def test_what_takes_more_memory_than_its_length_allows_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([0, 0, process.GROWTH_BYTES, 2 * process.GROWTH_BYTES + 4 * process.GROWTH_PER_BYTE + 1])
    monkeypatch.setattr(process, "_peak_bytes", lambda: next(peaks))
    watched = Watched(_faulty, Notebook(tmp_path), lambda _: None)
    for data in (b"none", b"fair", b"huge"):
        watched(data)
    assert _noted(tmp_path) == [b"huge"]


def test_an_error_that_nobody_can_send_is_a_fault() -> None:
    with pytest.raises(WrongOutcome, match="nobody can send"):
        check_text("\ud800")


def test_only_what_a_parser_documents_is_a_refusal() -> None:
    def parse(raw: bytes) -> object:
        return int(raw)

    family = Family("numbers", (Parser("number", parse, (b"1",)),))
    assert family.run(b"\x001") == "number: i0"
    with pytest.raises(ValueError, match="invalid literal"):
        family.run(b"\x00x")


def test_results_of_one_kind_have_one_shape() -> None:
    assert shape([1, 2]) == shape([3, 4]) != shape(["a", "b"])
    assert shape({"a": b"x"}) == shape({"b": b"y"}) != shape({"a": 1})
