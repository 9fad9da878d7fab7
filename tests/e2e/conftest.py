"""Real servers and the reference, started once a session; see `support.serving`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prompts import MAX_STEP_TOKENS, MAX_TOKENS, PROMPTS

if TYPE_CHECKING:
    from hf_reference import Expected

    from support.serving import KelpServer

SETTINGS: dict[str, object] = {"executor.max_step_tokens": MAX_STEP_TOKENS}
HANDED_OVER: dict[str, object] = {**SETTINGS, "router.disaggregation": "always"}
"""By default the router hands a prompt over only where it predicts that this pays."""


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


def _expected(dtype_name: str, names: list[str]) -> dict[str, Expected]:
    import torch
    from hf_reference import HuggingFace

    from support.serving import MODEL

    torch.set_num_threads(1)  # more only fight over a busy machine: measured 4 times slower
    model = HuggingFace(MODEL, getattr(torch, dtype_name))
    return {name: model.generate(PROMPTS[name], MAX_TOKENS) for name in names}


@pytest.fixture(scope="session")
def expected(requirements: None) -> dict[str, Expected]:
    """The reference's greedy continuation of every prompt, fp32."""
    return _expected("float32", list(PROMPTS))


@pytest.fixture(scope="session")
def expected_bf16(requirements: None) -> dict[str, Expected]:
    """The same in bf16, of every other prompt."""
    return _expected("bfloat16", list(PROMPTS)[::2])


@pytest.fixture(scope="session")
def aggregated_server(expected: dict[str, Expected]) -> Iterator[KelpServer]:
    """One worker does all of it; fp32."""
    from support.serving import KelpServer

    with KelpServer("aggregated", settings=SETTINGS).start() as server:
        yield server


@pytest.fixture(scope="session")
def compact_server(expected: dict[str, Expected]) -> Iterator[KelpServer]:
    """Prefill and decode in two processes of one tritonserver; fp32. Tests leave it as they found it."""
    from support.serving import KelpServer

    with KelpServer(settings=HANDED_OVER).start() as server:
        yield server


@pytest.fixture(scope="session")
def isolated_server(expected: dict[str, Expected]) -> Iterator[KelpServer]:
    """Prefill and decode in two tritonservers, the router in a third; fp32. Tests leave it as they found it."""
    from support.serving import KelpServer

    with KelpServer(isolate=True, settings=HANDED_OVER).start() as server:
        yield server


@pytest.fixture
def server(compact_server: KelpServer) -> Iterator[KelpServer]:
    """The compact server; when the test is over, no worker may hold anything of it."""
    yield compact_server
    compact_server.wait_quiet()
