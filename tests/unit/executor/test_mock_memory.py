"""The mock's KV: real memory whose every block says which tokens it was computed from."""

import numpy as np
import pytest

from kelp.core.types import BlockId
from kelp.executor.mock.language import EMPTY, next_states
from kelp.executor.mock.memory import KVMemory, mock_layout

BLOCKS = [BlockId(5), BlockId(0), BlockId(3)]
TOKENS = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.int32)


@pytest.fixture
def memory() -> KVMemory:
    memory = KVMemory(mock_layout(8, 4, "float32", "mock"))
    memory.write(BLOCKS, 0, next_states(EMPTY, TOKENS, 0))
    return memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_a_token_takes_eight_bytes_in_page_aligned_memory(dtype: str, block_size: int) -> None:
    layout = mock_layout(10, block_size, dtype, "mock")
    assert layout.block_bytes == 8 * block_size
    pool = KVMemory(layout).pool
    assert pool.num_bytes == layout.pool_bytes
    assert pool.base_address % 4096 == 0


def test_what_was_written_is_found_and_can_be_continued(memory: KVMemory) -> None:
    assert memory.find_wrong_block(BLOCKS, TOKENS) is None
    more = np.array([*TOKENS, 11], np.int32)
    states = next_states(memory.state_before(BLOCKS, 10), more[10:], 10)
    memory.write_one(BLOCKS, 10, int(states[0]))
    assert memory.find_wrong_block(BLOCKS, more) is None


@pytest.mark.parametrize("cut", range(11))
def test_a_sequence_may_be_written_in_pieces_that_end_anywhere(cut: int) -> None:
    memory = KVMemory(mock_layout(8, 4, "float32", "mock"))
    states = next_states(EMPTY, TOKENS, 0)
    memory.write(BLOCKS, 0, states[:cut])
    memory.write(tuple(BLOCKS), cut, states[cut:])
    assert memory.find_wrong_block(BLOCKS, TOKENS) is None
    assert memory.find_wrong_block([BlockId(1)], TOKENS[:1]) == 0


@pytest.mark.parametrize(
    ("block_ids", "wrong"),
    [([5, 3, 0], 1), ([1, 0, 3], 0), ([5, 0, 4], 2)],
    ids=["two blocks swapped", "an empty first block", "an empty partial block"],
)
def test_the_first_block_that_holds_something_else_is_named(memory: KVMemory, block_ids: list[int], wrong: int) -> None:
    assert memory.find_wrong_block([BlockId(block_id) for block_id in block_ids], TOKENS) == wrong


def test_blocks_of_equal_tokens_after_different_ones_differ(memory: KVMemory) -> None:
    changed = TOKENS.copy()
    changed[0] += 1
    assert memory.find_wrong_block(BLOCKS, changed) == 0
    memory.write(BLOCKS, 0, next_states(EMPTY, changed[:4], 0))
    assert memory.find_wrong_block(BLOCKS, changed) == 1
