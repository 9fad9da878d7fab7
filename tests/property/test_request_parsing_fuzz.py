"""Whatever a client sends, the outcome is a request or a typed error."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kelp.core.errors import InvalidRequest
from kelp.core.request import LlmRequest, parse_request
from kelp.core.request_limits import RequestLimits
from kelp.core.request_sampling import NUMBER_RANGES, VLLM_NAMES, VLLM_NEUTRAL
from kelp.core.schema_inputs import LLM_INPUTS
from support.request_bounds import assert_within

LIMITS = RequestLimits(max_request_bytes=2048, max_stop_words=3, max_word_bytes=8, max_name_bytes=8)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
SAMPLING_DOCUMENTS = st.dictionaries(
    st.sampled_from([*VLLM_NAMES, *VLLM_NEUTRAL]) | st.text(max_size=8), JSON_VALUES, max_size=4
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", ""]), "content": JSON_VALUES}), max_size=3
)
RAW_BYTES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    SAMPLING_DOCUMENTS.map(lambda document: json.dumps(document).encode()),
    (MESSAGES | JSON_VALUES).map(lambda document: json.dumps(document).encode()),
)
SHAPES = st.sampled_from([(1,), (1,), (1,), (0,), (2,), (5,), (), (1, 1), (2, 3)])
WELL_SHAPED = {spec.name: spec.datatype.numpy for spec in LLM_INPUTS}


@st.composite
def _arrays(draw, dtype):
    shape = draw(SHAPES)
    if dtype.kind == "O":
        array = np.empty(shape, dtype=object)
        for index in np.ndindex(*shape):
            array[index] = draw(RAW_BYTES | st.sampled_from([None, 5, "text"]))
        return array
    return draw(hnp.arrays(dtype, shape))


@st.composite
def _tensors(draw):
    names = draw(st.lists(st.sampled_from(sorted(WELL_SHAPED)), max_size=5, unique=True))
    tensors = {name: draw(_arrays(WELL_SHAPED[name])) for name in names}
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(["i8", "f8", "U3", "S3", "?", "M8[s]", "c16"]))
        tensors[draw(st.sampled_from(sorted(WELL_SHAPED)) | st.text(max_size=5))] = draw(_arrays(np.dtype(dtype)))
    return tensors


def _outcome(tensors, parameters):
    try:
        return parse_request(tensors, LIMITS, parameters)
    except InvalidRequest as error:
        return error


@settings(max_examples=150, deadline=None)
@given(_tensors(), st.dictionaries(st.sampled_from([*VLLM_NAMES, "other"]), JSON_VALUES, max_size=2))
def test_any_tensors_give_a_request_or_a_typed_error(tensors, parameters):
    outcome = _outcome(tensors, parameters)
    if isinstance(outcome, LlmRequest):
        assert_within(outcome, LIMITS)


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: hnp.arrays(WELL_SHAPED[name], (1,)) for name in NUMBER_RANGES}))
def test_a_prompt_with_any_numbers_gives_parameters_in_range_or_a_typed_error(numbers):
    tensors = {"text_input": np.array([b"a"], dtype=object), **numbers}
    outcome = _outcome(tensors, {})
    if isinstance(outcome, LlmRequest):
        assert_within(outcome, LIMITS)
    else:
        assert any(name in outcome.text for name in numbers)


@settings(max_examples=150, deadline=None)
@given(SAMPLING_DOCUMENTS)
def test_any_sampling_document_gives_a_request_or_an_error_that_names_it(document):
    raw = json.dumps(document).encode()
    tensors = {
        "text_input": np.array([b"a"], dtype=object),
        "sampling_parameters": np.array([raw], dtype=object),
    }
    outcome = _outcome(tensors, {})
    if isinstance(outcome, LlmRequest):
        assert_within(outcome, LIMITS)
    else:
        assert "sampling_parameters" in outcome.text
