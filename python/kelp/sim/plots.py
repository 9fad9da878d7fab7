"""A report as pictures: one PNG, or one HTML page that needs nothing from elsewhere.

The only importer of matplotlib (extra `plots`), and only when a picture is asked for.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kelp.core.errors import ConfigError
from kelp.sim.report import Floats, PolicyReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (2, 2)
_SIZE_INCHES = (12.0, 8.0)
_MAX_POINTS = 400
_SHARE = 100.0
_SVG_SALT = "kelp"
"""Otherwise matplotlib puts random names into an SVG."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:2em}}td,th{{padding:.2em .8em;text-align:right}}
td:first-child,th:first-child{{text-align:left}}tr:nth-child(even){{background:#eee}}svg{{max-width:100%;height:auto}}
</style></head><body><h1>{title}</h1><p>{summary}</p>
{picture}
<table><tr>{heads}</tr>
{rows}
</table></body></html>
"""
_HEADS = (
    "policy",
    "hit share",
    "TTFT mean s",
    "TTFT p50 s",
    "TTFT p90 s",
    "TTFT p99 s",
    "ITL mean ms",
    "ITL p99 ms",
    "E2E mean s",
    "E2E p99 s",
    "goodput /s",
    "good requests",
    "busy",
    "busy variation",
    "refused",
)


@dataclass(frozen=True, slots=True)
class Curves:
    """What pictures need beyond the report, by policy.

    Attributes:
        ttft_s: `[num_served]` each.
        busy_share: `[size]` each, per worker.
    """

    ttft_s: dict[str, Floats]
    busy_share: dict[str, Floats]


def require_matplotlib() -> None:
    """Fail before a long run rather than after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'kelp[plots]'") from None


def write_png(path: Path, report: Report, curves: Curves) -> None:
    """Draw all panels into one PNG.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    _write("--png", path, _render(report, curves, "png"))


def write_html(path: Path, report: Report, curves: Curves) -> None:
    """Draw all panels and the table into one page.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    picture = _render(report, curves, "svg").decode()
    page = _PAGE.format(
        title=html.escape(f"kelp sim: {report.setting.workload}"),
        summary=html.escape(_summary(report)),
        picture=picture[picture.index("<svg") :],
        heads="".join(f"<th>{head}</th>" for head in _HEADS),
        rows="\n".join(_row(policy) for policy in report.policies),
    )
    _write("--html", path, page.encode())


def _write(option: str, path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None


def _summary(report: Report) -> str:
    setting = report.setting
    options = ", ".join(f"{name} {value}" for name, value in setting.options.items())
    return (
        f"{setting.num_requests} requests at {setting.rate_rps:.2f}/s; SLA: TTFT {setting.sla.ttft_s:g} s, "
        f"ITL {setting.sla.itl_s:g} s; hit bound {setting.pooled_bound:.1%} pooled, {setting.infinite_bound:.1%} "
        f"without end; {options}"
    )


def _row(policy: PolicyReport) -> str:
    ttft, itl, e2e = policy.ttft, policy.itl, policy.e2e
    cells = [
        html.escape(policy.policy),
        f"{policy.hit_share:.1%}",
        *(f"{seconds:.3f}" for seconds in (ttft.mean, ttft.p50, ttft.p90, ttft.p99)),
        *(f"{seconds * 1e3:.2f}" for seconds in (itl.mean, itl.p99)),
        *(f"{seconds:.2f}" for seconds in (e2e.mean, e2e.p99)),
        f"{policy.goodput_rps:.3f}",
        f"{policy.goodput_share:.1%}",
        f"{policy.busy_share:.1%}",
        f"{policy.busy_variation:.3f}",
        str(policy.num_refused),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _render(report: Report, curves: Curves, file_format: str) -> bytes:
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if file_format == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": _SVG_SALT}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, report, curves)
        figure.savefig(buffer, format=file_format, metadata=metadata)
    return buffer.getvalue()


def _draw(figure: Figure, report: Report, curves: Curves) -> None:
    figure.suptitle(f"{report.setting.workload}, {report.setting.rate_rps:.2f} requests/s")
    (latencies, goodput), (hits, balance) = figure.subplots(*_PANELS)
    for name, ttft_s in curves.ttft_s.items():
        quantiles = np.linspace(0, 1, min(_MAX_POINTS, max(2, len(ttft_s))))
        latencies.plot(np.quantile(ttft_s, quantiles) if len(ttft_s) else quantiles * 0, quantiles, label=name)
    latencies.set(title="TTFT", xlabel="s", ylabel="share of requests", xscale="symlog")
    latencies.axvline(report.setting.sla.ttft_s, color="grey", linestyle=":", label="SLA")
    latencies.legend(fontsize="small")
    _bars(goodput, "goodput", "requests/s", {policy.policy: policy.goodput_rps for policy in report.policies})
    _bars(hits, "hit share", "%", {policy.policy: policy.hit_share * _SHARE for policy in report.policies})
    hits.axvline(report.setting.pooled_bound * _SHARE, color="grey", linestyle=":", label="pooled bound")
    hits.legend(fontsize="small")
    balance.boxplot(list(curves.busy_share.values()), whis=(0, 100))
    balance.set_xticks(range(1, len(curves.busy_share) + 1), list(curves.busy_share), rotation=30)
    balance.set(title="busy share of workers")


def _bars(axes: Axes, title: str, unit: str, values: Mapping[str, float]) -> None:
    axes.barh(list(values), list(values.values()))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
