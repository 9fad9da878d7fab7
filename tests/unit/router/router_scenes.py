"""What scenes with a whole router have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import numpy as np
from router_rig import letters, prefill_record, record

from support.exchange import FakeExchange
from support.waiting import until

STREAM = {"stream": np.array([True])}
PAIR = (prefill_record(), record("decode"))


def run(scene: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(scene())


def tokens(text: str) -> tuple[int, ...]:
    return tuple(letters(text))


def max_tokens(count: int) -> dict[str, np.ndarray]:
    return {"max_tokens": np.array([count], dtype=np.int32)}


async def sent(exchange: FakeExchange, num_tokens: int) -> None:
    await until(lambda: len(exchange.token_ids) >= num_tokens, f"{num_tokens} tokens sent")
