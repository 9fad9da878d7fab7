"""What `executor.base.Executor` promises to the two sides of a handoff, on every engine that runs here."""

import pytest
from executor_harness import BLOCK_SIZE, NUM_BLOCKS, PROMPT, Client, copy_missing_blocks

from kelp.core.errors import InvalidRequest
from kelp.core.types import FinishReason, Role, num_blocks_for
from kelp.executor.base import Completed, Prefilled, Reserved, Tokens


def test_a_prefill_announces_every_prompt_block_and_yields_one_token(client):
    recorder = client.submit(PROMPT, Role.PREFILL, max_tokens=6)
    assert recorder.finish_reason() is None
    announcements = [event for event in recorder.events if isinstance(event, Prefilled)]
    assert announcements[-1].num_tokens == len(PROMPT)
    assert len(set(recorder.announced)) == num_blocks_for(len(PROMPT), BLOCK_SIZE)
    assert recorder.tokens == client.aggregated_tokens(PROMPT, max_tokens=1)


def test_exported_blocks_stay_held_until_released(client):
    recorder = client.submit(PROMPT, Role.PREFILL)
    recorder.end()
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS - 3
    for _ in range(2):
        client.executor.release_export(recorder.request_id)
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2}])
def test_a_handoff_gives_the_tokens_of_an_aggregated_run(build, sampling):
    source, target = Client(build()), Client(build())
    expected = source.aggregated_tokens(PROMPT, max_tokens=9, **sampling)
    exported = source.submit(PROMPT, Role.PREFILL, max_tokens=9, **sampling)
    imported = target.submit(PROMPT, Role.DECODE, max_tokens=9, **sampling)
    reserved = imported.wait_for(Reserved)
    exported.end()
    num_moved = copy_missing_blocks(source.executor, exported.announced, target.executor, reserved)
    source.executor.release_export(exported.request_id)
    first = exported.wait_for(Tokens)
    target.executor.complete_import(imported.request_id, first.token_ids[0], first.log_probs[0], num_moved)
    end = imported.end()
    assert isinstance(end, Completed)
    assert exported.tokens + imported.tokens == expected
    assert end.usage.transferred_blocks == num_moved == 3
    source.settle()
    assert source.num_unheld_blocks() == target.num_unheld_blocks() == NUM_BLOCKS


def test_a_failed_import_is_computed_locally(client):
    expected = client.aggregated_tokens(PROMPT, max_tokens=5)
    imported = client.submit(PROMPT, Role.DECODE, max_tokens=5)
    imported.wait_for(Reserved)
    client.executor.fail_import(imported.request_id)
    assert imported.finish_reason() is FinishReason.LENGTH
    assert imported.tokens == expected


def test_an_import_aborted_before_completion_keeps_its_blocks_until_end_import(client):
    imported = client.submit(PROMPT, Role.DECODE)
    reserved = imported.wait_for(Reserved)
    client.executor.abort(imported.request_id)
    assert imported.finish_reason() is FinishReason.CANCELLED
    assert client.num_unheld_blocks() == NUM_BLOCKS - len(reserved.block_ids)
    client.executor.end_import(imported.request_id)
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_a_prefill_needs_room_for_its_prompt_only(client):
    recorder = client.submit([1] * 95, Role.PREFILL, max_tokens=33)
    assert recorder.finish_reason() is None


def test_an_id_is_refused_while_anything_of_it_is_held_and_free_afterwards(client):
    client.submit(PROMPT, Role.PREFILL, request_id="twice").end()
    with pytest.raises(InvalidRequest, match="'twice' is in use"):
        client.submit(PROMPT, request_id="twice")
    client.executor.release_export("twice")
    client.settle()
    assert client.submit(PROMPT, request_id="twice").finish_reason() is FinishReason.LENGTH
