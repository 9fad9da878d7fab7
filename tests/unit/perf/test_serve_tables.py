"""Which rows the serve suite prints, and which figures it does not trust."""

from __future__ import annotations

import dataclasses

import pytest
from perf.rows import Measurement, judge
from perf.serving.deployment import Deployment
from perf.serving.load import Answer, LoadResult
from perf.serving.processes import SERVER
from perf.serving.rounds import Level, LevelResult, Samples
from perf.serving.scrape import RequestTimes, Total
from perf.serving.tables import AGGREGATED, DISAGGREGATED, RELAY, required_rows, rows_of

_LEVEL = Level(concurrency=8, num_requests=2, num_rounds=5)
_WORKERS = {AGGREGATED: ("decode:1",), DISAGGREGATED: ("prefill:1", "decode:1")}


def answer(mode: str, ttft_s: float) -> Answer:
    arrivals = ((ttft_s, 1), (ttft_s + 0.1, 1), (ttft_s + 0.2, 2))
    return Answer(0.0, arrivals, 3, 128, _WORKERS[mode])


def samples(mode: str, ttft_s: float) -> Samples:
    made = Samples(Deployment(mode, "127.0.0.1:1", "http://127.0.0.1:2/metrics", {}))
    cpu_s = {SERVER: 0.003, "llm": 0.006, "decode": 0.3}
    for _ in range(_LEVEL.num_rounds):
        made.take(LoadResult((answer(mode, ttft_s),) * _LEVEL.num_requests, client_cpu_s=0.0015), cpu_s)
    count = _LEVEL.num_rounds * _LEVEL.num_requests
    seconds = {"queue": 1.0, "prefill": 2.0, "relay": 1.0}
    if mode == DISAGGREGATED:
        seconds |= {"transfer": 3.0, "first_step": 1.0}
    made.times = RequestTimes(Total(4.0, count), {phase: Total(value, count) for phase, value in seconds.items()})
    return made


@pytest.fixture
def result() -> LevelResult:
    both = {AGGREGATED: samples(AGGREGATED, 0.5), DISAGGREGATED: samples(DISAGGREGATED, 0.25)}
    return LevelResult(_LEVEL, both, reference=[10.0] * _LEVEL.num_rounds)


def by_key(result: LevelResult) -> dict[tuple[str, str], Measurement]:
    return {(row.case, row.metric): row for row in rows_of(result)}


def test_a_whole_level_prints_exactly_the_required_rows_and_all_are_ok(result: LevelResult):
    required = {(row.case, row.metric): row for row in required_rows((_LEVEL.name,))}
    printed = by_key(result)
    assert set(printed) == set(required)
    assert {key for key, row in printed.items() if not judge(row, required[key].needs_reference).is_ok} == set()
    assert {key: row.unit for key, row in printed.items()} == {key: row.unit for key, row in required.items()}


def test_disaggregated_rows_are_compared_with_aggregated_serving_of_the_same_rounds(result: LevelResult):
    row = by_key(result)["disaggregated/c8", "ttft_p50"]
    assert row.comparison is not None and row.comparison.ratio is not None
    assert (row.comparison.reference, row.comparison.value) == (AGGREGATED, 500.0)
    assert row.comparison.ratio.value == pytest.approx(2.0)


def test_aggregated_throughput_is_compared_with_transformers_and_nothing_else_is(result: LevelResult):
    rows = by_key(result)
    compared = [metric for (case, metric), row in rows.items() if case == "aggregated/c8" and row.comparison]
    assert compared == ["tokens_per_s"]


def test_shares_of_the_time_to_first_token_add_up_to_one(result: LevelResult):
    rows = by_key(result)
    shares = [rows["aggregated/c8", f"ttft_share/{phase}"].value for phase in ("queue", "prefill", "relay")]
    assert shares == [0.25, 0.5, 0.25]
    assert rows["aggregated/c8", "ttft_mean"].value == pytest.approx(400.0)


def test_transfer_and_first_step_share_the_time_to_the_second_token(result: LevelResult):
    rows = by_key(result)
    assert rows["disaggregated/c8", "second_token_share/transfer"].value == 0.75
    assert ("aggregated/c8", "second_token_share/transfer") not in rows


def test_the_relay_is_counted_per_response_and_not_per_token(result: LevelResult):
    rows = by_key(result)
    assert rows[RELAY, "client_cpu/c8"].value == pytest.approx(0.0075 / 30 * 1e6)
    assert rows[RELAY, "router_stub_cpu/c8"].value == pytest.approx(0.03 / 30 * 1e6)
    assert rows[RELAY, "responses_per_token/c8"].value == pytest.approx(3 / 4)


def test_figures_with_failed_requests_are_shown_but_not_trusted(result: LevelResult):
    item = result.samples[AGGREGATED]
    item.rounds[0] = (dataclasses.replace(item.rounds[0][0], error="[KELP_OVERLOADED] full"), *item.rounds[0][1:])
    row = by_key(result)["aggregated/c8", "ttft_p50"]
    assert row.value is not None
    assert row.trouble == "1 of 10 requests failed, first: [KELP_OVERLOADED] full"


def test_a_failing_reference_gives_no_ratio(result: LevelResult):
    result.samples[AGGREGATED].trouble = "server gone"
    row = by_key(result)["disaggregated/c8", "itl_p50"]
    assert row.comparison is None
    assert judge(row, needs_reference=True).reason == "the reference was not measured"


def test_disaggregated_figures_of_requests_that_never_met_a_prefill_worker_are_not_trusted(result: LevelResult):
    item = result.samples[DISAGGREGATED]
    item.rounds[0] = tuple(dataclasses.replace(found, worker_ids=("decode:1",)) for found in item.rounds[0])
    assert by_key(result)["disaggregated/c8", "ttft_p50"].trouble == "2 of 10 requests were not served by 2 worker(s)"


def test_phases_of_fewer_requests_than_were_sent_are_not_trusted(result: LevelResult):
    item = result.samples[AGGREGATED]
    assert item.times is not None
    item.times.phases["prefill"] = Total(2.0, 9)
    row = by_key(result)["aggregated/c8", "ttft_share/prefill"]
    assert row.trouble == "the server's metrics have phase prefill of 9 of 10 requests"


def test_a_reference_that_could_not_be_started_is_the_reason_of_the_row_that_needs_it(result: LevelResult):
    result.reference = []
    result.reference_trouble = "transformers generate: not installed"
    rows = by_key(result)
    assert rows["aggregated/c8", "tokens_per_s"].trouble == "transformers generate: not installed"
    assert rows["aggregated/c8", "itl_p50"].trouble == ""


def test_every_contestant_gets_the_same_prompts_in_a_round_and_new_ones_in_the_next():
    assert _LEVEL.prompts(3) == _LEVEL.prompts(3)
    assert not set(_LEVEL.prompts(3)) & set(_LEVEL.prompts(4))
