"""A report as the terminal shows it."""

from __future__ import annotations

from rich.table import Table

from kelp.sim.report import Percentiles, PolicyReport, Report, Setting

_MILLISECONDS = 1e3
_COLUMNS = (
    "hit share\n(of bound)",
    "TTFT s\nmean  p50  p90  p99",
    "ITL ms\nmean  p99",
    "E2E s\nmean  p99",
    "goodput /s\n(share)",
    "busy\n(cv)",
)


def to_table(report: Report) -> Table:
    """One row per policy; `cv` is the variation of the workers' busy time."""
    setting = report.setting
    title = f"{setting.workload}: {setting.num_requests} requests, {setting.rate_rps:.2f}/s"
    targets = f"SLA: TTFT {setting.sla.ttft_s:g} s, ITL {setting.sla.itl_s * _MILLISECONDS:g} ms"
    bounds = f"hit bound: {setting.pooled_bound:.1%} pooled, {setting.infinite_bound:.1%} without end"
    table = Table(title=title, caption=f"{targets}; {bounds}", caption_justify="left")
    table.add_column("policy", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    has_refused = any(policy.num_refused for policy in report.policies)
    if has_refused:
        table.add_column("refused", justify="right")
    for policy in report.policies:
        refused = [str(policy.num_refused)] if has_refused else []
        table.add_row(policy.policy, *_cells(policy, setting), *refused)
    return table


def _cells(policy: PolicyReport, setting: Setting) -> list[str]:
    of_bound = f"({policy.hit_share / setting.pooled_bound:.1%})" if setting.pooled_bound else ""
    return [
        f"{policy.hit_share:.1%} {of_bound}",
        f"{policy.ttft.mean:.2f} {policy.ttft.p50:.2f} {policy.ttft.p90:.2f} {policy.ttft.p99:.2f}",
        _mean_and_p99(policy.itl, _MILLISECONDS),
        _mean_and_p99(policy.e2e, 1.0),
        f"{policy.goodput_rps:.2f} ({policy.goodput_share:.1%})",
        f"{policy.busy_share:.0%} ({policy.busy_variation:.3f})",
    ]


def _mean_and_p99(seconds: Percentiles, unit: float) -> str:
    return f"{seconds.mean * unit:.1f} {seconds.p99 * unit:.1f}"
