"""The guide of a request, from either spelling: TensorRT-LLM's two tensors, or vLLM's object.

Knows how clients write it down, not what a schema or a grammar means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from pydantic_core import from_json

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.guide_spec import MAX_CHOICES, MAX_GUIDE_BYTES, GuideSpec
from kelp.core.request_limits import check_text_bytes, short_repr
from kelp.core.request_values import Given, read_bool

GUIDE_TENSORS = ("guided_decoding_guide_type", "guided_decoding_guide")
GUIDE_OBJECTS = ("structured_outputs", "guided_decoding")
"""Keys of vLLM's SamplingParams: the newer and the older name of the same object."""

_TYPE, _GUIDE = GUIDE_TENSORS
_NEUTRAL_OPTIONS = (
    "whitespace_pattern",
    "disable_fallback",
    "disable_additional_properties",
    "structural_tag",
    "backend",
    "_backend",
    "_backend_was_auto",
)
"""Of vLLM's object; kelp acts upon none of them, so they must ask for nothing."""


def read_guide(given: Mapping[str, Given]) -> GuideSpec | None:
    """The guide among the values of a request; None if there is none.

    Raises:
        InvalidRequest: It is malformed, too large, or given twice; names the field.
        NotSupported: It is of a kind that kelp does not know.
    """
    tensors = _read_tensors(given)
    found = [(_TYPE, tensors)] if tensors is not None else []
    for name in GUIDE_OBJECTS:
        if name in given:
            guide = _read_object(given[name])
            if guide is not None:
                found.append((given[name].field, guide))
    if len(found) > 1:
        raise InvalidRequest(f"{found[1][0]}: given beside {found[0][0]}, a request has one guide")
    return found[0][1] if found else None


def _read_tensors(given: Mapping[str, Given]) -> GuideSpec | None:
    absent = Given("", "")
    kind, text = given.get(_TYPE, absent).value, given.get(_GUIDE, absent).value
    if kind == "":
        if text != "":
            raise InvalidRequest(f"{_GUIDE}: given without {_TYPE}")
        return None
    if kind == "json":
        if text != "":
            raise InvalidRequest(f"{_GUIDE}: given with {_TYPE} json, which takes none; schemas are json_schema")
        return GuideSpec(kind="json")
    if kind == "structural_tag":
        raise NotSupported(f"{_TYPE}: 'structural_tag' asks for something this server does not do")
    read = {"json_schema": _schema, "regex": _regex, "ebnf_grammar": _grammar}.get(str(kind))
    if read is None:
        raise InvalidRequest(
            f"{_TYPE}: {short_repr(kind)} given, must be json, json_schema, regex, ebnf_grammar or empty"
        )
    return read(_GUIDE, text)


def _read_object(given: Given) -> GuideSpec | None:
    document = given.value
    if isinstance(document, str):
        document = _parse(given.field, document) if document else {}
    if not isinstance(document, dict):
        raise InvalidRequest(f"{given.field}: {short_repr(document)} given, must be a JSON object")
    values = {str(key): value for key, value in document.items() if value not in (None, "", False)}
    is_compact = read_bool(f"{given.field}.disable_any_whitespace", values.pop("disable_any_whitespace", False))
    for name in values:
        if name in _NEUTRAL_OPTIONS:
            raise NotSupported(f"{given.field}.{name}: {short_repr(values[name])} is not supported")
        if name not in _KINDS:
            raise InvalidRequest(f"{given.field}.{short_repr(name)[1:-1]}: no such kind of guide")
    if len(values) > 1:
        raise InvalidRequest(f"{given.field}: {', '.join(values)} given, a guide has one kind")
    for name, value in values.items():
        guide = _KINDS[name](f"{given.field}.{name}", value)
        return guide.model_copy(update={"is_compact": is_compact and guide.kind in ("json", "json_schema")})
    return None


def _parse(field: str, text: str) -> object:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"{field}: not JSON: {error}") from None


def _text(field: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{field}: {short_repr(value)} given, must be text that is not empty")
    check_text_bytes(field, value, MAX_GUIDE_BYTES)
    return value


def _any_object(field: str, value: object) -> GuideSpec:
    if not read_bool(field, value):
        raise InvalidRequest(f"{field}: {short_repr(value)} given, must be true or absent")
    return GuideSpec(kind="json")


def _schema(field: str, value: object) -> GuideSpec:
    text = _text(field, json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value)
    if not isinstance(_parse(field, text), dict):
        raise InvalidRequest(f"{field}: {short_repr(text)} given, must be a JSON object")
    return GuideSpec(kind="json_schema", text=text)


def _regex(field: str, value: object) -> GuideSpec:
    return GuideSpec(kind="regex", text=_text(field, value))


def _grammar(field: str, value: object) -> GuideSpec:
    return GuideSpec(kind="grammar", text=_text(field, value))


def _choice(field: str, value: object) -> GuideSpec:
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"{field}: {short_repr(value)} given, must be a list of texts")
    if len(value) > MAX_CHOICES:
        raise InvalidRequest(f"{field}: {len(value)} entries exceed the limit of {MAX_CHOICES}")
    choices = tuple(_text(f"{field}[{index}]", choice) for index, choice in enumerate(value))
    if not choices:
        raise InvalidRequest(f"{field}: empty, must name at least one choice")
    check_text_bytes(field, "".join(choices), MAX_GUIDE_BYTES)
    return GuideSpec(kind="choice", choices=tuple(dict.fromkeys(choices)))


_KINDS: dict[str, Callable[[str, object], GuideSpec]] = {
    "json": _schema,
    "json_object": _any_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
