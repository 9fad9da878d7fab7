"""How the suite is spread over processes when pytest runs with `-n`, and how long properties are looked for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

_SHARING = {
    "tests/e2e/test_": ("bad_input", "clients", "features", "guided", "parity", "sequences"),
    "tests/faults/test_": ("client_gone", "deadlines", "direct_channel", "leases", "lying_peers"),
}
"""Files whose tests share servers, or a reference, that take long: those of one folder stay in one process."""

settings.register_profile("soak", max_examples=20 * settings.get_profile("default").max_examples)
"""`--hypothesis-profile=soak` tries twenty times as many examples as `support.examples` is asked for."""


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
    """Whatever takes long is begun first, so that files of seconds are left when one process has nothing more to do."""
    folders = ("tests/e2e/", "tests/faults/")

    def rank(item: pytest.Item) -> int:
        return next((rank for rank, folder in enumerate(folders) if item.nodeid.startswith(folder)), len(folders))

    items.sort(key=lambda item: (rank(item), bool(_sharers(item.nodeid))))
