"""What NIXL cannot do with a bucket: credentials, listing, deleting, and telling why a request failed.

The only user of botocore, which is what boto3 is made of: without the rest of it the process starts twice as fast.
Credentials come from the standard AWS sources (environment, profiles, container and instance roles); temporary ones
are renewed by botocore whenever they are asked for. Part of the object-store process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from botocore.session import Session

from kelp.core.errors import ConfigError, RetryableTransferError
from kelp.kv.tiers.objects.messages import Listed, StoreAddress
from kelp.transport.nixl.objects import Credentials

_NO_ANSWER = (ResponseParserError, LookupError, ValueError, TypeError)
"""What botocore, and whoever looks into its dicts, raises when what came is no answer of an object store."""
PAGE_OBJECTS = 1000
"""Most objects that S3 lists or deletes at once."""


class Bucket:
    """See the module docstring.

    Args:
        timeout_s: For a connection, and for every silence of the store.
    """

    def __init__(self, address: StoreAddress, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._session = Session()

    def credentials(self) -> Credentials:
        """Those that hold now. May ask a role's service, and block for that.

        Raises:
            ConfigError: There are none.
            RetryableTransferError: They could not be renewed.
        """
        try:
            found = self._session.get_credentials()
            frozen = found.get_frozen_credentials() if found is not None else None
        except (BotoCoreError, ClientError) as error:
            raise RetryableTransferError(f"object store: AWS credentials: {error}") from error
        if frozen is None or not frozen.access_key or not frozen.secret_key:
            raise ConfigError("object_tier.bucket: no AWS credentials in environment, profile or role")
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token or "")

    @cached_property
    def _client(self) -> Any:
        config = Config(
            connect_timeout=self._timeout_s,
            read_timeout=self._timeout_s,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path" if self._address.endpoint else "auto"},
        )
        endpoint = self._address.endpoint or None
        return self._session.create_client("s3", endpoint_url=endpoint, region_name=self._address.region, config=config)

    def size_bytes(self, key: str) -> int | None:
        """Size of an object; None if there is none.

        Raises:
            RetryableTransferError: The store refused or did not answer; says why.
        """
        with _typed():
            try:
                return int(self._client.head_object(Bucket=self._address.bucket, Key=key)["ContentLength"])
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:
                    raise
            self._client.head_bucket(Bucket=self._address.bucket)
            return None

    def page(self, prefix: str, token: str) -> tuple[tuple[Listed, ...], str]:
        """Objects below `prefix` in order of their keys, and where the next page begins (empty: nowhere).

        Raises:
            RetryableTransferError: The store refused or did not answer.
        """
        where = {"Bucket": self._address.bucket, "Prefix": prefix, "MaxKeys": PAGE_OBJECTS}
        with _typed():
            page = self._client.list_objects_v2(**where, **({"ContinuationToken": token} if token else {}))
            objects = [
                Listed(item["Key"], int(item["Size"]), item["LastModified"].timestamp())
                for item in page.get("Contents", ())
            ]
        return tuple(objects), page.get("NextContinuationToken", "") if page.get("IsTruncated") else ""

    def folders(self, root: str) -> tuple[str, ...]:
        """Prefixes right below `root`, the first thousand.

        Raises:
            RetryableTransferError: The store refused or did not answer.
        """
        with _typed():
            page = self._client.list_objects_v2(Bucket=self._address.bucket, Prefix=root, Delimiter="/")
            return tuple(item["Prefix"] for item in page.get("CommonPrefixes", ()))

    def delete(self, keys: Sequence[str]) -> tuple[int, str]:
        """Delete objects, `PAGE_OBJECTS` at most; gives how many are gone and why others are not.

        Raises:
            RetryableTransferError: The store refused or did not answer.
        """
        doomed = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        with _typed():
            errors = self._client.delete_objects(Bucket=self._address.bucket, Delete=doomed).get("Errors", [])
        reason = f"object store: delete: {errors[0].get('Code')}: {errors[0].get('Message')}" if errors else ""
        return len(keys) - len(errors), reason


@contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise RetryableTransferError(f"object store: {error}") from error
    except _NO_ANSWER as error:
        reason = f"{type(error).__name__}: {error}"
        raise RetryableTransferError(f"object store: its answer makes no sense: {reason}") from error
