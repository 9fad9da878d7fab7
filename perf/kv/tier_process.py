"""Measures the disk tier and the object tier by themselves, each in turn with its limit, over an arena of this process.

Reads a TierSpec on stdin and writes a TierRates on stdout, both as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from perf.kv.disk_rates import DiskContest
from perf.kv.object_rates import ObjectContest
from perf.kv.served_tiers import arena_folder
from perf.kv.tier_messages import TierRates, TierSpec
from perf.suite import BenchError


def _guarded(rates: TierRates, cases: tuple[str, ...], measure: Callable[[], None]) -> None:
    try:
        measure()
    except BenchError as error:
        for case in cases:
            rates.troubles[case] = str(error)


def main() -> None:
    spec = TierSpec(**json.loads(sys.stdin.read()))
    rates = TierRates()
    with (
        tempfile.TemporaryDirectory(prefix="kelp-bench-", dir=spec.disk_folder or None) as folder,
        ExitStack() as stack,
    ):
        work = Path(folder)
        memory = arena_folder("tiers", work)

        def disk() -> None:
            stack.enter_context(closing(DiskContest(spec, work, memory))).run(rates)

        def objects() -> None:
            stack.enter_context(closing(ObjectContest(spec, memory))).run(rates)

        _guarded(rates, ("g3_read", "g3_write"), disk)
        _guarded(rates, ("g4_read", "g4_write"), objects)
    print(json.dumps(dataclasses.asdict(rates)))


if __name__ == "__main__":
    main()
