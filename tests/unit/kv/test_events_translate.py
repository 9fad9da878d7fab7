"""Names for other engines' blocks."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from kelp.core.types import SequenceHash, Tier
from kelp.kv.events.codec import AllBlocksCleared, BlockRemoved, BlockStored, ForeignEvent, decode_foreign
from kelp.kv.events.translate import ForeignNames

RECORDED = json.loads((Path(__file__).parent / "vllm_frames.json").read_text())
SIZE = 4


def seed_of(lora_name: str, cache_salt: str) -> SequenceHash | None:
    return None if lora_name == "unknown" else seed_hash("m", lora_name, cache_salt)


def names(**limits: int) -> ForeignNames:
    return ForeignNames(SIZE, seed_of, **limits)


def chain(tokens: list[int], lora: str = "", salt: str = "") -> list[SequenceHash]:
    return sequence_hashes(tokens, SIZE, seed_hash("m", lora, salt))


def stored(hashes: list[int | bytes], parent: int | bytes | None, tokens: list[int], **fields: object) -> BlockStored:
    return BlockStored(hashes, parent, tokens, SIZE, **fields)  # type: ignore[arg-type]


def raw_keys(*keys: object) -> list[msgspec.Raw]:
    return [msgspec.Raw(msgspec.msgpack.encode(key)) for key in keys]


def test_recorded_vllm_events_get_the_names_of_equal_prompts() -> None:
    batches = [decode_foreign(bytes.fromhex(frames[3]), 1 << 20).events for frames in RECORDED["frames"][:-1]]
    translator = names()
    prompt = chain(list(range(12)))
    salted, styled = chain([5] * 4, salt="salt"), chain([6] * 4, lora="style")
    assert [translator.translate(events) for events in batches] == [
        [BlocksStored(tuple(prompt[:2]), None)],
        [BlocksStored((prompt[2],), prompt[1])],
        [BlocksStored(tuple(salted), None)],
        [BlocksStored(tuple(styled), None)],
        [],
        [BlocksStored((prompt[2],), prompt[1], Tier.HOST), BlocksRemoved((prompt[2],))],
        [BlocksRemoved((prompt[2],), Tier.HOST), BlocksRemoved(tuple(salted))],
    ]
    assert translator.num_dropped == {"content": 1, "parent": 1}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (stored([1], 99, [1, 2, 3, 4]), "parent"),
        (stored([1], None, [1, 2, 3]), "tokens"),
        (BlockStored([1], None, [1, 2], 2), "block_size"),
        (stored([1], None, [1, 2, 3, 4], medium="TAPE"), "medium"),
        (stored([1], None, [1, 2, 3, 4], lora_id=3), "content"),
        (stored([1], None, [1, 2, 3, 4], lora_id=3, lora_name="unknown"), "adapter"),
        (stored([1], None, [1, 2, 3, 4], extra_keys=[raw_keys("a", "b")]), "content"),
        (stored([1], None, [1, 2, 3, 4], extra_keys=[raw_keys(b"digest")]), "content"),
        (stored([1], None, [1, 2, 3, 4], group_idx=1, kv_cache_spec_kind="sliding_window"), "group"),
        (stored([1], None, []), "unknown"),
    ],
)
def test_a_block_that_is_not_told_in_full_is_left_out_and_counted(event: BlockStored, reason: str) -> None:
    translator = names()
    assert translator.translate([event]) == []
    assert translator.num_dropped == {reason: 1}


def test_blocks_before_an_image_are_named_and_those_behind_it_are_not() -> None:
    translator = names()
    event = stored([1, 2, 3], None, list(range(12)), extra_keys=[None, raw_keys(["image", 0]), None])
    assert translator.translate([event]) == [BlocksStored(tuple(chain(list(range(4)))), None)]
    assert translator.translate([stored([4], 3, [1] * 4)]) == []


def test_of_a_hybrid_model_the_group_with_whole_prefixes_counts() -> None:
    translator = names()
    window = stored([1], None, [1] * 4, group_idx=0, kv_cache_spec_kind="sliding_window")
    full = stored([1], None, [1] * 4, group_idx=1, kv_cache_spec_kind="full_attention")
    expected: list[KVEvent] = [BlocksStored(tuple(chain([1] * 4)), None)]
    assert translator.translate([window, full]) == expected
    assert translator.translate([BlockRemoved([1], "GPU", 0)]) == []
    assert translator.translate([BlockRemoved([1], "GPU", 1)]) == [BlocksRemoved(tuple(chain([1] * 4)))]


def test_a_removal_that_stores_nothing_we_named_is_no_event() -> None:
    assert names().translate([BlockRemoved([1, 2], "GPU")]) == []


def test_names_are_bounded_and_blocks_that_are_gone_make_room() -> None:
    translator = names(max_names=2)
    events: list[ForeignEvent] = [stored([1, 2, 3], None, list(range(12)))]
    assert translator.translate(events) == [BlocksStored(tuple(chain(list(range(8)))), None)]
    assert translator.num_dropped == {"memory": 1}
    translator.translate([BlockRemoved([2], "GPU")])
    assert translator.translate([stored([7], None, [7] * 4)]) == [BlocksStored(tuple(chain([7] * 4)), None)]


def test_a_child_finds_its_parent_after_the_parent_is_gone() -> None:
    translator = names()
    prompt = chain(list(range(8)))
    translator.translate([stored([1], None, list(range(4))), BlockRemoved([1], "GPU")])
    assert translator.translate([stored([2], 1, list(range(4, 8)))]) == [BlocksStored((prompt[1],), prompt[0])]


def test_clearing_forgets_all_names() -> None:
    translator = names()
    translator.translate([stored([1], None, [1] * 4)])
    assert translator.translate([AllBlocksCleared(), stored([2], 1, [2] * 4)]) == [BlocksCleared()]
