"""How the suite is spread over processes when pytest runs with `-n`."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_SERVER_FOLDERS = ("e2e", "faults")
"""Their tests share servers that take long to start: each folder stays in one process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the folders with servers as groups, before xdist looks for marks."""
    for item in items:
        folder = item.path.relative_to(_HERE).parts[0]
        if folder in _SERVER_FOLDERS:
            item.add_marker(pytest.mark.xdist_group(folder))
