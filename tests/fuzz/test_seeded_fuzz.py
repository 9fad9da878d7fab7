"""A short, fixed campaign over all families: every example, a number of changed ones, and what claims to be huge."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from fuzz.families import FAMILIES
from fuzz.mutation import mutate

_NUM_CHANGED = 120
_STRANGERS = ("handshake", "sealed by a stranger")
"""Whose examples are refused, as they should be."""
_HEADS = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
"""MessagePack's longest arrays, maps, bytes, texts and extensions."""
_BOMBS: tuple[bytes, ...] = (
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 1_000_000,
    b"\x91" * 100_000,
    b"\x92\x02" * 100_000,
    *(head + length for head in _HEADS for length in (b"\xff" * 4, b"\0\1\0\0")),
)
_PARSERS = {parser.name: parser for family in FAMILIES.values() for parser in family.parsers}


def test_no_two_parsers_have_one_name() -> None:
    assert len(_PARSERS) == sum(len(family.parsers) for family in FAMILIES.values())


@pytest.mark.parametrize("name", [name for name in _PARSERS if name not in _STRANGERS])
def test_what_it_is_meant_for_is_read(name: str) -> None:
    _PARSERS[name].parse(_PARSERS[name].seeds[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_and_changed_ones_are_read_or_refused_by_a_typed_error(name: str) -> None:
    family, rng = FAMILIES[name], random.Random(1)
    inputs, seen = family.seeds, {family.run(seed) for seed in family.seeds}
    for seed in range(_NUM_CHANGED):
        data = mutate(family, rng.choice(inputs), seed)
        outcome = family.run(data)
        if outcome not in seen:
            seen.add(outcome)
            inputs.append(data)


@pytest.mark.parametrize("name", _PARSERS)
def test_what_claims_more_than_it_brings_takes_no_memory(name: str) -> None:
    parser = _PARSERS[name]
    valid = parser.seeds[0]
    raws = [head + bomb for head in (b"", valid[: len(valid) // 2], valid[:-1]) for bomb in _BOMBS]
    parser.outcome(valid)
    tracemalloc.start()
    try:
        for raw in raws:
            parser.outcome(raw)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < parser.memory_factor * max(map(len, raws)) + 2 * 1024 * 1024


def test_an_input_chooses_its_parser_by_its_first_byte() -> None:
    family = FAMILIES["kv_manager"]
    num_parsers = len(family.parsers)
    assert [family.parser(bytes([byte])) for byte in range(num_parsers)] == list(family.parsers)
    assert family.parser(bytes([num_parsers])) is family.parsers[0]
    assert family.run(b"") == ""


def test_a_change_can_be_made_again() -> None:
    for family in FAMILIES.values():
        assert mutate(family, family.seeds[0], 7) == mutate(family, family.seeds[0], 7)
