"""The KV block manager: onboarding against recomputing, rates against limits, cost of offload, what eviction saves."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from perf.kv import evict, offload, onboard, rates, store, synthetic
from perf.kv.store import Store
from perf.reporter import Reporter
from perf.rows import RequiredRow
from perf.suite import BenchError, Suite


def _start_store(stack: ExitStack, reporter: Reporter) -> tuple[Store | None, str]:
    """The store, or why there is none."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kelp-bench-s3-", ignore_cleanup_errors=True))
    try:
        return stack.enter_context(store.running(Path(folder))), ""
    except BenchError as error:
        reporter.say(f"({error})")
        return None, str(error)


def _part(reporter: Reporter, name: str, required: Sequence[RequiredRow], measure: Callable[[], None]) -> None:
    """What keeps one part from being measured, whatever it is, does not concern the others."""
    started_s, trouble = time.monotonic(), ""
    try:
        measure()
    except BenchError as error:
        trouble = str(error)
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"
        reporter.say(traceback.format_exc())
    if trouble:
        for row in required:
            reporter.explain(row.case, trouble)
    reporter.say(f"({name}: {time.monotonic() - started_s:.0f} s)")


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`."""
    with ExitStack() as stack:
        s3, trouble = _start_store(stack, reporter)

        def served() -> None:
            if s3 is None:
                raise BenchError(trouble)
            onboard.run(reporter, s3, is_long)

        _part(reporter, "onboarding", onboard.REQUIRED, served)
        _part(reporter, "synthetic KV", synthetic.REQUIRED, lambda: synthetic.run(reporter, s3, is_long))
        _part(reporter, "rates", rates.REQUIRED, lambda: rates.run(reporter, s3, is_long))
    _part(reporter, "offload", offload.REQUIRED, lambda: offload.run(reporter, is_long))
    _part(reporter, "eviction", evict.REQUIRED, lambda: evict.run(reporter, is_long))


SUITE = Suite(
    name="kv",
    summary="KV block manager: onboarding, rates per tier, cost of offload, eviction",
    required=(*onboard.REQUIRED, *synthetic.REQUIRED, *rates.REQUIRED, *offload.REQUIRED, *evict.REQUIRED),
    run=run,
)
