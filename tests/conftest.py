"""How the suite is spread over processes when pytest runs with `-n`."""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

_SHARING = {
    "tests/e2e/test_": ("bad_input", "clients", "features", "guided", "kv_tiers", "parity", "sequences"),
    "tests/faults/test_": ("client_gone", "deadlines", "direct_channel", "leases", "lying_peers"),
}
"""Files whose tests share servers, or a reference, that take long: those of one folder stay in one process."""


class _ByServers(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return _sharers(nodeid) or nodeid.partition("::")[0]


def _sharers(nodeid: str) -> str:
    for start, files in _SHARING.items():
        if nodeid.startswith(tuple(f"{start}{name}.py" for name in files)):
            return start
    return ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByServers:
    """Scopes are given out in the order of collection, not the largest first."""
    config.option.loadscopereorder = False
    return _ByServers(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever takes long is begun first; but servers that are shared stay until the end, and need memory."""
    folders = ("tests/e2e/", "tests/faults/")
    items.sort(key=lambda item: (not item.nodeid.startswith(folders), bool(_sharers(item.nodeid))))
