"""Reading single loosely typed values: a tensor's scalar, a JSON number, or a number in a string.

Stock clients of the vLLM backend send `{"temperature": "0.1"}`. Each reader names the field, the value and the
limit when it refuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from kelp.core.errors import InvalidRequest
from kelp.core.request_limits import RequestLimits, check_text_bytes, short_repr

_MAX_NUMBER_CHARS = 64
_BOOLS: dict[object, bool] = {"true": True, "false": False, "1": True, "0": False}


class Given(NamedTuple):
    """A value with the name under which the client gave it."""

    field: str
    value: object


@dataclass(frozen=True, slots=True)
class NumberRange:
    """What a number may be; finite in any case."""

    minimum: float
    maximum: float
    is_integer: bool = False
    excludes_minimum: bool = False

    def __str__(self) -> str:
        """The range as an error message shows it."""
        kind = "an integer" if self.is_integer else "a finite number"
        lower = f"above {self.minimum:g}" if self.excludes_minimum else f"from {self._show(self.minimum)}"
        return f"must be {kind} {lower} to {self._show(self.maximum)}"

    def _show(self, bound: float) -> str:
        return str(int(bound)) if self.is_integer else f"{bound:g}"

    def contains(self, number: float) -> bool:
        """Whether `number` lies inside."""
        is_above = number > self.minimum if self.excludes_minimum else number >= self.minimum
        return is_above and number <= self.maximum


def _parse_number(value: object) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if not isinstance(value, str) or len(value) > _MAX_NUMBER_CHARS or "_" in value:
        return None
    for parse in (int, float):
        try:
            return parse(value)
        except ValueError:
            continue
    return None


def read_number(field: str, value: object, allowed: NumberRange) -> int | float:
    """`value` as a number of the range's kind.

    Raises:
        InvalidRequest: Not a number, not finite, not whole where it must be, or out of range.
    """
    number = _parse_number(value)
    if isinstance(number, float):
        is_whole = math.isfinite(number) and number.is_integer()
        if allowed.is_integer:
            number = int(number) if is_whole else None
        elif not math.isfinite(number):
            number = None
    if number is None or not allowed.contains(number):
        raise InvalidRequest(f"{field}: {short_repr(value)} given, {allowed}")
    return number if allowed.is_integer else float(number)


def read_bool(field: str, value: object) -> bool:
    """`value` as a truth value: a bool, 0, 1, or one of them as text.

    Raises:
        InvalidRequest: Anything else.
    """
    if isinstance(value, bool):
        return value
    known = _BOOLS.get(str(value).lower()) if isinstance(value, int | str) else None
    if known is None:
        raise InvalidRequest(f"{field}: {short_repr(value)} given, must be true or false")
    return known


def _as_list(field: str, value: object, limits: RequestLimits) -> list[object]:
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"{field}: {short_repr(value)} given, must be a list")
    if len(value) > limits.max_stop_words:
        raise InvalidRequest(f"{field}: {len(value)} entries exceed the limit of {limits.max_stop_words}")
    return list(value)


def read_words(field: str, value: object, limits: RequestLimits) -> tuple[str, ...]:
    """`value`, one string or a list of them, without the empty ones that HTTP clients send for "none".

    Raises:
        InvalidRequest: Not text, too many entries, or one that is too long.
    """
    words: list[str] = []
    for index, word in enumerate(_as_list(field, [value] if isinstance(value, str) else value, limits)):
        if not isinstance(word, str):
            raise InvalidRequest(f"{field}[{index}]: {short_repr(word)} given, must be text")
        check_text_bytes(f"{field}[{index}]", word, limits.max_word_bytes)
        if word:
            words.append(word)
    return tuple(dict.fromkeys(words))


def read_name(field: str, value: object, limits: RequestLimits) -> str:
    """`value` as the name of something; empty for nothing.

    Raises:
        InvalidRequest: Not text, or too long.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{field}: {short_repr(value)} given, must be text")
    check_text_bytes(field, value, limits.max_name_bytes)
    return value


def read_token_ids(field: str, value: object, limits: RequestLimits) -> tuple[int, ...]:
    """`value` as a list of token ids; whether the model has them is for `preprocess` to say.

    Raises:
        InvalidRequest: Not a list of integers from 0 to 2**31 - 1, or too many of them.
    """
    allowed = NumberRange(0, 2**31 - 1, is_integer=True)
    ids = [
        int(read_number(f"{field}[{index}]", item, allowed))
        for index, item in enumerate(_as_list(field, value, limits))
    ]
    return tuple(dict.fromkeys(ids))
