"""How the suite is spread over processes when pytest runs with `-n`."""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

_SERVER_FOLDERS = ("tests/e2e/", "tests/faults/")
"""Their tests share servers that take long to start: each folder stays in one process, and goes first."""


class _ByFolder(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in _SERVER_FOLDERS if nodeid.startswith(folder)), nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFolder:
    """Scopes are given out in the order of collection, not the largest first."""
    config.option.loadscopereorder = False
    return _ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever takes longest is begun first."""
    items.sort(key=lambda item: not item.nodeid.startswith(_SERVER_FOLDERS))
