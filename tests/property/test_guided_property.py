"""Whatever the guide and the logits: the output parses, with drafts or without, in one go or resumed."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kelp.core.guide_spec import GuideSpec
from kelp.core.messages import SamplingParams
from kelp.core.types import FinishReason
from kelp.executor.batching.guided import GrammarGuide
from support.examples import examples
from support.guided import GuidedAnswer, GuidedBench

MAX_TOKENS = 3000
NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=4)

scalars: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-50, 50), st.integers(0, 500)).map(
        lambda bounds: {"type": "integer", "minimum": bounds[0], "maximum": bounds[0] + bounds[1]}
    ),
    st.integers(0, 5).map(lambda length: {"type": "string", "maxLength": length}),
    st.lists(NAMES, min_size=1, max_size=4, unique=True).map(lambda names: {"enum": names}),
)


def _containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.tuples(inner, st.integers(0, 3)).map(
        lambda parts: {"type": "array", "items": parts[0], "maxItems": parts[1]}
    )
    return st.one_of(arrays, st.dictionaries(NAMES, inner, max_size=3).map(_object))


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


schemas = st.dictionaries(NAMES, st.recursive(scalars, _containers, max_leaves=5), max_size=3).map(_object)

_CLASSES = ["[a-z]", "[0-9]", "[^x]", "\\d", "[äé]", "."]
_atoms = st.one_of(st.sampled_from(_CLASSES), st.text("ab1é_ ", min_size=1, max_size=3).map(re.escape))
regexes = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.integers(0, 2), st.integers(1, 4)).map(lambda p: f"({p[0]}){{{p[1]},{p[1] + p[2]}}}"),
    ),
    max_leaves=5,
).filter(lambda pattern: re.fullmatch(pattern, "") is None)

choices = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=6, unique=True
)


def guide_specs() -> st.SearchStrategy[GuideSpec]:
    return st.one_of(
        st.tuples(schemas, st.booleans()).map(
            lambda pair: GuideSpec(kind="json_schema", text=json.dumps(pair[0]), is_compact=pair[1])
        ),
        regexes.map(lambda pattern: GuideSpec(kind="regex", text=pattern)),
        choices.map(lambda texts: GuideSpec(kind="choice", choices=tuple(texts))),
    )


def _conforms(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "array":
        is_short = isinstance(value, list) and len(value) <= schema["maxItems"]
        return is_short and all(_conforms(item, schema["items"]) for item in value)
    if kind == "object":
        properties = schema["properties"]
        is_whole = isinstance(value, dict) and set(value) == set(properties)
        return is_whole and all(_conforms(value[name], part) for name, part in properties.items())
    return value is None if kind == "null" else isinstance(value, bool)


def _matches(text: str, guide: GuideSpec) -> bool:
    if guide.kind == "choice":
        return text in guide.choices
    if guide.kind == "regex":
        return re.fullmatch(guide.text, text) is not None
    return _conforms(json.loads(text), json.loads(guide.text))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> GuidedBench:
    return GuidedBench(tmp_path_factory.mktemp("vocabulary"))


def _output(answer: GuidedAnswer) -> list[int]:
    assert answer.reason is FinishReason.STOP
    return answer.token_ids


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        min_tokens=draw(st.sampled_from([0, 1, 40])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 1, 5])),
        top_p=draw(st.sampled_from([1.0, 0.5])),
        seed=draw(st.integers(0, 99)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        bad_words_ids=draw(st.sampled_from([(), ((65,), (12,), (5, 6))])),
        ignore_eos=draw(st.booleans()),
        guide=draw(guide_specs()),
    )


@given(samplings())
@settings(max_examples=examples(25), deadline=None)
def test_the_output_always_parses(bench: GuidedBench, sampling: SamplingParams) -> None:
    assert sampling.guide is not None
    output = _output(bench.run(sampling))
    assert max(output) < bench.num_known
    text = bench.text(output)
    # The guide knows digits and letters that this Python's older Unicode does not, so `re` cannot judge them.
    assume(all(unicodedata.category(character) != "Cn" for character in text))
    assert _matches(text, sampling.guide), text


@given(samplings(), st.floats(0, 1), st.integers(0, 6))
@settings(max_examples=examples(15), deadline=None)
def test_a_run_resumed_after_any_token_ends_like_the_uninterrupted_one(
    bench: GuidedBench, sampling: SamplingParams, share: float, num_drafts: int
) -> None:
    whole = _output(bench.run(sampling))
    num_done = int(share * (len(whole) - 1))
    assert whole[:num_done] + _output(bench.run(sampling, whole[:num_done], num_drafts)) == whole


@given(samplings(), st.integers(1, 6))
@settings(max_examples=examples(15), deadline=None)
def test_drafts_change_nothing(bench: GuidedBench, sampling: SamplingParams, num_drafts: int) -> None:
    assert bench.run(sampling, num_drafts=num_drafts).token_ids == bench.run(sampling).token_ids


@given(guide_specs(), st.integers(0, 99), st.data())
@settings(max_examples=examples(15), deadline=None)
def test_a_mask_after_drafts_is_the_mask_after_those_tokens(
    bench: GuidedBench, spec: GuideSpec, seed: int, data: st.DataObject
) -> None:
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed, guide=spec)
    output = _output(bench.run(sampling))
    first = data.draw(st.integers(0, len(output) - 1))
    draft = output[first : first + data.draw(st.integers(0, 5))]
    wrong = data.draw(st.lists(st.integers(0, bench.num_known - 1), max_size=2))
    guide, walker = GrammarGuide(bench.compiler.compile(spec)), GrammarGuide(bench.compiler.compile(spec))
    for token_id in output[:first]:
        guide.accept(token_id)
        walker.accept(token_id)
    masks = [mask.copy() for mask in guide.allowed([*draft, *wrong])]
    for index, mask in enumerate(masks):
        assert not walker.is_finished
        (expected,) = walker.allowed(())
        assert np.array_equal(mask, expected)
        if index + 1 < len(masks):
            walker.accept([*draft, *wrong][index])
    (again,) = guide.allowed(())
    assert np.array_equal(again, masks[0])
