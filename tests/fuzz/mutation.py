"""Changes inputs: a field of a JSON or MessagePack document, also of one inside another, or bytes.

A coverage-guided fuzzer that only changes bytes seldom gets past a JSON parser; and pydantic's and msgspec's own code
is native, where its guide sees nothing.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from fuzz.parsers import Family, Form

ByteMutator = Callable[[bytes, random.Random], bytes]
_MAX_SLOTS = 400
_SWITCHES_IN = 20
"""One input in so many goes to another parser of its family."""
_HEADS = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9", b"\xdc", b"\xde")
"""MessagePack's longest arrays, maps, bytes, texts and extensions."""
_NESTS = (b"[", b'{"a":', b"\x91", b"\x81\xa1a")
_NUMBERS = [0, 1, -1, 2, 15, 16, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
            2**64 - 1, 2**64, -(2**31) - 1, -(2**63), -(2**63) - 1, 10**30, 10**400, 10**5000]  # fmt: skip
_FLOATS = [0.0, -0.0, 0.5, 1e-320, 1e18, 1e308, -1e308, float("inf"), float("-inf"), float("nan")]
_TEXTS = ["", " ", "\0", "\n", "a", "é", "\U0001f300", "\ud800", "\udfff", "w", "h:1", "[::1]:80", "h:99999", "0" * 32,
          "0" * 31, "true", "null", "1e999", "*", "..", "a" * 257, "b" * 513, "c" * 5000, "{", "[" * 1500, "%s", "kind",
          "op", "generate", "decode", "m", "r", "e", "cpu", "cuda:1",
          "cuda:x", "cuda:٣"]  # fmt: skip
_BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"\x80",
    b"\xed\xa0\x80",
    b"x" * 15,
    b"x" * 16,
    b"x" * 17,
    b"\0" * 8,
    b"{}",
    b"[]",
    b"\x90",
]
_EMPTY: list[Any] = [None, True, False, [], {}, [[]], {"": ""}]


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """One to four bytes or runs of them changed, cut, doubled or put in."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(7), rng.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            data[at : at + 5] = rng.choice(_HEADS) + rng.randbytes(4)
        elif kind == 4:
            data[at:at] = data[: rng.randint(0, 16)]
        elif kind == 5:
            data[at:at] = rng.choice(_NESTS) * rng.choice((50, 1500))
        elif at < len(data):
            data[at] = rng.choice((0, 0x7F, 0x80, 0xFF, 0xC1, 0x22, 0x5C, 0x7B))
    return bytes(data)


def mutate(family: Family, data: bytes, seed: int, change_bytes: ByteMutator = mutate_bytes) -> bytes:
    """Another input of a family; the same for the same seed.

    Args:
        change_bytes: Changes a body as bytes; libFuzzer's own where there is one.
    """
    rng = random.Random(seed)
    if not data or not rng.randrange(_SWITCHES_IN):
        data = rng.choice(family.seeds)
    parser, body = family.parser(data), data[1:]
    if rng.randrange(3):
        pool = [seed for other in family.parsers if other.form == parser.form for seed in other.seeds]
        changed = change_document(body, parser.form, rng, pool)
        if changed is not None:
            return data[:1] + changed
    return data[:1] + change_bytes(body, rng)


def change_document(raw: bytes, form: Form, rng: random.Random, pool: Sequence[bytes] = ()) -> bytes | None:
    """The document with one to three of its values changed; None if it is none."""
    document = _read(raw, form)
    if document is None:
        return None
    holder = [document]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(holder, rng, form, pool)
    return _written(holder[0], form)


def _read(raw: bytes, form: Form) -> Any:
    try:
        if form == "json":
            return json.loads(raw)
        return msgspec.msgpack.decode(raw) if form == "msgpack" else None
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return None


def _written(document: Any, form: Form) -> bytes | None:
    try:
        return json.dumps(document).encode() if form == "json" else msgspec.msgpack.encode(document)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _slots(holder: list[Any]) -> list[tuple[Any, Any]]:
    """Where values stand: container and key; the document itself is the first."""
    slots: list[tuple[Any, Any]] = [(holder, 0)]
    for container, key in slots:
        value = container[key]
        if isinstance(value, list):
            slots += [(value, index) for index in range(len(value))]
        elif isinstance(value, dict):
            slots += [(value, name) for name in value]
        if len(slots) > _MAX_SLOTS:
            break
    return slots


def _change(holder: list[Any], rng: random.Random, form: Form, pool: Sequence[bytes]) -> None:
    slots = _slots(holder)
    container, key = rng.choice(slots[1:] or slots)
    value = container[key]
    inner = _changed_inside(value, rng)
    if inner is not None:
        container[key] = inner
        return
    kind = rng.randrange(8)
    if kind == 0 and container is not holder:
        del container[key]
    elif kind == 1 and isinstance(container, list) and container is not holder:
        container[key:key] = [value] * rng.choice((1, 1, 2, 20, 300))
    elif kind == 2 and isinstance(container, dict):
        container[rng.choice(_TEXTS)] = _fresh(rng, form)
    elif kind == 3 and isinstance(container, dict):
        container[rng.choice([name for _, name in slots if isinstance(name, str)] or [""])] = container.pop(key)
    elif kind == 4 and pool:
        other = [_read(rng.choice(pool), form)]
        there, place = rng.choice(_slots(other))
        container[key] = there[place]
    elif kind == 5:
        there, place = rng.choice(slots)
        if there is not holder:
            container[key] = _written_again(there[place], form)
    else:
        container[key] = _near(value, rng) if rng.randrange(2) else _fresh(rng, form)


def _written_again(value: Any, form: Form) -> Any:
    """A copy, so that no document comes to hold itself."""
    raw = _written(value, form)
    return None if raw is None else _read(raw, form)


def _changed_inside(value: Any, rng: random.Random) -> Any:
    """A document inside a text or bytes, changed; None if there is none."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        changed = change_document(value.encode("utf-8", "replace"), "json", rng)
        return None if changed is None else changed.decode()
    if isinstance(value, bytes) and len(value) > 1 and rng.randrange(8):
        form: Form = "json" if value[:1] in (b"{", b"[") else "msgpack"
        return change_document(value, form, rng) if form == "json" or value[0] >= 0x80 else None
    return None


def _near(value: Any, rng: random.Random) -> Any:
    """Something of the same type, not far away."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value + rng.choice((1, -1, 255, 2**31, -value - 1))
    if isinstance(value, float):
        return value * rng.choice((-1, 0, 1e10, 1e-10))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(_TEXTS) + value[at + rng.randrange(2) :]
    return mutate_bytes(value, rng) if isinstance(value, bytes) else value


def _fresh(rng: random.Random, form: Form) -> Any:
    kinds: list[Sequence[Any]] = [_NUMBERS, _FLOATS, _TEXTS, _EMPTY]
    kind = rng.choice([*kinds, _BYTES] if form == "msgpack" else kinds)
    value = copy.deepcopy(rng.choice(kind))
    if not rng.randrange(12):
        for _ in range(rng.choice((3, 60, 500))):
            value = [value] if rng.randrange(2) else {"a": value}
    return value
