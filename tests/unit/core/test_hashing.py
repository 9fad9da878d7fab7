"""Block identity: chained, salted, and fixed by vectors."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kelp.core.hashing import child_hash, seed_hash, sequence_hashes

_TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=70)


def test_vectors_hold_so_that_persisted_names_stay_valid():
    assert seed_hash("model").hex() == "66af9e4727c7435f36f03d3f1e4105c6"
    assert seed_hash("model", "lora", "salt").hex() == "cf590c1356cca43134aacafc3adfeaa3"
    assert child_hash(seed_hash("model"), range(16)).hex() == "96fd3cc25fc11adb647a29de2f883e34"


@given(_TOKENS, st.integers(1, 20))
def test_every_full_block_has_a_name_and_a_partial_tail_has_none(tokens, block_size):
    assert len(sequence_hashes(tokens, block_size, seed_hash("m"))) == len(tokens) // block_size


@given(_TOKENS, _TOKENS)
def test_equal_prefixes_have_equal_names_and_nothing_else_has(left, right):
    seed = seed_hash("m")
    names = zip(sequence_hashes(left, 4, seed), sequence_hashes(right, 4, seed), strict=False)
    for index, (ours, theirs) in enumerate(names):
        end = (index + 1) * 4
        assert (ours == theirs) == (left[:end] == right[:end])


def test_arrays_and_lists_have_the_same_names():
    tokens = list(range(40))
    seed = seed_hash("m")
    assert sequence_hashes(tokens, 8, seed) == sequence_hashes(np.array(tokens, np.int32), 8, seed)


def test_another_model_lora_or_salt_shares_no_name():
    seeds = [seed_hash("m"), seed_hash("n"), seed_hash("m", "l"), seed_hash("m", "", "l"), seed_hash("m", "l", "s")]
    names = [sequence_hashes(range(32), 16, seed) for seed in seeds]
    assert len({name for row in names for name in row}) == 10


def test_no_two_splits_of_a_text_into_fields_share_a_seed():
    assert len({seed_hash("ab", "c"), seed_hash("a", "bc"), seed_hash("abc"), seed_hash("ab", "", "c")}) == 4
