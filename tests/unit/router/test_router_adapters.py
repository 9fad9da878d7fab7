"""Requests with a LoRA adapter: every worker of every sequence hears its name and content."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from router_rig import job, open_router, record
from router_scenes import PAIR, STREAM, run, tokens

from kelp.core.preprocess_messages import Prepared
from kelp.core.types import FinishReason, Role
from support.exchange import bytes_tensor

DIGEST = "0f" * 16


def test_both_workers_are_told_the_adapter() -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            _, request = rig.ask(**STREAM, lora_name=bytes_tensor("sql"))
            prefill, decode = await rig.workers.stream(0), await rig.workers.stream(1)
            assert {prefill.command.role, decode.command.role} == {Role.PREFILL, Role.DECODE}
            assert (prefill.command.lora_name, decode.command.lora_name) == ("sql", "sql")
            prefill.finish(FinishReason.STOP, *tokens("a"))
            await request

    run(scene)


def test_each_sequence_has_the_adapter() -> None:
    async def scene() -> None:
        async with open_router(record("d1")) as rig:
            sequences = np.array([2], dtype=np.int32)
            _, request = rig.ask(**STREAM, lora_name=bytes_tensor("sql"), num_return_sequences=sequences)
            (await rig.workers.stream(0)).finish(FinishReason.STOP, *tokens("a"))
            (await rig.workers.stream(1)).finish(FinishReason.STOP, *tokens("b"))
            await request
            assert [stream.command.lora_name for stream in rig.workers.streams] == ["sql", "sql"]

    run(scene)


def test_a_command_says_which_content_the_prompt_was_hashed_with() -> None:
    plain = job()
    plain.prompt = replace(plain.prompt, message=Prepared(seed_hash_hex="0" * 32, lora_digest=DIGEST))
    assert plain.command(Role.AGGREGATED, None, 0).lora_digest == DIGEST
    assert job().command(Role.AGGREGATED, None, 0).lora_digest == ""
