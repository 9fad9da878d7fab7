"""Tables for docs/benchmarks.md from the rows of the last run: `python -m perf.kv.markdown [ROWS]`.

A cell without a figure stays empty, so that a run that was cut short shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.kv import evict, offload, onboard, rates, synthetic
from perf.kv.break_even import BOUND
from perf.machine import REPOSITORY

Rows = Mapping[tuple[str, str], Mapping[str, Any]]

_ROWS = REPOSITORY / "perf" / "results" / "kv.jsonl"
_TIERS = ("G2", "G3", "G4")


def read_rows(lines: Iterable[str]) -> Rows:
    """Rows of a run by case and metric."""
    rows = [json.loads(line) for line in lines]
    return {(row["case"], row["metric"]): row for row in rows}


def tables(rows: Rows) -> Iterator[str]:
    """Lines of all tables, an empty one behind each."""
    served = [(onboard.case_name(n), [onboard.metric_name(tier) for tier in onboard.TIERS]) for n in onboard.LENGTHS]
    yield from _table(("case, ms", "recomputed", *_TIERS), (_against_one(rows, *line) for line in served))
    large = [(synthetic.case_name(n), [synthetic.metric_name(t) for t in synthetic.TIERS]) for n in synthetic.LENGTHS]
    yield from _table(("case, s", "at the stated rate", *_TIERS), (_against_one(rows, *line) for line in large))
    cases, metrics = (onboard.BREAK_EVEN, synthetic.BREAK_EVEN), [f"tokens_{tier}" for tier in synthetic.TIERS]
    lengths = ([f"`{case}`", *(_length(rows, (case, metric)) for metric in metrics)] for case in cases)
    yield from _table(("case, tokens", *_TIERS), lengths)
    speeds = [(case, synthetic.MEMCPY) for case in synthetic.G2_CASES]
    speeds += [(case, f"gbps/{limit}") for case, limits in rates.LIMITS.items() for limit in limits]
    yield from _table(("case, GB/s", "against", "kelp", "limit", "ratio"), (_alone(rows, key) for key in speeds))
    costs = [(offload.CASE, f"{metric}/off") for metric in offload.METRICS]
    yield from _table(("case, ms", "against", "with", "without", "ratio"), (_alone(rows, key) for key in costs))
    saved = [(case, [f"saved/{rival}" for rival in evict.RIVALS]) for case in evict.CASE_NAMES]
    header = ("case, share of prefill", f"`{evict.DEFAULT}`", *evict.RIVALS)
    yield from _table(header, (_against_many(rows, *line) for line in saved))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|-" * len(header) + "|"
    for cells in lines:
        yield f"| {' | '.join(cells)} |"
    yield ""


def _against_one(rows: Rows, case: str, metrics: Sequence[str]) -> list[str]:
    reference = next((text for metric in metrics if (text := _figure(rows, (case, metric), "reference_value"))), "")
    return [f"`{case}`", reference, *(_with_ratio(rows, (case, metric), "value") for metric in metrics)]


def _against_many(rows: Rows, case: str, metrics: Sequence[str]) -> list[str]:
    cells = [_with_ratio(rows, (case, metric), "reference_value") for metric in metrics]
    return [f"`{case}`", _figure(rows, (case, metrics[0]), "value"), *cells]


def _alone(rows: Rows, key: tuple[str, str]) -> list[str]:
    figures = [_figure(rows, key, name) for name in ("value", "reference_value")]
    return [f"`{key[0]}`", f"`{key[1]}`", *figures, _ratio(rows, key)]


def _with_ratio(rows: Rows, key: tuple[str, str], name: str) -> str:
    return ": ".join(filter(None, (_figure(rows, key, name), _ratio(rows, key))))


def _figure(rows: Rows, key: tuple[str, str], name: str) -> str:
    value = rows.get(key, {}).get(name)
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _length(rows: Rows, key: tuple[str, str]) -> str:
    figure, (_, _, bound) = _figure(rows, key, "value"), rows.get(key, {}).get("unit", "").partition(BOUND)
    return f"{bound} {figure}".strip() if figure else ""


def _ratio(rows: Rows, key: tuple[str, str]) -> str:
    ratio, low, high = (rows.get(key, {}).get(name) for name in ("ratio", "ratio_low", "ratio_high"))
    return "" if ratio is None else f"{ratio:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else _ROWS
    print("\n".join(tables(read_rows(path.read_text().splitlines()))))
