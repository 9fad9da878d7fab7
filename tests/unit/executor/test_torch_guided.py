"""Guides in the engine: what may come, when it ends, what is refused."""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from kelp.core.clock import SystemClock
from kelp.core.config import default_cache_folder
from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.guide_spec import GuideSpec
from kelp.core.messages import RequestUsage, SamplingParams
from kelp.core.preprocess_messages import PreprocessOptions
from kelp.core.request import Prompt
from kelp.core.types import FinishReason, KVLayout, Role
from kelp.executor.base import (
    Admitted,
    Completed,
    ExecutorEvent,
    ExecutorLimits,
    Failed,
    PoolMemory,
    Reserved,
    Tokens,
)
from kelp.executor.batching.batch import Chunk, Finished, Sampled, SamplePoint
from kelp.executor.batching.engine import EngineRules
from kelp.executor.batching.executor import BatchingExecutor, BatchingExecutorParts
from kelp.executor.batching.guided import GrammarGuide, start_guide
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.executor.torch.sampler import sample
from kelp.text.grammar import GrammarCompiler
from kelp.text.preprocess import Preprocessor
from support.guided import GuidedBench, NoiseRunner, answer

WAIT_S = 30.0
DEFAULT_MODEL = default_cache_folder() / "models" / "default"
THREE_DIGITS = GuideSpec(kind="regex", text="[0-9]{3}")
DIGITS = GuideSpec(kind="regex", text="[0-9]{1,40}")
ANYTHING = GuideSpec(kind="regex", text="(?s).*")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> GuidedBench:
    return GuidedBench(tmp_path_factory.mktemp("vocabulary"))


def _sampling(guide: GuideSpec, **fields: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, "temperature": 1.0, "guide": guide, **fields})  # type: ignore[arg-type]


def _ids(mask: np.ndarray) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def _guide(bench: GuidedBench, spec: GuideSpec) -> GrammarGuide:
    return GrammarGuide(bench.compiler.compile(spec))


def test_a_mask_allows_what_the_guide_allows_next(bench):
    guide = _guide(bench, GuideSpec(kind="choice", choices=("abc", "x")))
    assert {bench.text([token]) for token in _ids(guide.allowed(())[0])} == {"a", "ab", "abc", "x"}


def test_an_end_token_may_come_only_where_the_output_matches(bench):
    guide = _guide(bench, DIGITS)
    assert bench.eos not in _ids(guide.allowed(())[0])
    guide.accept(bench.ids("1")[0])
    assert bench.eos in _ids(guide.allowed(())[0])


def test_ids_that_no_token_stands_for_are_never_allowed(bench):
    allowed = _ids(_guide(bench, ANYTHING).allowed(())[0])
    assert bench.eos in allowed
    assert max(allowed) < bench.num_known < bench.vocab_size


@pytest.mark.parametrize("num_missing", [1, 40])
def test_a_tokenizer_may_know_more_ids_than_the_model(tmp_path, num_missing):
    bench = GuidedBench(tmp_path)
    vocab_size = bench.num_known - num_missing
    grammar = GrammarCompiler(tmp_path, vocab_size, (bench.eos,)).compile(GuideSpec(kind="choice", choices=("x",)))
    assert grammar.num_words == -(-bench.num_known // 32)
    allowed = GrammarGuide(grammar).allowed(())[0]
    assert _ids(allowed) == set(bench.ids("x"))
    point = SamplePoint(SamplingParams(), np.zeros(1, np.int32), 1, frozenset())
    (chosen,) = sample(torch.zeros(1, vocab_size), [replace(point, allowed=allowed)])
    assert [chosen.token_id] == bench.ids("x")


def test_masks_end_with_the_draft_that_the_guide_refuses(bench):
    guide = _guide(bench, DIGITS)
    one, two, letter = (bench.ids(text)[0] for text in "12a")
    assert len(guide.allowed([one, two])) == 3
    assert len(guide.allowed([one, letter, two])) == 2
    assert len(guide.allowed([letter])) == 1


def test_masks_end_before_the_draft_that_completes_the_output(bench):
    draft = [bench.ids(digit)[0] for digit in "3456"]
    assert len(_guide(bench, THREE_DIGITS).allowed(draft)) == 3


def test_drafts_leave_the_guide_where_it_was(bench):
    guide = _guide(bench, THREE_DIGITS)
    guide.accept(bench.ids("7")[0])
    before = guide.allowed(())[0].copy()
    guide.allowed([bench.ids("8")[0], bench.ids("9")[0], bench.eos])
    assert np.array_equal(guide.allowed(())[0], before)
    assert not guide.is_finished and not guide.error


def test_masks_of_one_sequence_share_one_buffer(bench):
    guide = _guide(bench, DIGITS)
    assert np.shares_memory(guide.allowed(())[0], guide.allowed(())[0])


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_complete_output_ends_the_sequence_without_an_end_token(bench, ignore_eos):
    result = bench.run(_sampling(THREE_DIGITS, ignore_eos=ignore_eos))
    assert (result.reason, bench.eos in result.token_ids) == (FinishReason.STOP, False)
    assert bench.text(result.token_ids).isdigit() and len(bench.text(result.token_ids)) == 3


def test_an_output_that_could_go_on_ends_with_an_end_token_even_if_those_are_ignored(bench):
    sampling = _sampling(GuideSpec(kind="regex", text="a+"), ignore_eos=True)
    result = bench.run(sampling)
    assert (result.reason, result.token_ids[-1]) == (FinishReason.STOP, bench.eos)


def test_the_guide_outranks_min_tokens_and_bad_words(bench):
    banned = tuple((token,) for token in bench.ids("5"))
    only_fives = GuideSpec(kind="regex", text="5{3}")
    result = bench.run(_sampling(only_fives, min_tokens=50, bad_words_ids=banned))
    assert (bench.text(result.token_ids), result.reason) == ("555", FinishReason.STOP)


def test_bad_words_still_choose_among_what_the_guide_allows(bench):
    banned = tuple((token,) for token in bench.ids("y"))
    spec = GuideSpec(kind="choice", choices=("y", "n"))
    assert {bench.text(bench.run(_sampling(spec, bad_words_ids=banned, seed=seed)).token_ids) for seed in range(9)} == {
        "n"
    }


def test_max_tokens_may_cut_the_output_short(bench):
    result = bench.run(_sampling(GuideSpec(kind="regex", text="[0-9]{40}"), max_tokens=5))
    assert (result.reason, len(result.token_ids)) == (FinishReason.LENGTH, 5)


def test_log_probs_stay_those_of_the_raw_logits():
    logits = torch.tensor([[0.0, 4.0, 1.0, 2.0], [0.0, 4.0, 1.0, 2.0]])
    free = SamplePoint(SamplingParams(), np.zeros(1, np.int32), 1, frozenset())
    guided = replace(free, allowed=np.asarray([0b0101], np.int32))
    first, second = sample(logits, [guided, free])
    assert (first.token_id, second.token_id) == (2, 1)
    assert first.log_prob == pytest.approx(float(torch.log_softmax(logits[0], -1)[2]))


def test_the_highest_bit_of_a_word_is_a_token_like_any_other():
    point = SamplePoint(SamplingParams(), np.zeros(1, np.int32), 1, frozenset())
    (chosen,) = sample(torch.zeros(1, 40), [replace(point, allowed=np.asarray([-(2**31), 0], np.int32))])
    assert chosen.token_id == 31


def test_preemption_keeps_the_guide(bench):
    sampling = _sampling(GuideSpec(kind="regex", text="([0-9]{4} ){6}"), max_tokens=40)
    alone = [bench.run(sampling.model_copy(update={"seed": seed})).token_ids for seed in range(3)]
    engine = bench.engine(num_blocks=14)
    requests = [
        replace(bench.request(sampling.model_copy(update={"seed": seed})), request_id=str(seed)) for seed in range(3)
    ]
    streams = [bench.add(engine, request) for request in requests]
    while engine.step():
        pass
    assert engine.load().num_preemptions
    assert [answer(events).token_ids for events in streams] == alone


def test_a_prefill_chooses_its_first_token_under_the_guide(bench):
    engine = bench.engine()
    spec = GuideSpec(kind="choice", choices=("abc", "x"))
    events = bench.add(engine, replace(bench.request(_sampling(spec)), role=Role.PREFILL))
    while engine.step():
        pass
    (first,) = [event for event in events if isinstance(event, Tokens)]
    assert bench.text(first.token_ids) in ("a", "ab", "abc", "x")


def _import(bench: GuidedBench, spec: GuideSpec, first_token: int) -> list[ExecutorEvent]:
    engine = bench.engine()
    events = bench.add(engine, replace(bench.request(_sampling(spec)), role=Role.DECODE))
    engine.step()
    assert any(isinstance(event, Reserved) for event in events)
    engine.complete_import("guided", first_token, -1.0, 1)
    while engine.step():
        pass
    return events


def test_a_decode_goes_on_from_the_first_token_of_its_peer(bench):
    first = bench.ids("4")
    result = answer(_import(bench, THREE_DIGITS, first[0]))
    text = bench.text([*first, *result.token_ids])
    assert (result.reason, text[0], text.isdigit(), len(text)) == (FinishReason.STOP, "4", True, 3)


def test_a_first_token_that_the_guide_forbids_fails_the_request(bench):
    end = _import(bench, THREE_DIGITS, bench.ids("q")[0])[-1]
    assert isinstance(end, Failed) and isinstance(end.error, InvalidRequest)
    assert "does not continue the output" in end.error.text


class BrokenRunner(NoiseRunner):
    """A model whose arithmetic has failed."""

    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        return Finished([Sampled(0, float("nan")) for chunk in chunks for _ in chunk.samples])


def test_a_model_that_says_something_else_fails_the_request_alone(bench):
    engine = bench.engine(runner=BrokenRunner(bench.vocab_size))
    guided = bench.add(engine, bench.request(_sampling(GuideSpec(kind="choice", choices=("abc",)))))
    free = bench.add(engine, replace(bench.request(SamplingParams(max_tokens=3)), request_id="free"))
    while engine.step():
        pass
    assert isinstance(guided[-1], Failed) and isinstance(guided[-1].error, InvalidRequest)
    assert answer(free).reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GuideSpec(kind="json_schema", text='{"type": "tree"}'), "json_schema: Invalid type: tree"),
        (GuideSpec(kind="json_schema", text='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (GuideSpec(kind="json_schema", text='{"type": "integer", "minimum": 2, "maximum": 1}'), "Unsatisfiable"),
        (GuideSpec(kind="json_schema", text='{"$ref": "#/nowhere"}'), "nowhere"),
        (GuideSpec(kind="regex", text="["), "regex: unclosed character class"),
        (GuideSpec(kind="regex", text="(?=a)b"), "look-around"),
        (GuideSpec(kind="regex", text=r"[^\s\S]"), "regex: "),
        (GuideSpec(kind="grammar", text="root ::= ("), "grammar: "),
        (GuideSpec(kind="grammar", text="nonsense"), "grammar: "),
    ],
)
def test_a_bad_guide_is_refused_in_one_line_with_the_reason(bench, spec, reason):
    with pytest.raises(InvalidRequest) as caught:
        bench.compiler.compile(spec)
    assert caught.value.text.startswith("guided_decoding_guide (or structured_outputs): ")
    assert reason in caught.value.text and "\n" not in caught.value.text


@pytest.mark.parametrize("text", ['root ::= "a" ("b" | "c")', 'start: "a" ("b" | "c")'])
def test_a_grammar_may_be_gbnf_or_lark(bench, text):
    result = bench.run(_sampling(GuideSpec(kind="grammar", text=text)))
    assert bench.text(result.token_ids) in ("ab", "ac")


def test_compact_json_holds_no_white_space_and_other_json_holds_little(bench):
    schema = json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 9, "maxItems": 9})
    for seed in range(5):
        compact = bench.run(_sampling(GuideSpec(kind="json_schema", text=schema, is_compact=True), seed=seed))
        assert not set(bench.text(compact.token_ids)) & set(" \t\r\n")
        spaced = bench.run(_sampling(GuideSpec(kind="json_schema", text=schema), seed=seed, max_tokens=2000))
        runs = re.findall(r"\s+", bench.text(spaced.token_ids))
        assert max(len(run) for run in runs) <= 34


def test_the_latest_guides_are_kept_and_the_others_forgotten(tmp_path):
    compiler = GuidedBench(tmp_path).compiler
    for index in range(100):
        compiler.compile(GuideSpec(kind="choice", choices=(str(index),)))
    assert compiler.num_cached == 64
    compiler.compile(GuideSpec(kind="choice", choices=("99",)))
    assert compiler.num_cached == 64


def test_outputs_of_one_guide_do_not_meet(bench):
    first, second = _guide(bench, THREE_DIGITS), _guide(bench, THREE_DIGITS)
    for digit in "123":
        first.accept(bench.ids(digit)[0])
    assert first.is_finished and not second.is_finished


def test_a_resumed_output_that_the_guide_forbids_is_refused(bench):
    request = bench.request(_sampling(THREE_DIGITS), bench.ids("1x"))
    with pytest.raises(InvalidRequest, match="num_generated: the guide forbids the 2 tokens"):
        start_guide(bench.compiler, request)


def test_a_model_without_a_tokenizer_refuses_guides(tmp_path):
    with pytest.raises(NotSupported, match="tokenizer"):
        GrammarCompiler(tmp_path, 100, (1,)).compile(THREE_DIGITS)


def test_a_tokenizer_that_does_not_spell_bytes_refuses_guides(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NotSupported, match="decoder"):
        GrammarCompiler(tmp_path, 2, (1,)).compile(THREE_DIGITS)


def test_preprocess_refuses_a_bad_guide_and_lets_a_good_one_pass(tmp_path):
    bench = GuidedBench(tmp_path)
    document = {"vocab_size": bench.vocab_size, "max_position_embeddings": 64, "eos_token_id": bench.eos}
    (tmp_path / "config.json").write_text(json.dumps(document))
    preprocessor = Preprocessor(tmp_path)
    options = PreprocessOptions(block_size=4, max_tokens=4, guide=THREE_DIGITS)
    assert len(preprocessor.prepare(Prompt(text="a"), options).input_ids) == 1
    with pytest.raises(InvalidRequest, match="guided_decoding_guide"):
        bad = options.model_copy(update={"guide": GuideSpec(kind="regex", text="[")})
        preprocessor.prepare(Prompt(text="a"), bad)


@pytest.fixture
def executor(bench: GuidedBench) -> Iterator[BatchingExecutor]:
    parts = BatchingExecutorParts(
        runner=NoiseRunner(bench.vocab_size),
        layout=KVLayout(64, 1, 1, 4, 8, "float32", "noise"),
        limits=ExecutorLimits(128, bench.vocab_size, (bench.eos,)),
        memory=PoolMemory(4096, 1, "cpu", None),
        rules=EngineRules(SequenceRules(4, (bench.eos,)), SchedulerLimits(16, 4, True), bench.vocab_size),
        max_waiting=4,
        grammars=bench.compiler,
    )
    executor = BatchingExecutor(parts, SystemClock())
    yield executor
    executor.close()


def _events(
    executor: BatchingExecutor, bench: GuidedBench, sampling: SamplingParams, output: Sequence[int]
) -> list[ExecutorEvent]:
    arriving: queue.SimpleQueue[ExecutorEvent] = queue.SimpleQueue()
    executor.submit(replace(bench.request(sampling, output), sink=arriving.put))
    events = [arriving.get(timeout=WAIT_S)]
    while not isinstance(events[-1], Completed | Failed):
        events.append(arriving.get(timeout=WAIT_S))
    return events


def test_submitting_refuses_a_bad_guide_at_once(executor, bench):
    with pytest.raises(InvalidRequest, match="guided_decoding_guide"):
        executor.submit(bench.request(_sampling(GuideSpec(kind="regex", text="["))))
    end = _events(executor, bench, _sampling(THREE_DIGITS), ())[-1]
    assert isinstance(end, Completed) and end.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("last", ["3", "eos"])
def test_a_resumed_output_that_is_complete_is_admitted_and_ends_at_once(executor, bench, last):
    spec = THREE_DIGITS if last == "3" else DIGITS
    output = [bench.ids(digit)[0] for digit in "12"]
    output.append(bench.eos if last == "eos" else bench.ids(last)[0])
    admitted, end = _events(executor, bench, _sampling(spec), output)
    assert isinstance(admitted, Admitted) and admitted.usage == RequestUsage()
    assert isinstance(end, Completed) and end.finish_reason is FinishReason.STOP
    assert end.timings.arrival_ns <= end.timings.first_scheduled_ns == admitted.first_scheduled_ns
    load = executor.load()
    assert (load.num_running, load.num_waiting) == (0, 0)


def test_an_executor_without_a_vocabulary_refuses_guides(bench):
    with pytest.raises(NotSupported, match="follows no guides"):
        start_guide(None, bench.request(_sampling(THREE_DIGITS)))


@pytest.mark.skipif(not (DEFAULT_MODEL / "tokenizer.json").is_file(), reason="no default model: make setup")
def test_the_default_models_vocabulary_spells_any_guide():
    compiler = GrammarCompiler(DEFAULT_MODEL, 49152, (2,))
    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    guide = GrammarGuide(compiler.compile(GuideSpec(kind="json_schema", text=schema)))
    for token_id in tokenizer.encode('{"a": "Grüße, 世界 🙂"}', add_special_tokens=False).ids:
        assert token_id in _ids(guide.allowed(())[0])
        guide.accept(token_id)
    assert not guide.error
    assert 2 in _ids(guide.allowed(())[0]) or guide.is_finished
