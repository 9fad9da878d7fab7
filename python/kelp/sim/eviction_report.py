"""Eviction policies side by side: every size of the lower tier, every policy, and the bound; as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from kelp.core.config_kv import EvictionName
from kelp.core.errors import InternalError
from kelp.sim.eviction import Stream, Watch, replay_named
from kelp.sim.eviction_bound import clairvoyant_s

CLAIRVOYANT = "clairvoyant"
REFERENCE: EvictionName = "lru"
_TOLERANCE = 1 + 1e-9
"""For sums of floats in another order."""

WatchOf = Callable[[float, str], Watch]


@dataclass(frozen=True, slots=True)
class EvictionRow:
    """One size of the lower tier on one workload.

    Attributes:
        upper: Size of the upper tier as a share of the workload's unique blocks.
        size: Size of the lower one.
        upper_saved: Share of the prefill time that the upper tier saves.
        saved: Share that the lower tier saves on top, by policy.
        clairvoyant: Most that it could.
    """

    workload: str
    upper: float
    size: float
    num_slots: int
    num_requests: int
    upper_saved: float
    saved: dict[str, float]
    clairvoyant: float


def evaluate(
    stream: Stream, sizes: Sequence[float], policies: Sequence[EvictionName], watch_of: WatchOf
) -> Iterator[EvictionRow]:
    """Play each policy at each size.

    Args:
        stream: The workload.
        sizes: Of the lower tier, as shares of the unique blocks.
        policies: By name.
        watch_of: Gives what is told the progress of a size and policy, by name.

    Raises:
        InternalError: A policy saves more than the bound: the bound is wrong.
    """
    for size in sizes:
        saved = {name: sum(replay_named(stream, name, size, watch_of(size, name))) for name in policies}
        bound_s = sum(clairvoyant_s(stream, stream.num_slots(size)))
        for name, saved_s in saved.items():
            require_bounded(stream.name, name, saved_s, bound_s)
        yield EvictionRow(
            workload=stream.name,
            upper=stream.upper,
            size=size,
            num_slots=stream.num_slots(size),
            num_requests=len(stream.requests),
            upper_saved=_share(stream.upper_saved_s, stream),
            saved={name: _share(saved_s, stream) for name, saved_s in saved.items()},
            clairvoyant=_share(bound_s, stream),
        )


def require_bounded(workload: str, policy: str, saved_s: float, bound_s: float) -> None:
    """Refuse figures that contradict the bound.

    Raises:
        InternalError: They do.
    """
    if saved_s > bound_s * _TOLERANCE:
        raise InternalError(f"{policy} saves {saved_s} s on {workload}, more than the bound of {bound_s} s")


def to_table(rows: Sequence[EvictionRow]) -> Table:
    """Shares of the prefill time saved, and in brackets how many times as much as `REFERENCE` saves."""
    table = Table(title="prefill time saved by the lower tier", caption="(x): against lru", caption_justify="left")
    table.add_column("workload", no_wrap=True)
    for column in ("upper tier\n(saves)", "lower tier\n(blocks)"):
        table.add_column(column, justify="right", no_wrap=True)
    names = list(rows[0].saved) if rows else []
    for name in (*names, CLAIRVOYANT):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        reference = row.saved.get(REFERENCE)
        cells = [_cell(row.saved[name], None if name == REFERENCE else reference) for name in names]
        upper, lower = f"{row.upper:.1%} ({row.upper_saved:.1%})", f"{row.size:.1%} ({row.num_slots})"
        table.add_row(row.workload, upper, lower, *cells, _cell(row.clairvoyant, reference))
    return table


def to_json(rows: Sequence[EvictionRow]) -> str:
    """All rows; shares are of the time that computing all full blocks would take."""
    return json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def _cell(saved: float, reference: float | None) -> str:
    return f"{saved:.2%} ({saved / reference:.2f})" if reference else f"{saved:.2%}"


def _share(seconds: float, stream: Stream) -> float:
    return seconds / stream.total_s if stream.total_s else 0.0
