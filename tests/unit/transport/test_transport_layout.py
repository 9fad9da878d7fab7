from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kelp.core.errors import ProtocolError
from kelp.core.handoff_messages import PeerDescription
from kelp.core.types import BlockId, KVLayout
from kelp.transport.base import Region
from kelp.transport.layout import check_read, check_regions, descriptor_rows, peer_region
from kelp.transport.metadata import pack_metadata, unpack_metadata

LAYOUT = KVLayout(8, num_layers=2, num_kv_heads=2, block_size=4, head_dim=8, dtype="bfloat16", model_id="m")


def description(**changes: object) -> PeerDescription:
    return PeerDescription.model_validate(
        {
            "worker": "prefill",
            "epoch": "e",
            "agent_name": "a",
            "agent_metadata_hex": "00",
            "base_address": 4096,
            "device": "cpu",
            **dataclasses.asdict(LAYOUT),
            **changes,
        }
    )


def test_a_compatible_description_becomes_a_region_of_its_own_length() -> None:
    region = peer_region(LAYOUT, description(num_blocks=100))
    assert region == Region(4096, 100, LAYOUT.block_bytes, "cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 3),
        ("num_kv_heads", 1),
        ("block_size", 8),
        ("head_dim", 4),
        ("dtype", "float8"),
        ("model_id", "n"),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(field: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=f"{field} is {value!r}, this worker needs {getattr(LAYOUT, field)!r}"):
        peer_region(LAYOUT, description(**{field: value}))


@pytest.mark.parametrize("changes", [{"num_blocks": 2**31 - 1}, {"base_address": 2**64 - 1}])
def test_a_pool_beyond_all_memory_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        peer_region(LAYOUT, description(**changes))


def test_each_block_gets_one_descriptor_row() -> None:
    rows = descriptor_rows(Region(1000, 3, 64, "cuda:2"))
    assert rows.tolist() == [[1000, 64, 2], [1064, 64, 2], [1128, 64, 2]]
    assert rows.dtype == np.uint64


@pytest.mark.parametrize(
    ("remote_ids", "local_ids", "complaint"),
    [
        ([0, 4], [0, 1], "remote_ids: block id 4"),
        ([0], [-1], "local_ids: block id -1"),
        ([0, 1], [0], "2 remote ids for 1"),
    ],
)
def test_a_read_with_ids_outside_a_pool_is_refused(
    remote_ids: list[BlockId], local_ids: list[BlockId], complaint: str
) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        check_read(Region(0, 2, 64, "cpu"), Region(0, 4, 64, "cpu"), remote_ids, local_ids)


def test_pools_with_different_block_sizes_do_not_connect() -> None:
    with pytest.raises(ProtocolError, match="block_bytes is 32"):
        check_regions(Region(0, 2, 64, "cpu"), Region(0, 2, 32, "cpu"))


def test_pools_may_space_their_blocks_differently() -> None:
    local, remote = Region(0, 2, 64, "cpu", stride_bytes=4096), Region(0, 2, 64, "cpu")
    assert check_regions(local, remote) is local
    assert check_regions(remote, local) is remote


def test_a_pool_whose_blocks_overlap_is_refused() -> None:
    with pytest.raises(ProtocolError, match="stride_bytes is 63"):
        check_regions(Region(0, 2, 64, "cpu"), Region(0, 2, 64, "cpu", stride_bytes=63))


def test_metadata_survives_its_envelope() -> None:
    packed = pack_metadata("nixl", "worker:1", b"\0binary\xff")
    assert unpack_metadata("nixl", packed) == ("worker:1", b"\0binary\xff")


def test_metadata_of_another_transport_is_refused() -> None:
    with pytest.raises(ProtocolError, match="kelp-nixl"):
        unpack_metadata("nixl", pack_metadata("local", "worker:1", b""))


def test_any_damaged_byte_of_the_metadata_is_noticed() -> None:
    packed = pack_metadata("nixl", "worker:1", b"connection")
    for position in range(len(packed)):
        damaged = bytearray(packed)
        damaged[position] ^= 1
        with pytest.raises(ProtocolError):
            unpack_metadata("nixl", bytes(damaged))
    with pytest.raises(ProtocolError):
        unpack_metadata("nixl", packed[:-1])


@pytest.mark.parametrize("name", ["", "\u00e9", "n" * 1000])
def test_an_agent_name_that_cannot_be_addressed_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="agent name"):
        unpack_metadata("nixl", pack_metadata("nixl", name, b"connection"))
