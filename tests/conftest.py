"""How the suite is spread over processes when pytest runs with `-n`."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_SERVER_FOLDERS = ("e2e", "faults")
"""Their tests share servers that take long to start: each folder stays in one process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the folders with servers together, and put them first: they take longest."""
    for item in items:
        folder = _folder_of(item)
        if folder in _SERVER_FOLDERS:
            item.add_marker(pytest.mark.xdist_group(folder))
    items.sort(key=lambda item: _folder_of(item) not in _SERVER_FOLDERS)


def _folder_of(item: pytest.Item) -> str:
    return item.path.relative_to(_HERE).parts[0]
