"""Names of objects: `<prefix>/<space>/<tenant>/<hash of the group's last block>.<variant>`.

Hashes are chained, so the last one names all content of the group: another host finds it by name alone, and no shared
index is needed. The variant says what else has to be equal for an object to be of use: blocks per group, and the key
that it is encrypted with. Everything of a tenant has one prefix, whoever wrote it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kelp.core.types import SequenceHash

_HEX_DIGEST = "([0-9a-f]{32})"


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What an object's key says.

    Attributes:
        is_usable: Of the asker's own space and variant.
    """

    tenant: bytes
    last: SequenceHash
    is_usable: bool


class KeySpace:
    """Keys of one space and variant.

    Args:
        prefix: Of all keys; any slashes around it do not count.
        space: `kv.tiers.records.space_digest`, 16 bytes.
        group_blocks: Blocks per object.
        key_id: `kv.tiers.sealing.Sealer.key_id`; empty where nothing is encrypted.
    """

    def __init__(self, prefix: str, space: bytes, group_blocks: int, key_id: bytes = b"") -> None:
        assert len(space) == 16
        inner = prefix.strip("/")
        self.root = f"{inner}/" if inner else ""
        self._space = space.hex()
        self._variant = f"{group_blocks}-{key_id.hex()}" if key_id else str(group_blocks)
        self._pattern = re.compile(
            rf"{re.escape(self.root)}{_HEX_DIGEST}/{_HEX_DIGEST}/{_HEX_DIGEST}\.(\d+(?:-[0-9a-f]+)?)"
        )

    @property
    def own_prefix(self) -> str:
        """Of all objects of this space, of any variant."""
        return f"{self.root}{self._space}/"

    def key(self, tenant: bytes, last: SequenceHash) -> str:
        """Of the group that ends with block `last`."""
        return f"{self.own_prefix}{tenant.hex()}/{last.hex()}.{self._variant}"

    def tenant_prefix(self, space_prefix: str, tenant: bytes) -> str:
        """Of all objects of a tenant in the space whose prefix is `space_prefix`."""
        return f"{space_prefix}{tenant.hex()}/"

    def parse(self, key: str) -> ObjectName | None:
        """What a key says; None if it is not one of kelp's."""
        match = self._pattern.fullmatch(key)
        if match is None:
            return None
        space, tenant, last, variant = match.groups()
        is_usable = space == self._space and variant == self._variant
        return ObjectName(bytes.fromhex(tenant), SequenceHash(bytes.fromhex(last)), is_usable)
