"""From tensors to plain Python values: names, types, shapes, sizes and UTF-8 of `llm`'s inputs.

What the values mean is decided in `core.request` and `core.request_sampling`; this module knows the schema only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.request_limits import RequestLimits, short_repr
from kelp.core.schema_inputs import LLM_INPUTS_BY_NAME
from kelp.core.schema_types import Datatype, InputUse, TensorSpec

Array = npt.NDArray[Any]
InputValue = bool | int | float | str | tuple[str, ...] | npt.NDArray[np.int32]

_BYTES_LENGTH_PREFIX = 4
_DTYPES = {name: spec.datatype.numpy for name, spec in LLM_INPUTS_BY_NAME.items()}
_ALIASES = frozenset(name for name, spec in LLM_INPUTS_BY_NAME.items() if spec.alias_of)


def _wire_bytes(name: str, array: Array) -> int:
    if array.dtype != object:
        return int(array.nbytes)
    total = 0
    for element in array.flat:
        if not isinstance(element, bytes):
            raise InvalidRequest(f"{name}: elements must be bytes, not {type(element).__name__}")
        total += len(element) + _BYTES_LENGTH_PREFIX
    return total


def _check_type_and_shape(spec: TensorSpec, array: Array) -> None:
    if array.dtype != _DTYPES[spec.name]:
        raise InvalidRequest(f"{spec.name}: datatype {array.dtype} given, {spec.datatype.value} expected")
    if array.shape == spec.dims:
        return
    fits = array.ndim == len(spec.dims) and all(
        wanted in (-1, given) for wanted, given in zip(spec.dims, array.shape, strict=True)
    )
    is_empty_where_allowed = array.size == 0 and spec.use is InputUse.NEUTRAL_ONLY
    if not fits and not is_empty_where_allowed:
        raise InvalidRequest(f"{spec.name}: shape {list(array.shape)} given, {list(spec.dims)} expected")


def _decode(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: invalid UTF-8 at byte {error.start} of {len(raw)}: {error.reason}") from None


def _check_neutral(spec: TensorSpec, array: Array) -> None:
    wanted = {value.encode() if isinstance(value, str) else value for value in spec.neutral}
    for element in array.flat:
        plain = element.item() if isinstance(element, np.generic) else element
        if plain not in wanted:
            raise NotSupported(f"{spec.name}: {short_repr(plain)} asks for something this server does not do")


def _read(spec: TensorSpec, array: Array, limits: RequestLimits) -> InputValue:
    if spec.datatype is not Datatype.BYTES:
        if spec.is_scalar:
            value: bool | int | float = array.item()
            return value
        return np.array(array, dtype=np.int32)
    if spec.is_scalar:
        return _decode(spec.name, array.item())
    if array.size > limits.max_stop_words:
        raise InvalidRequest(f"{spec.name}: {array.size} entries exceed the limit of {limits.max_stop_words}")
    return tuple(_decode(spec.name, element) for element in array.flat)


def _resolve_aliases(values: dict[str, InputValue]) -> dict[str, InputValue]:
    if _ALIASES.isdisjoint(values):
        return values
    resolved = {name: value for name, value in values.items() if not LLM_INPUTS_BY_NAME[name].alias_of}
    for name, value in values.items():
        target = LLM_INPUTS_BY_NAME[name].alias_of
        if not target:
            continue
        if resolved.setdefault(target, value) != value:
            raise InvalidRequest(f"{name}: {value} contradicts {target}, its other name, which is {resolved[target]}")
    return resolved


def read_inputs(tensors: Mapping[str, Array], limits: RequestLimits) -> dict[str, InputValue]:
    """Plain values of the inputs that mean something, under their primary names.

    Scalars become `bool`, `int`, `float` or `str`, BYTES lists `tuple[str, ...]`, `input_ids` an own copy
    `[num_tokens] int32`. Values are checked for type, shape, size and encoding only.

    Raises:
        InvalidRequest: Unknown name, wrong type or shape, too large, not UTF-8; names the field.
        NotSupported: An input of another backend asks for something that kelp does not do.
    """
    sizes: dict[str, int] = {}
    for name, array in tensors.items():
        spec = LLM_INPUTS_BY_NAME.get(name)
        if spec is None:
            raise InvalidRequest(f"{short_repr(name)}: no such input of llm")
        _check_type_and_shape(spec, array)
        sizes[name] = _wire_bytes(name, array)
    total_bytes = sum(sizes.values())
    if total_bytes > limits.max_request_bytes:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InvalidRequest(
            f"{largest}: the request's {total_bytes} bytes exceed the limit of {limits.max_request_bytes}"
        )
    values: dict[str, InputValue] = {}
    for name, array in tensors.items():
        spec = LLM_INPUTS_BY_NAME[name]
        if spec.use is InputUse.NEUTRAL_ONLY:
            _check_neutral(spec, array)
        elif spec.use is not InputUse.NO_EFFECT:
            values[name] = _read(spec, array, limits)
    return _resolve_aliases(values)
