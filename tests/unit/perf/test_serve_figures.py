"""What the serve suite computes from answers, command lines and metrics pages."""

from __future__ import annotations

import pytest
from perf.serving.figures import METRICS, figures_of, itls_s, ttfts_s
from perf.serving.load import Answer, LoadResult, LoadSpec, decode_result, decode_spec, encode
from perf.serving.processes import SERVER, name_of, total_by_name
from perf.serving.prompts import make_prompts
from perf.serving.scrape import RequestTimes, Total, parse_request_times

_PAGE = """\
# HELP kelp_ttft_seconds Arrival to first token sent
# TYPE kelp_ttft_seconds histogram
kelp_ttft_seconds_count 4
kelp_ttft_seconds_sum 2.5
kelp_ttft_seconds_bucket{le="1"} 4
kelp_ttft_seconds_bucket{le="+Inf"} 4
# HELP kelp_phase_seconds Time of one phase of a request
# TYPE kelp_phase_seconds histogram
kelp_phase_seconds_count{phase="queue"} 4
kelp_phase_seconds_sum{phase="queue"} 0.5
kelp_phase_seconds_bucket{phase="queue",le="+Inf"} 4
kelp_phase_seconds_count{phase="prefill"} 3
kelp_phase_seconds_sum{phase="prefill"} 1.5
kelp_phase_seconds_bucket{phase="prefill",le="+Inf"} 3
# HELP nv_inference_count Number of inferences performed
# TYPE nv_inference_count counter
nv_inference_count{model="llm",version="1"} 4
"""


def answer(start_s: float, *arrivals: tuple[float, int], error: str = "") -> Answer:
    return Answer(start_s, arrivals, len(arrivals), 128, ("w:1",), error)


def test_the_time_to_the_first_token_ends_with_the_first_response():
    assert ttfts_s([answer(1.0, (1.5, 1), (3.0, 1))]) == [0.5]


def test_several_tokens_in_one_response_share_the_time_since_the_one_before():
    assert itls_s([answer(0.0, (1.0, 1), (1.5, 1), (2.5, 2))]) == [0.5, 0.5, 0.5]


def test_every_token_after_the_first_response_counts_as_one_gap():
    assert len(itls_s([answer(0.0, (1.0, 2), (2.0, 3), (3.0, 1))])) == 4


def test_tokens_per_second_count_the_time_of_each_round_and_not_the_time_between_rounds():
    first = [answer(0.0, (1.0, 1), (2.0, 9))]
    second = [answer(100.0, (101.0, 1), (102.0, 9))]
    assert figures_of([first, second])["tokens_per_s"] == pytest.approx(5.0)


def test_the_figures_are_all_metrics_of_the_suite_in_their_units():
    figures = figures_of([[answer(0.0, (0.5, 1), (0.75, 1)), answer(0.0, (0.5, 1), (0.75, 1))]])
    assert set(figures) == {metric.name for metric in METRICS}
    assert figures["ttft_p50"] == pytest.approx(500.0)
    assert figures["itl_p99"] == pytest.approx(250.0)


def test_answers_without_a_token_do_not_hide_the_others():
    figures = figures_of([[answer(0.0, error="gone"), answer(0.0, (1.0, 1), (2.0, 1))]])
    assert figures["tokens_per_s"] == pytest.approx(1.0)


def test_no_answers_give_no_figures():
    assert figures_of([[answer(0.0, error="gone")], []]) == {}


def test_a_load_and_its_result_survive_the_pipe():
    spec = LoadSpec("127.0.0.1:1", ("a", "b"), 64, 8, 30.0)
    result = LoadResult((answer(0.0, (1.0, 1), (2.0, 2)), answer(0.0, error="gone")), 0.25)
    assert decode_spec(encode(spec)) == spec
    assert decode_result(encode(result)) == result


def test_prompts_differ_from_their_first_words_on():
    prompts = make_prompts(200, 128, seed=1)
    assert len({prompt.split()[0] for prompt in prompts}) > 190
    assert len(set(prompts)) == 200


def test_the_same_seed_gives_the_same_prompts_and_another_seed_gives_others():
    assert make_prompts(8, 128, seed=3) == make_prompts(8, 128, seed=3)
    assert not set(make_prompts(8, 128, seed=3)) & set(make_prompts(8, 128, seed=4))


def test_histograms_are_read_off_the_metrics_page():
    times = parse_request_times(_PAGE)
    assert times == RequestTimes(Total(2.5, 4), {"queue": Total(0.5, 4), "prefill": Total(1.5, 3)})


def test_a_page_without_our_metrics_reads_as_zero():
    assert parse_request_times("# HELP x y\n# TYPE x gauge\nx 1\n") == RequestTimes(Total(), {})


def test_what_was_added_counts_phases_that_appeared_in_between():
    added = parse_request_times(_PAGE).since(RequestTimes(Total(0.5, 1), {"queue": Total(0.25, 1)}))
    assert added == RequestTimes(Total(2.0, 3), {"queue": Total(0.25, 3), "prefill": Total(1.5, 3)})


def test_processes_are_named_by_what_they_run():
    stub = "/x/backends/python/triton_python_backend_stub"
    assert name_of([stub, "/b/kelp_router/model.py", "kelp_0_8001_ab", "1", "llm_0_0"]) == "llm"
    assert name_of([stub, "/b/kelp_decode/model.py", "kelp_0_8001_cd", "1", "decode_1_0_0"]) == "decode_1"
    assert name_of(["/opt/bin/tritonserver", "--grpc-port=1"]) == SERVER
    assert name_of(["python3", "kelp", "serve"]) == ""


def test_cpu_times_add_up_by_process():
    assert total_by_name([{"a": 1.0}, {"a": 2.0, "b": 0.5}]) == {"a": 3.0, "b": 0.5}
