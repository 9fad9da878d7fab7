"""The router: its index against Dynamo's, and the whole request path against Dynamo's frontend with its mocker."""

from __future__ import annotations

from perf.reporter import Reporter
from perf.router import e2e, index_bench
from perf.suite import BenchError, Suite


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`; what keeps one half from being measured does not concern the other."""
    for half in (index_bench, e2e):
        try:
            half.run(reporter, is_long)
        except BenchError as error:
            for required in half.REQUIRED:
                reporter.explain(required.case, str(error))


SUITE = Suite(
    name="router",
    summary="KV index and request path beside Dynamo's",
    required=(*index_bench.REQUIRED, *e2e.REQUIRED),
    run=run,
)
