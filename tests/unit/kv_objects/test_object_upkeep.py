"""Listing, quota and clearing on a real store, and the process that does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kelp.core.errors import RetryableTransferError
from kelp.kv.tiers.objects.messages import ArenaMap
from s3_server import S3Server, aws_environment
from support.object_rig import GROUP_BLOCKS, SPACE, Bucket, ObjectRig, Story
from support.waiting import wait_until

_PARENT = """
import sys
from kelp.core.config_kv import ObjectTierConfig
from kelp.kv.tiers.objects.messages import ArenaMap
from kelp.kv.tiers.objects.tier import S3ObjectTier
tier = S3ObjectTier(ObjectTierConfig(bucket="b", endpoint="http://127.0.0.1:9"), bytes(16),
                    ArenaMap(sys.argv[1], 0, 1, 4096, 4096))
assert tier.wait_ready(60)
print(tier.process_id, flush=True)
sys.stdin.read()
"""


def test_clearing_a_tenant_removes_its_objects_whoever_wrote_them(
    host: ObjectRig, other: ObjectRig, bucket: Bucket
) -> None:
    mine, theirs, kept = (Story(seed, 2 * GROUP_BLOCKS, salt=salt) for seed, salt in ((1, "a"), (2, "a"), (3, "b")))
    host.put_all(mine)
    other.put_all(theirs)
    host.put_all(kept)
    bucket.write(f"kelp/{'f' * 32}/{mine.tenant.hex()}/{'0' * 32}.7-{'0' * 16}", b"of another model")
    bucket.write("kelp/notes.txt", b"of somebody else")

    assert host.tier.forget(mine.tenant) == 5
    assert host.tier.owed == frozenset()
    assert [mine.tenant.hex() in key for key in bucket.list_keys()] == [False] * 3
    assert (host.find(mine), host.find(theirs), host.find(kept)) == (0, 0, 2 * GROUP_BLOCKS)
    assert other.get(theirs, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS


def test_clearing_everything_leaves_other_models_alone(host: ObjectRig, bucket: Bucket) -> None:
    for seed, salt in ((4, "a"), (5, "b")):
        host.put_all(Story(seed, GROUP_BLOCKS, salt=salt))
    foreign = f"kelp/{'f' * 32}/{'1' * 32}/{'0' * 32}.7"
    bucket.write(foreign, b"of another model")
    assert host.tier.forget(None) == 2
    assert bucket.list_keys() == [foreign]


def test_the_oldest_objects_leave_when_the_quota_is_exceeded(
    new_host: Callable[..., ObjectRig], other: ObjectRig, bucket: Bucket
) -> None:
    story = Story(6, 6 * GROUP_BLOCKS)
    other.put_all(story)
    object_bytes = len(bucket.read(bucket.list_keys()[0]))
    written = {
        item["Key"]: item["LastModified"] for item in bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]
    }

    host = new_host(max_bytes=4 * object_bytes)
    assert len(list(host.tier.refresh())) == 3, "a little less than the quota is left"
    kept = bucket.list_keys()
    assert len(kept) == 3
    assert max(written[key] for key in written if key not in kept) <= min(written[key] for key in kept)
    assert (host.count("num_surplus"), host.count("num_listed")) == (3, 6)

    other.tier.refresh()
    assert len(list(other.tier.refresh())) == 3


def test_a_tenant_beyond_its_share_loses_its_oldest_objects_and_pushes_nobody_out(
    new_host: Callable[..., ObjectRig], other: ObjectRig, bucket: Bucket
) -> None:
    modest, greedy = Story(12, 2 * GROUP_BLOCKS, salt="modest"), Story(13, 6 * GROUP_BLOCKS, salt="greedy")
    other.put_all(modest)
    other.put_all(greedy)
    object_bytes = len(bucket.read(bucket.list_keys()[0]))

    host = new_host(max_bytes=7 * object_bytes, tenant_share=4 / 7 + 0.001)
    host.tier.refresh()
    assert host.count("num_surplus") == 3
    assert host.tier.full_tenants == {greedy.tenant}
    assert host.find(modest) == 2 * GROUP_BLOCKS, "they are older, and within their share"
    kept = [key for key in bucket.list_keys() if greedy.tenant.hex() in key]
    assert len(kept) == 3
    assert any(greedy.names[-1].hex() in key for key in kept)

    host.tier.refresh()
    assert host.count("num_surplus") == 3
    assert host.tier.full_tenants == frozenset()


def test_a_listing_goes_on_over_many_pages(host: ObjectRig, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kelp.kv.tiers.objects.upkeep._PAGES_PER_REFRESH", 1)
    story = Story(7, GROUP_BLOCKS)
    host.put_all(story)
    for number in range(1001):
        bucket.client.put_object(Bucket=bucket.name, Key=f"kelp/0{number:04d}", Body=b"")
    host.tier.refresh()
    assert host.count("num_listed") == 0, "the first page is not the last"
    host.tier.refresh()
    assert host.count("num_listed") == 1
    assert host.find(story) == GROUP_BLOCKS
    while keys := bucket.list_keys("kelp/0"):
        bucket.client.delete_objects(Bucket=bucket.name, Delete={"Objects": [{"Key": key} for key in keys]})


def test_without_credentials_the_tier_is_unavailable_and_costs_nothing(
    s3_server: S3Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    aws_environment(monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    host, story = ObjectRig(s3_server, bucket.name), Story(8, GROUP_BLOCKS)
    wait_until(lambda: "no AWS credentials" in caplog.text, "the reason in the log", 30)
    assert not host.tier.is_available
    assert host.tier.state == "starting"
    assert (host.put(story), host.find(story)) == (False, 0)
    with pytest.raises(RetryableTransferError):
        host.tier.forget(None)
    assert host.tier.owed == {None}, "to be gone on with"
    host.close()


def test_credentials_come_from_a_profile_too(
    new_host: Callable[..., ObjectRig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = tmp_path / "credentials"
    profile.write_text(
        f"[store]\naws_access_key_id={os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key={os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_PROFILE", "store")
    assert new_host().put(Story(9, GROUP_BLOCKS))


def test_credentials_that_run_out_are_renewed_without_a_new_process(
    new_host: Callable[..., ObjectRig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    issued = tmp_path / "issued"
    script = tmp_path / "issue.py"
    script.write_text(
        "import datetime, json, os, pathlib\n"
        f"path = pathlib.Path({str(issued)!r})\n"
        "path.write_text(path.read_text() + 'x' if path.exists() else 'x')\n"
        "until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=1)\n"
        f"print(json.dumps(dict(Version=1, AccessKeyId={os.environ['AWS_ACCESS_KEY_ID']!r},\n"
        f"    SecretAccessKey={os.environ['AWS_SECRET_ACCESS_KEY']!r}, Expiration=until.isoformat())))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    host = new_host()
    for seed in (10, 11):
        assert host.put(Story(seed, GROUP_BLOCKS))
    assert len(issued.read_text()) > 1
    assert host.tier.counters.num_starts == 1


def test_an_arena_that_is_not_there_is_said_in_the_log(
    s3_server: S3Server, bucket: Bucket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.object_rig.ArenaMap", lambda _, *fields: ArenaMap("/nonexistent/arena", *fields))
    host = ObjectRig(s3_server, bucket.name)
    wait_until(lambda: "/nonexistent/arena" in caplog.text, "the reason in the log", 30)
    host.close()


def test_the_process_dies_with_its_manager(host: ObjectRig, tmp_path: Path) -> None:
    arena = tmp_path / "arena"
    arena.write_bytes(bytes(4096))
    manager = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(arena)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert manager.stdout is not None
    store = psutil.Process(int(manager.stdout.readline()))
    manager.send_signal(signal.SIGKILL)
    manager.communicate()
    wait_until(lambda: not store.is_running() or store.status() == psutil.STATUS_ZOMBIE, "the end of the process", 10)


def test_no_secret_stands_in_arguments_or_environment_of_the_process(new_host: Callable[..., ObjectRig]) -> None:
    key = b"an encryption key of 32 bytes..."
    store = psutil.Process(new_host(key=key).tier.process_id)
    told = " ".join([*store.cmdline(), *store.environ().values()])
    assert key.decode() not in told
    assert key.hex() not in told
    assert SPACE.hex() not in told
