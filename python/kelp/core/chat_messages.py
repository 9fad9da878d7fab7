"""The conversation in a `messages` input: a JSON list of `{"role", "content"}` objects.

Roles and their order are for the model's chat template to judge; this module judges the form only.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.request_limits import short_repr

_MAX_ROLE_CHARS = 64


def _text_of_parts(field: str, parts: list[Any]) -> str:
    texts: list[str] = []
    for index, part in enumerate(parts):
        where = f"{field}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidRequest(f'{where}: {short_repr(part)} given, must be an object with a "type"')
        if part["type"] != "text":
            raise NotSupported(f"{where}.type: {short_repr(part['type'])} given, this server reads text only")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.text: {short_repr(part.get('text'))} given, must be text")
        texts.append(part["text"])
    return "\n".join(texts)


def _read_message(index: int, message: Any) -> dict[str, Any]:
    field = f"messages[{index}]"
    if not isinstance(message, dict):
        raise InvalidRequest(f'{field}: {short_repr(message)} given, must be {{"role", "content"}}')
    role = message.get("role")
    if not isinstance(role, str) or not 0 < len(role) <= _MAX_ROLE_CHARS:
        raise InvalidRequest(f"{field}.role: {short_repr(role)} given, must be text of 1 to {_MAX_ROLE_CHARS}")
    content = message.get("content")
    if isinstance(content, list):
        content = _text_of_parts(f"{field}.content", content)
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise InvalidRequest(f"{field}.content: {short_repr(content)} given, must be text")
    return {**message, "content": content}


def parse_messages(text: str) -> list[dict[str, Any]]:
    """The conversation, each `content` one string; other keys of a message are passed on to the template.

    Raises:
        InvalidRequest: Not JSON, not a non-empty list, or a message without role or content; names the place.
        NotSupported: A content part is not text.
    """
    try:
        document = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"messages: not JSON: {error}") from None
    if not isinstance(document, list) or not document:
        raise InvalidRequest(f"messages: {short_repr(document)} given, must be a non-empty list of messages")
    return [_read_message(index, message) for index, message in enumerate(document)]
