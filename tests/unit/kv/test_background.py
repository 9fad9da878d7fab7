"""Work that can wait has a priority of its own."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kelp.kv.background import NICENESS, yield_to_others


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority each on Linux alone")
def test_the_thread_that_asks_for_it_and_no_other_yields() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1, initializer=yield_to_others) as pool:
        native_id = pool.submit(threading.get_native_id).result()
        assert os.getpriority(os.PRIO_PROCESS, native_id) == max(NICENESS, before)
        assert os.sched_getscheduler(native_id) == os.SCHED_BATCH
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
        assert os.sched_getscheduler(0) != os.SCHED_BATCH
