"""TensorRT-LLM's tensors and vLLM's objects say the same about guides."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.guide_spec import MAX_CHOICES, MAX_GUIDE_BYTES, GuideSpec
from kelp.core.messages import SamplingParams
from kelp.core.request_limits import RequestLimits
from kelp.core.request_sampling import read_sampling

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


def _guide(document=None, parameters=None, **inputs) -> GuideSpec | None:
    if document is not None:
        inputs["sampling_parameters"] = json.dumps(document)
    return read_sampling(inputs, parameters or {}, RequestLimits()).params.guide


def _tensors(kind: str, text: str = "") -> GuideSpec | None:
    return _guide(guided_decoding_guide_type=kind, guided_decoding_guide=text)


@pytest.mark.parametrize(
    ("kind", "text", "document"),
    [
        ("json", "", {"json_object": True}),
        ("json_schema", json.dumps(SCHEMA), {"json": SCHEMA}),
        ("json_schema", json.dumps(SCHEMA), {"json": json.dumps(SCHEMA)}),
        ("regex", "[0-9]+", {"regex": "[0-9]+"}),
        ("ebnf_grammar", 'root ::= "a"', {"grammar": 'root ::= "a"'}),
    ],
)
def test_both_spellings_become_the_same_guide(kind, text, document):
    guide = _tensors(kind, text)
    assert guide is not None
    assert _guide({"structured_outputs": document}) == guide
    assert _guide({"guided_decoding": document}) == guide
    assert _guide({"structured_outputs": json.dumps(document)}) == guide


def test_choices_keep_their_order_and_lose_their_doubles():
    guide = _guide({"structured_outputs": {"choice": ["yes", "no", "yes"]}})
    assert guide == GuideSpec(kind="choice", choices=("yes", "no"))


def test_a_schema_keeps_the_order_of_its_properties():
    guide = _guide({"structured_outputs": {"json": SCHEMA}})
    assert guide is not None and guide.text.index('"b"') < guide.text.index('"a"')


def test_white_space_between_json_tokens_can_be_forbidden():
    guide = _guide({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}})
    assert guide is not None and guide.is_compact


@pytest.mark.parametrize("nothing", ["", "{}", {}, {"json": None}, {"json_object": False, "regex": ""}])
def test_an_object_that_asks_for_nothing_is_no_guide(nothing):
    assert _guide({"structured_outputs": nothing}) is None


def test_empty_tensors_are_no_guide():
    assert _tensors("", "") is None


def test_a_request_parameter_may_hold_the_object_as_text():
    assert _guide(parameters={"structured_outputs": '{"regex": "a"}'}) == GuideSpec(kind="regex", text="a")


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"guided_decoding_guide": "{}"}, "guided_decoding_guide: given without guided_decoding_guide_type"),
        ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide: '' given"),
        ({"guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"}, "guided_decoding_guide: given with"),
        ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type: 'xml' given"),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"}, "guide: not JSON"),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "[]"}, "guided_decoding_guide: '[]'"),
        ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a" * 65537}, "limit of 65536"),
    ],
)  # fmt: skip
def test_malformed_tensors_are_refused_by_name(inputs, named):
    with pytest.raises(InvalidRequest) as caught:
        _guide(**inputs)
    assert named in caught.value.text


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("{", "structured_outputs: not JSON"), ("[]", "structured_outputs: []"), (5, "structured_outputs: 5"),
        ({"json": "{"}, "structured_outputs.json: not JSON"), ({"json": 5}, "structured_outputs.json: 5"),
        ({"json": [1]}, "structured_outputs.json: [1]"), ({"regex": 5}, "structured_outputs.regex: 5"),
        ({"choice": "a"}, "structured_outputs.choice: 'a'"), ({"choice": []}, "structured_outputs.choice: empty"),
        ({"choice": ["a", 1]}, "structured_outputs.choice[1]: 1"), ({"choice": ["", "a"]}, "choice[0]: ''"),
        ({"choice": [str(index) for index in range(MAX_CHOICES + 1)]}, "limit of 1024"),
        ({"choice": [f"{index}{'x' * 100}" for index in range(1000)]}, "limit of 65536"),
        ({"json_object": "maybe"}, "structured_outputs.json_object"), ({"xml": "a"}, "structured_outputs.xml: no such"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs: regex, choice given"),
        ({"regex": "a", "disable_any_whitespace": "maybe"}, "structured_outputs.disable_any_whitespace"),
    ],
)  # fmt: skip
def test_a_malformed_object_is_refused_by_name(value, named):
    with pytest.raises(InvalidRequest) as caught:
        _guide({"structured_outputs": value})
    assert f"sampling_parameters.{named}" in caught.value.text or named in caught.value.text


@pytest.mark.parametrize("option", ["whitespace_pattern", "structural_tag", "backend"])
def test_an_option_that_kelp_does_not_follow_is_refused_by_name(option):
    with pytest.raises(NotSupported, match=rf"structured_outputs\.{option}: "):
        _guide({"structured_outputs": {"regex": "a", option: "x"}})


@pytest.mark.parametrize(
    "second",
    [
        {"document": {"structured_outputs": {"regex": "a"}, "guided_decoding": {"regex": "a"}}},
        {"document": {"structured_outputs": {"regex": "a"}}, "guided_decoding_guide_type": "json"},
    ],
)
def test_two_guides_contradict_each_other(second):
    with pytest.raises(InvalidRequest, match="given beside .*, a request has one guide"):
        _guide(**second)


def test_a_guide_survives_the_wire():
    params = SamplingParams(guide=GuideSpec(kind="choice", choices=("é", "b")))
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "regex"}, {"kind": "json", "text": "{}"}, {"kind": "choice"}, {"kind": "choice", "choices": [""]},
        {"kind": "regex", "text": "a", "choices": ["b"]}, {"kind": "regex", "text": "a", "is_compact": True},
        {"kind": "regex", "text": "é" * MAX_GUIDE_BYTES}, {"kind": "tree", "text": "a"}, {"kind": "json", "more": 1},
    ],
)  # fmt: skip
def test_a_peers_guide_is_input_like_a_clients(fields):
    with pytest.raises(ValidationError):
        GuideSpec.model_validate(fields)
