"""One executor of each kind that runs here, for every test of the executor contract."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_builders import EXECUTORS
from executor_harness import Build, Client, write_tiny_model

from kelp.executor.base import Executor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("contract-model"))


@pytest.fixture(params=EXECUTORS)
def build(request: pytest.FixtureRequest, folder: Path) -> Iterator[Build]:
    built: list[Executor] = []

    def build_one(**options: int) -> Executor:
        built.append(request.param(folder, **options))
        return built[-1]

    yield build_one
    for executor in built:
        executor.close()


@pytest.fixture
def client(build: Build) -> Client:
    return Client(build())
