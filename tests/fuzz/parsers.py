"""What a fuzzer feeds: a parser of what somebody else says, grouped into families that share one campaign.

A parser may refuse by the typed errors that it documents, and in no other way. The first byte of an input selects the
parser within its family, the rest is what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kelp.core.errors import KelpError, ProtocolError

Form = Literal["json", "msgpack", "bytes"]
"""How valid input is written: what the mutator takes apart to change a field instead of a byte."""
_VARIABLE = re.compile(r"""'[^']*'|"[^"]*"|[0-9]+""")
_MAX_REFUSAL_CHARS = 120


class WrongOutcome(AssertionError):
    """A parser accepted or refused, but what it gave cannot be used."""


@dataclass(frozen=True)
class Parser:
    """One parser.

    Attributes:
        parse: Takes the bytes; what it returns only shows the fuzzer whether it has seen such a thing before.
        seeds: Valid examples.
        refusals: What it may raise.
        memory_factor: Times the length of its input that it may take, beside a constant.
    """

    name: str
    parse: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    form: Form = "bytes"
    refusals: tuple[type[KelpError], ...] = (ProtocolError,)
    memory_factor: int = 4

    def outcome(self, body: bytes) -> str:
        """A short name of what the parser made of `body`, the same for inputs of the same kind.

        Raises:
            Exception: Anything that is no documented refusal: a finding.
        """
        try:
            return shape(self.parse(body))
        except self.refusals as error:
            check_text(error.text)
            told = _VARIABLE.sub("#", error.text[: 2 * _MAX_REFUSAL_CHARS])[:_MAX_REFUSAL_CHARS]
            return f"{type(error).__name__}: {told}"


@dataclass(frozen=True)
class Family:
    """Parsers that one fuzzing process runs."""

    name: str
    parsers: tuple[Parser, ...]
    instrumented: tuple[str, ...] = field(default=("kelp",))

    def parser(self, data: bytes) -> Parser:
        """Whom an input is for."""
        return self.parsers[data[0] % len(self.parsers)]

    def run(self, data: bytes) -> str:
        """See `Parser.outcome`; empty input is for nobody."""
        if not data:
            return ""
        parser = self.parser(data)
        return f"{parser.name}: {parser.outcome(data[1:])}"

    @property
    def seeds(self) -> list[bytes]:
        """All seeds, as inputs."""
        return [bytes([index]) + seed for index, parser in enumerate(self.parsers) for seed in parser.seeds]


def check_text(text: str) -> None:
    """Whoever sends or logs it must be able to.

    Raises:
        WrongOutcome: It has no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WrongOutcome(f"text that nobody can send: {error}") from None


class Label(str):
    """A result that names itself."""


def shape(value: object, depth: int = 2) -> str:
    """Types and magnitudes of a value, cut at a depth: what tells one kind of result from another."""
    if isinstance(value, Label):
        return value[:_MAX_REFUSAL_CHARS]
    if isinstance(value, str | bytes):
        return f"{type(value).__name__}{len(value).bit_length() // 4}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"i{value.bit_length() // 16}"
    if isinstance(value, list | tuple | dict | frozenset | set):
        items = [*value.values()] if isinstance(value, dict) else [*value]
        inner = ",".join(sorted({shape(item, depth - 1) for item in items[:16]})) if depth else ""
        return f"{type(value).__name__}{len(items).bit_length() // 3}({inner})"
    fields = getattr(value, "__struct_fields__", None) or getattr(type(value), "model_fields", None)
    if fields is None or not depth:
        return str(value) if isinstance(value, bool) else type(value).__name__
    return f"{type(value).__name__}({','.join(shape(getattr(value, name), depth - 1) for name in fields)})"
