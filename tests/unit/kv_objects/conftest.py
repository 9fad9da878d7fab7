"""A real S3-compatible store, with a bucket and credentials for each test."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from s3_server import S3Server, aws_environment, s3_server
from support.object_rig import Bucket, ObjectRig

__all__ = ["s3_server"]

HostFactory = Callable[..., ObjectRig]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "s3_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.nixl)


@pytest.fixture(scope="module")
def shared_bucket(s3_server: S3Server) -> Iterator[Bucket]:
    if not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")):
        pytest.skip("the nixl wheel is not installed")
    with pytest.MonkeyPatch.context() as patch:
        aws_environment(patch)
        bucket = Bucket(s3_server)
        yield bucket
        bucket.close()


@pytest.fixture
def bucket(shared_bucket: Bucket) -> Iterator[Bucket]:
    """The bucket, empty."""
    yield shared_bucket
    shared_bucket.empty()


@pytest.fixture(scope="module")
def two_hosts(s3_server: S3Server, shared_bucket: Bucket) -> Iterator[tuple[ObjectRig, ObjectRig]]:
    one, two = (ObjectRig(s3_server, shared_bucket.name) for _ in range(2))
    with one, two:
        yield one, two


def _fresh(host: ObjectRig) -> Iterator[ObjectRig]:
    host.mark()
    yield host
    host.tier.forget(None)
    assert host.tier.state == "closed"


@pytest.fixture
def host(two_hosts: tuple[ObjectRig, ObjectRig], bucket: Bucket) -> Iterator[ObjectRig]:
    """A host that knows nothing of the bucket, nor the bucket of it."""
    yield from _fresh(two_hosts[0])


@pytest.fixture
def other(two_hosts: tuple[ObjectRig, ObjectRig], bucket: Bucket) -> Iterator[ObjectRig]:
    """Another one."""
    yield from _fresh(two_hosts[1])


@pytest.fixture
def new_host(s3_server: S3Server, bucket: Bucket) -> Iterator[HostFactory]:
    """Makes hosts of their own settings."""
    with ExitStack() as stack:

        def make(**settings: Any) -> ObjectRig:
            settings.setdefault("bucket", bucket.name)
            return stack.enter_context(ObjectRig(s3_server, **settings))

        yield make
