"""A conversation is a non-empty JSON list of messages with a role and text."""

from __future__ import annotations

import json

import pytest

from kelp.core.chat_messages import parse_messages
from kelp.core.errors import InvalidRequest, NotSupported


def test_messages_keep_order_and_further_keys():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "Ann"}]
    assert parse_messages(json.dumps(messages)) == messages


def test_text_parts_are_joined_by_line_ends():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages(json.dumps([{"role": "user", "content": parts}]))[0]["content"] == "a\nb"


def test_an_assistant_message_with_tool_calls_needs_no_content():
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert parse_messages(json.dumps(messages))[0]["content"] == ""


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "messages: not JSON"), ("[", "messages: not JSON"), ("[" * 100_000, "messages: not JSON"),
        ('[{"role": "user", "content": "\\ud800"}]', "messages: not JSON"), ("{}", "messages: "),
        ("null", "messages: "), ("[]", "messages: "), ('"hi"', "messages: "), ("[1]", "messages[0]: "),
        ('[{"content": "a"}]', "messages[0].role"), ('[{"role": 5, "content": "a"}]', "messages[0].role"),
        ('[{"role": "", "content": "a"}]', "messages[0].role"), ('[{"role": "user"}]', "messages[0].content"),
        ('[{"role": "user", "content": null}]', "messages[0].content"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": 5}]', "messages[1].content"),
        ('[{"role": "user", "content": ["a"]}]', "messages[0].content[0]"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "messages[0].content[0].text"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_its_place(text, place):
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(text)
    assert caught.value.text.startswith(place)


def test_an_image_part_is_not_supported():
    parts = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(NotSupported, match=r"messages\[0\]\.content\[0\]\.type: 'image_url'"):
        parse_messages(json.dumps([{"role": "user", "content": parts}]))
