from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kelp.core.errors import ConfigError
from kelp.sim.plots import Curves, require_matplotlib, write_html, write_png
from kelp.sim.report import SLA, Percentiles, PolicyReport, Report, Setting

TIMES = Percentiles(1.0, 0.5, 2.0, 3.0)
POLICIES = [
    PolicyReport(name, 4, 0, 0.5, TIMES, TIMES, TIMES, 2.0, 0.5, 0.9, 0.1, 1.2, 10.0) for name in ("kelp", "<b>")
]
REPORT = Report(Setting("made", 4, 3.0, SLA(), {"seed": 1}, 0.6, 0.7), POLICIES)
CURVES = Curves(
    {"kelp": np.array([0.1, 0.5, 3.0]), "<b>": np.array([])},
    {"kelp": np.array([0.8, 0.9]), "<b>": np.array([0.5, 1.0])},
)


def test_a_page_needs_nothing_from_elsewhere_and_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_html(tmp_path / "one.html", REPORT, CURVES)
    write_html(tmp_path / "two.html", REPORT, CURVES)
    page = (tmp_path / "one.html").read_text()
    assert page == (tmp_path / "two.html").read_text()
    assert "<svg" in page and "<script" not in page and "<link" not in page
    assert not re.search(r'(?:src|href)="(?!#)', re.sub(r"<metadata>.*?</metadata>", "", page, flags=re.S))
    assert "<td>kelp</td><td>50.0%</td>" in page


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_html(tmp_path / "page.html", REPORT, CURVES)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in page and "<td><b>" not in page


def test_a_png_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_png(tmp_path / "plots.png", REPORT, CURVES)
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_named_with_its_option(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="--png .*: Is a directory"):
        write_png(tmp_path, REPORT, CURVES)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def import_without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without)
    for act in (require_matplotlib, lambda: write_html(tmp_path / "page.html", REPORT, CURVES)):
        with pytest.raises(ConfigError, match=r"pip install 'kelp\[plots\]'"):
            act()
