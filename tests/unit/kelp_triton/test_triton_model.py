"""The guard around every request, and a model's life from load to unload."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pb_double
import pytest
from pb_double import InferenceRequest, InferenceResponse, MetricFamily, Request, Tensor, TritonError

from kelp.core.config import CONFIG_ENV
from kelp.core.errors import CapacityError, ConfigError, WorkerLost
from kelp.core.metrics import LEASES, MODEL_RESTARTS, REQUESTS, TTFT, Metrics
from kelp_triton.bls import BlsClient
from kelp_triton.exchange import Exchange
from kelp_triton.loop import LoopThread
from kelp_triton.metrics import MetricsExporter
from kelp_triton.model import KelpModel
from support.waiting import wait_until

WAIT_S = 10.0
Handle = Callable[[Exchange], Awaitable[None]]


class ModelUnderTest(KelpModel):
    """Does with requests what `handler` does."""

    handler: Handle
    is_stopped = False

    async def start(self) -> None:
        self.loop_thread = threading.current_thread().name

    async def handle(self, exchange: Exchange) -> None:
        await type(self).handler(exchange)

    async def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture(autouse=True)
def no_metric_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    monkeypatch.setattr(MetricFamily, "made", [])
    monkeypatch.setattr(MetricFamily, "refusal", None)


def arguments(**parameters: str) -> dict[str, str]:
    document = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    return {"model_name": "llm", "model_config": json.dumps(document)}


@pytest.fixture
def model() -> Iterator[ModelUnderTest]:
    made = ModelUnderTest()
    made.initialize(arguments())
    yield made
    if not made.is_stopped:
        made.finalize()


def run(model: ModelUnderTest, handler: Handle) -> Request:
    """One request to its end."""
    ModelUnderTest.handler = staticmethod(handler)  # type: ignore[assignment]
    request = Request()
    model.execute([request])
    assert request.sender.has_ended.wait(WAIT_S), "the client would wait for ever"
    return request


async def answer(exchange: Exchange) -> None:
    exchange.send({"output_ids": np.array([1])}, is_final=True)


async def forget(exchange: Exchange) -> None:
    """Ends without a last response."""


async def refuse(exchange: Exchange) -> None:
    raise CapacityError("full")


async def crash(exchange: Exchange) -> None:
    raise ValueError("odd")


async def crash_in_mid_stream(exchange: Exchange) -> None:
    exchange.send({"output_ids": np.array([1])})
    raise KeyError("odd")


def start_stuck(model: ModelUnderTest) -> Request:
    """A request that never ends by itself, under way."""
    has_started = threading.Event()

    async def wait_for_ever(exchange: Exchange) -> None:
        has_started.set()
        await asyncio.Event().wait()

    ModelUnderTest.handler = staticmethod(wait_for_ever)  # type: ignore[assignment]
    request = Request()
    model.execute([request])
    assert has_started.wait(WAIT_S)
    return request


def test_a_handled_request_gets_its_answer(model: ModelUnderTest) -> None:
    sender = run(model, answer).sender
    assert len(sender.responses) == 1 and sender.misuses == []


def test_a_handler_that_forgets_the_end_does_not_leave_the_client_waiting(model: ModelUnderTest) -> None:
    assert run(model, forget).sender.responses == [None]


def test_a_typed_error_reaches_the_client(model: ModelUnderTest) -> None:
    assert run(model, refuse).sender.error == TritonError("[KELP_OVERLOADED] full", "UNAVAILABLE")


@pytest.mark.parametrize("handler", [crash, crash_in_mid_stream])
def test_a_bug_reaches_the_client_as_an_internal_error(model: ModelUnderTest, handler: Handle) -> None:
    assert run(model, handler).sender.error.message().startswith("[KELP_INTERNAL] ")


def test_a_model_serves_on_after_a_bug(model: ModelUnderTest) -> None:
    run(model, crash)
    assert run(model, answer).sender.responses[-1] is not None


def test_requests_do_not_wait_for_each_other(model: ModelUnderTest) -> None:
    stuck = start_stuck(model)
    run(model, answer)
    assert not stuck.sender.has_ended.is_set()


def test_unloading_ends_what_still_runs_as_a_lost_worker(model: ModelUnderTest) -> None:
    request = start_stuck(model)
    model.finalize()
    assert model.is_stopped
    assert request.sender.has_ended.is_set()
    assert "[KELP_WORKER_LOST] model llm is stopping" in request.sender.error.message()


def test_a_model_reads_its_own_parameters() -> None:
    model = ModelUnderTest()
    model.initialize(arguments(**{"executor.dtype": "float32", "router.idle_timeout_s": "7"}))
    model.finalize()
    assert (model.config.executor.dtype, model.config.router.idle_timeout_s) == ("float32", 7.0)


def test_a_model_that_was_loaded_again_says_how_often() -> None:
    for parameters, restarts in (({}, 0.0), ({"epoch": "3"}, 3.0), ({"epoch": "of another kind"}, None)):
        model = ModelUnderTest()
        model.initialize(arguments(**parameters))
        try:
            _, gauges, _ = model.metrics.take()
            assert gauges.get((MODEL_RESTARTS, (("model", "llm"),))) == restarts
        finally:
            model.finalize()


def test_a_misspelt_parameter_fails_the_load_by_name() -> None:
    with pytest.raises(ConfigError, match=r"executor\.dtipe"):
        ModelUnderTest().initialize(arguments(**{"executor.dtipe": "float32"}))


def test_an_error_in_start_fails_the_load() -> None:
    class Unstartable(ModelUnderTest):
        async def start(self) -> None:
            raise ConfigError("model.path: nothing there")

    with pytest.raises(ConfigError, match=r"model\.path"):
        Unstartable().initialize(arguments())


def test_closing_a_loop_cancels_what_runs_on_it() -> None:
    loop = LoopThread("loop under test")
    running = loop.start(asyncio.sleep(3600))
    assert loop.wait(asyncio.sleep(0, result=5)) == 5
    loop.close()
    assert running.cancelled()
    assert "loop under test" not in [thread.name for thread in threading.enumerate()]


def exported() -> dict[str, list[tuple[dict[str, str], list[tuple[str, float]]]]]:
    return {family.name: [(metric.labels, metric.values) for metric in family.metrics] for family in MetricFamily.made}


def test_closing_the_exporter_flushes_what_was_counted() -> None:
    metrics = Metrics()
    exporter = MetricsExporter(metrics, period_s=3600.0)
    metrics.add(REQUESTS, 2, outcome="ok")
    metrics.set(LEASES, 3, worker="prefill")
    metrics.observe(TTFT, 0.25)
    metrics.observe(TTFT, 0.5)
    exporter.close()
    assert exported() == {
        "kelp_requests_total": [({"outcome": "ok"}, [("increment", 2)])],
        "kelp_handoff_leases": [({"worker": "prefill"}, [("set", 3)])],
        "kelp_ttft_seconds": [({}, [("observe", 0.25), ("observe", 0.5)])],
    }


def test_a_series_is_made_once_and_touched_by_one_thread_only() -> None:
    metrics = Metrics()
    exporter = MetricsExporter(metrics, period_s=0.001)
    for expected in (1, 2):
        metrics.add(REQUESTS, outcome="ok")
        wait_until(lambda: sum(len(values) for _, values in exported().get("kelp_requests_total", ())) == expected)  # noqa: B023
    exporter.close()
    (family,) = MetricFamily.made
    (metric,) = family.metrics
    assert metric.threads == {"kelp-metrics"}


def test_a_series_is_never_given_back_as_other_models_may_share_it() -> None:
    metrics = Metrics()
    exporter = MetricsExporter(metrics, period_s=3600.0)
    metrics.set(LEASES, 3, worker="prefill")
    exporter.close()
    family = weakref.ref(MetricFamily.made[0])
    metric = weakref.ref(MetricFamily.made[0].metrics[0])
    MetricFamily.made.clear()
    del exporter
    gc.collect()
    assert family() is not None
    assert metric() is not None


def test_histograms_have_their_buckets() -> None:
    metrics = Metrics()
    exporter = MetricsExporter(metrics, period_s=3600.0)
    metrics.observe(TTFT, 0.25)
    exporter.close()
    assert MetricFamily.made[0].metrics[0].buckets == list(TTFT.buckets)


def test_a_server_without_metrics_is_served_without_metrics(caplog: pytest.LogCaptureFixture) -> None:
    MetricFamily.refusal = pb_double.TritonModelException("metrics are disabled")
    metrics = Metrics()
    exporter = MetricsExporter(metrics, period_s=3600.0)
    metrics.add(REQUESTS, outcome="ok")
    exporter.close()
    assert "metrics are disabled" in caplog.text


def test_a_series_that_cannot_be_exported_is_told_of_once_and_stops_no_other(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("labels differ")

    monkeypatch.setattr(pb_double.Metric, "increment", refuse)
    metrics = Metrics()
    exporter = MetricsExporter(metrics, period_s=0.001)
    for expected in (1, 2, 3):
        metrics.add(REQUESTS, outcome="ok")
        metrics.observe(TTFT, 0.25)
        wait_until(lambda: sum(len(values) for _, values in exported().get("kelp_ttft_seconds", ())) == expected)  # noqa: B023
    exporter.close()
    assert caplog.text.count("kelp_requests_total is not exported") == 1


def call_bls(reply: Callable[[InferenceRequest], InferenceResponse]) -> dict[str, np.ndarray]:
    InferenceRequest.answer = staticmethod(reply)  # type: ignore[assignment]
    client = BlsClient("preprocess", ("input_ids",))
    return asyncio.run(client.call({"options": np.array([b"{}"], dtype=np.object_)}))


def test_a_bls_call_sends_and_returns_tensors_by_name() -> None:
    seen: list[InferenceRequest] = []

    def reply(request: InferenceRequest) -> InferenceResponse:
        seen.append(request)
        return InferenceResponse([Tensor("input_ids", np.array([4, 5]))])

    assert list(call_bls(reply)["input_ids"]) == [4, 5]
    assert (seen[0].model_name, seen[0].output_names) == ("preprocess", ["input_ids"])
    assert [tensor.name() for tensor in seen[0].tensors] == ["options"]


@pytest.mark.parametrize(
    ("message", "error"),
    [("in x, [KELP_OVERLOADED] full", CapacityError), ("Stub process is not healthy.", WorkerLost)],
)
def test_a_bls_error_is_found_in_the_response(message: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        call_bls(lambda _: InferenceResponse([], TritonError(message)))


def test_a_bls_call_to_a_model_that_is_not_loaded_is_a_lost_worker() -> None:
    def reply(_: InferenceRequest) -> InferenceResponse:
        raise pb_double.TritonModelException("Failed for execute the inference request. Model 'preprocess' not ready")

    with pytest.raises(WorkerLost, match="not ready"):
        call_bls(reply)
