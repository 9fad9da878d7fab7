"""What `kelp kv stats` shows, made of the manager's counts; their names are those of the metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kelp.core import metrics
from kelp.core.metrics import MetricFamily

_TIERS = ("host", "disk", "object")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_COLUMNS = (
    "blocks", "places", "bytes", "hits", "evicted", "cleared", "corrupt", "refused", "to_read", "to_write"
)  # fmt: skip
_GIB = 2**30
Labels = Mapping[str, str]


class _Counts:
    """Counts by family and labels."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = [(name.partition("{")[0], dict(_LABEL.findall(name)), value) for name, value in values.items()]

    def sum(self, family: MetricFamily, **labels: str) -> int:
        """All counts of a family that have these labels."""
        return int(sum(value for found, value in self._of(family) if labels.items() <= found.items()))

    def by(self, family: MetricFamily, label: str) -> dict[str, int]:
        """Counts of a family by one label."""
        return {found[label]: int(value) for found, value in self._of(family) if label in found}

    def _of(self, family: MetricFamily) -> list[tuple[Labels, float]]:
        return [(labels, value) for name, labels, value in self._values if name == family.name]


def manager_report(name: str, values: Mapping[str, float]) -> dict[str, Any]:
    """For `--json`: tiers that there are with their counts, and the manager's own.

    Args:
        name: Of the manager.
        values: Of `GetStats`.
    """
    counts = _Counts(values)
    known = counts.by(metrics.KV_TIER_BLOCKS, "tier")
    states = counts.by(metrics.KV_STORE_STATE, "state")
    return {
        "manager": name,
        "tiers": {tier: _tier(counts, tier) for tier in _TIERS if tier in known},
        "misses": counts.sum(metrics.KV_TIER_MISSES),
        "held": counts.by(metrics.KV_MANAGER_HELD, "kind"),
        "store": next((state for state, is_it in states.items() if is_it), None),
        "values": dict(sorted(values.items())),
    }


def _tier(counts: _Counts, tier: str) -> dict[str, int | None]:
    is_store = tier == "object"
    size = counts.sum(metrics.KV_STORE_BYTES) if is_store else counts.sum(metrics.KV_TIER_BYTES, tier=tier)
    return {
        "blocks": counts.sum(metrics.KV_TIER_BLOCKS, tier=tier, state="resident"),
        "places": None if is_store else counts.sum(metrics.KV_TIER_BLOCKS, tier=tier),
        "bytes": size,
        "hits": counts.sum(metrics.KV_TIER_HITS, tier=tier),
        "evicted": counts.sum(metrics.KV_TIER_REMOVED, tier=tier, reason="evicted"),
        "cleared": counts.sum(metrics.KV_TIER_REMOVED, tier=tier, reason="cleared"),
        "corrupt": counts.sum(metrics.KV_TIER_CORRUPT, tier=tier),
        "refused": counts.sum(metrics.KV_TIER_REFUSED, tier=tier),
        "to_read": counts.sum(metrics.KV_TIER_QUEUE, tier=tier, direction="read"),
        "to_write": counts.sum(metrics.KV_TIER_QUEUE, tier=tier, direction="write"),
    }


def report_text(report: Mapping[str, Any]) -> str:
    """The same as a table for people."""
    tiers = report["tiers"]
    if not tiers:
        return f"{report['manager']}: no worker has joined yet, its tiers are not open"
    held = report["held"]
    rows = [["tier", *(column.replace("_", " ") for column in _COLUMNS)]]
    for name, tier in tiers.items():
        rows.append([name, *(_shown(column, tier[column]) for column in _COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align: list[Callable[[str, int], str]] = [str.ljust, *([str.rjust] * len(_COLUMNS))]
    lines = [f"{report['manager']}: {held.get('workers', 0)} workers, {held.get('leases', 0)} leases", ""]
    lines += ["  ".join(put(cell, w) for put, cell, w in zip(align, row, widths, strict=True)) for row in rows]
    lines += ["", f"asked for and nowhere: {report['misses']} blocks"]
    if report["store"] is not None:
        lines.append(f"object store: {report['store']}; its bytes are those of all hosts and models")
    if held.get("clears"):
        lines.append(f"clears that are not finished: {held['clears']}")
    return "\n".join(lines)


def _shown(column: str, value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / _GIB:.2f} GiB" if column == "bytes" else str(value)
