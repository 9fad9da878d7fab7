"""Where a request wants to be served: request parameters beside the tensors, checked.

Parameters, because no client of TensorRT-LLM's or vLLM's tensors knows them; over HTTP generate they are fields of the
body like the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from kelp.core.errors import InvalidRequest
from kelp.core.request_limits import RequestLimits, check_text_bytes, short_repr

WORKER, REQUIRED_TAGS, PREFERRED_TAGS = "kelp_worker", "kelp_require_tags", "kelp_prefer_tags"
EXPLAIN = "kelp_explain"
"""Asks for the decision about an earlier request, by its id, instead of an answer."""

_MAX_TAGS = 16


@dataclass(frozen=True, slots=True)
class RoutingWishes:
    """What a client says about where.

    Attributes:
        worker: Id or model name of the worker that must serve it; empty for any.
        required_tags: Tags that a worker must have, by name.
        preferred_tags: Tags that make a worker cheaper.
    """

    worker: str = ""
    required_tags: Mapping[str, str] = field(default_factory=dict)
    preferred_tags: Mapping[str, str] = field(default_factory=dict)


_NO_WISHES = RoutingWishes()


def read_wishes(parameters: Mapping[str, object], limits: RequestLimits) -> RoutingWishes:
    """Read the routing parameters of a request.

    Raises:
        InvalidRequest: A parameter is malformed; names it, its value and the limit.
    """
    if not parameters:
        return _NO_WISHES
    return RoutingWishes(
        worker=_text(parameters, WORKER, limits),
        required_tags=_tags(parameters, REQUIRED_TAGS, limits),
        preferred_tags=_tags(parameters, PREFERRED_TAGS, limits),
    )


def read_explained_id(parameters: Mapping[str, object], limits: RequestLimits) -> str | None:
    """The request whose decision is asked for, or None if the request is an ordinary one.

    Raises:
        InvalidRequest: The parameter is malformed or empty.
    """
    if EXPLAIN not in parameters:
        return None
    request_id = _text(parameters, EXPLAIN, limits)
    if not request_id:
        raise InvalidRequest(f"{EXPLAIN}: empty, must be the id of a request")
    return request_id


def _text(parameters: Mapping[str, object], name: str, limits: RequestLimits) -> str:
    value = parameters.get(name, "")
    if not isinstance(value, str):
        raise InvalidRequest(f"{name}: {short_repr(value)} given, must be a string")
    check_text_bytes(name, value, limits.max_name_bytes)
    return value


def _tags(parameters: Mapping[str, object], name: str, limits: RequestLimits) -> dict[str, str]:
    text = _text(parameters, name, limits).strip()
    tags = _json_tags(text, name, limits) if text.startswith("{") else _listed_tags(text, name)
    if len(tags) > _MAX_TAGS:
        raise InvalidRequest(f"{name}: {len(tags)} tags given, at most {_MAX_TAGS} are allowed")
    return tags


def _json_tags(text: str, name: str, limits: RequestLimits) -> dict[str, str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{name}: {short_repr(text)} is not a JSON object") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"{name}: {short_repr(text)} is not a JSON object")
    for key, value in document.items():
        field = f"{name}.{short_repr(key)[1:-1]}"
        if not (isinstance(value, str) and key and value):
            raise InvalidRequest(f"{field}: {short_repr(value)} given, a tag and its value are non-empty strings")
        # JSON may spell what no text can hold.
        check_text_bytes(field, key + value, limits.max_name_bytes)
    return document


def _listed_tags(text: str, name: str) -> dict[str, str]:
    tags: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not (key and separator and value):
            raise InvalidRequest(
                f"{name}: {short_repr(part)} given, must be tag=value, tag=value and so on, or a JSON object"
            )
        tags[key] = value
    return tags
