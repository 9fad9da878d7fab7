"""The last response's summary tensors, and where a request's time went."""

from __future__ import annotations

import pytest
from router_rig import job

from kelp.core.errors import DeadlineExceeded
from kelp.core.messages import Finished, Progress, RequestTimings, RequestUsage
from kelp.core.metrics import Metrics
from kelp.core.schema import LLM
from kelp.core.types import FinishReason
from kelp.router.job import Job
from kelp.router.summary import observe, phases, summary_tensors

MS = 1_000_000


def finished_job() -> Job:
    """Arrived at 1 ms; prefill told its first token with 20 ms, decode began at 26 ms."""
    done = job(generated=(1, 2, 3))
    done.arrival_ns = 1 * MS
    done.first_sent_ns = 25 * MS
    done.last_received_ns = 90 * MS
    done.worker_ids = ("host:1/prefill", "host:1/decode")
    done.prefill_event = Progress(
        usage=RequestUsage(cached_tokens=32, new_blocks=3, reused_blocks=2),
        timings=RequestTimings(arrival_ns=2 * MS, first_scheduled_ns=6 * MS, prefill_done_ns=20 * MS),
    )
    done.decode_event = Finished(
        finish_reason=FinishReason.LENGTH,
        usage=RequestUsage(cached_tokens=16, new_blocks=5, reused_blocks=1, transferred_blocks=4),
        timings=RequestTimings(transfer_done_ns=23 * MS, first_token_ns=26 * MS),
    )
    return done


def test_the_summary_joins_what_both_workers_told() -> None:
    summary = summary_tensors([finished_job()], num_output_tokens=3)
    values = {name: array[0] for name, array in summary.items() if name != "worker_ids"}
    assert values == {
        "cached_tokens": 32,
        "kv_cache_alloc_new_blocks": 5,
        "kv_cache_reused_blocks": 1,
        "kv_cache_alloc_total_blocks": 6,
        "arrival_time_ns": 1 * MS,
        "first_scheduled_time_ns": 6 * MS,
        "first_token_time_ns": 25 * MS,
        "last_token_time_ns": 90 * MS,
        "num_input_tokens": 4,
        "num_output_tokens": 3,
    }
    assert list(summary["worker_ids"]) == [b"host:1/prefill", b"host:1/decode"]


@pytest.mark.parametrize("skew_ns", [3_600_000 * MS, -3_600_000 * MS], ids=["ahead", "behind"])
def test_a_worker_whose_clock_is_an_hour_off_was_scheduled_when_its_queue_says(skew_ns: int) -> None:
    skewed = finished_job()
    skewed.arrival_ns, skewed.first_sent_ns = (value + 4_000_000 * MS for value in (skewed.arrival_ns, 25 * MS))
    assert skewed.prefill_event is not None
    moved = 4_000_000 * MS + skew_ns
    timings = RequestTimings(arrival_ns=moved + 2 * MS, first_scheduled_ns=moved + 6 * MS)
    skewed.prefill_event = skewed.prefill_event.model_copy(update={"timings": timings})
    assert summary_tensors([skewed], 3)["first_scheduled_time_ns"][0] == 4_000_000 * MS + 5 * MS


def test_the_summary_has_the_declared_names_and_types() -> None:
    declared = {spec.name: spec.datatype.numpy for spec in LLM.outputs}
    for name, array in summary_tensors([finished_job()], 3).items():
        assert declared[name] == array.dtype, name


def test_a_request_of_which_no_worker_told_anything_has_a_summary() -> None:
    summary = summary_tensors([job()], 0)
    assert summary["cached_tokens"][0] == summary["kv_cache_alloc_total_blocks"][0] == 0


def test_the_phases_before_the_first_token_add_up_to_its_time() -> None:
    spans = phases(finished_job())
    assert spans == {
        "queue": 0.004,
        "prefill": 0.014,
        "relay": pytest.approx(0.006),
        "transfer": 0.003,
        "first_step": 0.003,
    }
    assert spans["queue"] + spans["prefill"] + spans["relay"] == pytest.approx(0.024)


def test_clocks_that_disagree_make_no_negative_phase() -> None:
    done = finished_job()
    done.decode_event = Progress(timings=RequestTimings(transfer_done_ns=1 * MS, first_token_ns=2 * MS))
    assert phases(done)["transfer"] == 0.0


def test_an_aggregated_request_has_no_transfer() -> None:
    done = finished_job()
    done.decode_event, done.prefill_event = done.prefill_event, None
    assert set(phases(done)) == {"queue", "prefill", "relay"}


def test_phases_need_a_first_token() -> None:
    done = finished_job()
    done.first_sent_ns = 0
    assert phases(done) == {}


def test_a_finished_request_is_observed() -> None:
    metrics = Metrics()
    observe(metrics, [finished_job()], num_responses=2, now_ns=125 * MS)
    counters, _, observations = metrics.take()
    assert {family.name: value for (family, _), value in counters.items()} == {
        "kelp_prompt_tokens_total": 4,
        "kelp_output_tokens_total": 3,
        "kelp_cached_tokens_total": 32,
        "kelp_onboarded_blocks_total": 0,
        "kelp_responses_total": 2,
        "kelp_transferred_blocks_total": 4,
    }
    seen = {(family.name, dict(labels).get("phase")): values for (family, labels), values in observations.items()}
    assert seen["kelp_ttft_seconds", None] == [pytest.approx(0.024)]
    assert seen["kelp_itl_seconds", None] == [pytest.approx(0.05)]
    assert ("kelp_phase_seconds", "transfer") in seen


def test_a_request_without_tokens_has_no_latency() -> None:
    metrics = Metrics()
    observe(metrics, [job()], num_responses=1, now_ns=5)
    assert metrics.take()[2] == {}


def test_a_job_has_no_time_after_its_deadline() -> None:
    assert 59 < job(seconds_left=60.0).remaining_s() <= 60
    with pytest.raises(DeadlineExceeded, match="deadline_ms"):
        job(seconds_left=0.0).remaining_s()


@pytest.mark.parametrize(
    ("generated", "sampling", "expected"),
    [
        ((), {}, None),
        ((5,), {}, None),
        ((5, 0), {}, FinishReason.STOP),
        ((0, 5), {}, None),
        ((0,), {"ignore_eos": True}, None),
        ((7,), {"stop_token_ids": (7,)}, FinishReason.STOP),
        ((7,), {"stop_token_ids": (7,), "ignore_eos": True}, FinishReason.STOP),
        ((0,), {"min_tokens": 2}, None),
        ((5, 0), {"min_tokens": 2}, FinishReason.STOP),
        ((1, 2, 3), {"max_tokens": 3}, FinishReason.LENGTH),
        ((1, 2, 0), {"max_tokens": 3}, FinishReason.STOP),
    ],
)
def test_a_job_knows_whether_its_tokens_are_a_whole_answer(
    generated: tuple[int, ...], sampling: dict[str, object], expected: FinishReason | None
) -> None:
    assert job(generated=generated, **sampling).finish_reason(frozenset({0})) is expected
