"""How long a prompt can be kept waiting by others."""

from hypothesis import given
from hypothesis import strategies as st

from kelp.executor.batching.shares import share_out

Lengths = st.lists(st.integers(1, 200), min_size=1, max_size=12)


@given(num_pending=Lengths, budget=st.integers(0, 300))
def test_a_step_uses_its_whole_budget_and_no_more_than_there_is(num_pending, budget):
    shares = share_out(num_pending, budget)
    assert sum(shares) == min(budget, sum(num_pending))
    assert all(0 <= share <= pending for share, pending in zip(shares, num_pending, strict=True))


def steps_until_done(num_pending: list[int], index: int, budget: int) -> int:
    num_steps = 0
    left = list(num_pending)
    while left[index]:
        num_steps += 1
        left = [pending - share for pending, share in zip(left, share_out(left, budget), strict=True)]
    return num_steps


@given(data=st.data(), num_pending=Lengths, budget=st.integers(2, 100))
def test_a_prompt_waits_no_longer_than_its_own_length_times_the_number_of_prompts(data, num_pending, budget):
    index = data.draw(st.integers(0, len(num_pending) - 1))
    bound = -(-len(num_pending) * num_pending[index] // (budget // 2))
    assert steps_until_done(num_pending, index, budget) <= bound


@given(data=st.data(), num_pending=Lengths, budget=st.integers(1, 100))
def test_a_prompt_waits_for_earlier_ones_only_whatever_arrives(data, num_pending, budget):
    index = data.draw(st.integers(0, len(num_pending) - 1))
    left = list(num_pending)
    bound = -(-sum(left[: index + 1]) // (budget - budget // 2))
    for _ in range(bound):
        left += data.draw(st.lists(st.integers(1, 20), max_size=2))
        left = [pending - share for pending, share in zip(left, share_out(left, budget), strict=True)]
        if not left[index]:
            break
    assert left[index] == 0


@given(length=st.integers(1, 100), count=st.integers(1, 8), budget=st.integers(1, 100))
def test_equal_prompts_are_served_one_after_the_other(length, count, budget):
    num_steps = [steps_until_done([length] * count, index, budget) for index in range(count)]
    assert num_steps == [-(-length * (index + 1) // budget) for index in range(count)]
