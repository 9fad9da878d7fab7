"""Real servers and the reference, started once a session; see `support.serving`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prompts import MAX_STEP_TOKENS, PROMPTS

if TYPE_CHECKING:
    from hf_reference import Expected

    from support.serving import KelpServer

SETTINGS: dict[str, object] = {"executor.max_step_tokens": MAX_STEP_TOKENS}
HANDED_OVER: dict[str, object] = {**SETTINGS, "router.disaggregation": "always"}
"""By default the router hands a prompt over only where it predicts that this pays."""
_SHARED = ExitStack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.triton)
            item.add_marker(pytest.mark.nixl)


@pytest.fixture(scope="session", autouse=True)
def requirements() -> None:
    """Skip everything here where a real server cannot run."""
    from support.serving import why_not

    if reason := why_not():
        pytest.skip(reason)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Servers that are shared end with the last test of this folder: they need memory that others need."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _SHARED.close()


@pytest.fixture(scope="session")
def expected(requirements: None) -> dict[str, Expected]:
    """The reference's greedy continuation of every prompt, fp32."""
    from hf_reference import reference_answers

    return reference_answers("float32", list(PROMPTS))


@pytest.fixture(scope="session")
def expected_bf16(requirements: None) -> dict[str, Expected]:
    """The same in bf16, of every other prompt."""
    from hf_reference import reference_answers

    return reference_answers("bfloat16", list(PROMPTS)[::2])


@pytest.fixture(scope="session")
def shared(expected: dict[str, Expected]) -> Iterator[ExitStack]:
    """What ends with the last test of this folder, or with a run that ends before."""
    yield _SHARED
    _SHARED.close()


@pytest.fixture(scope="session")
def aggregated_server(shared: ExitStack) -> KelpServer:
    """One worker does all of it; fp32."""
    from support.serving import KelpServer

    return shared.enter_context(KelpServer("aggregated", settings=SETTINGS).start())


@pytest.fixture(scope="session")
def compact_server(shared: ExitStack) -> KelpServer:
    """Prefill and decode in two processes of one tritonserver; fp32. Tests leave it as they found it."""
    from support.serving import KelpServer

    return shared.enter_context(KelpServer(settings=HANDED_OVER).start())


@pytest.fixture(scope="session")
def isolated_server(shared: ExitStack) -> KelpServer:
    """Prefill and decode in two tritonservers, the router in a third; fp32. Tests leave it as they found it."""
    from support.serving import KelpServer

    return shared.enter_context(KelpServer(isolate=True, settings=HANDED_OVER).start())


@pytest.fixture
def server(compact_server: KelpServer) -> Iterator[KelpServer]:
    """The compact server; when the test is over, no worker may hold anything of it."""
    yield compact_server
    compact_server.wait_quiet()
