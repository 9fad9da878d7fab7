"""Valid documents that several families begin from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from fuzz.parsers import Parser
from kelp.core.guide_spec import GuideSpec
from kelp.core.handoff_messages import PeerDescription
from kelp.core.messages import GenerateCommand, Rendezvous, SamplingParams
from kelp.core.types import HandoffShape, Role, WorkerState
from kelp.core.wire import Message, decode_message, encode_message
from kelp.registry.base import KvManagerRecord, LayoutRecord, RouterRecord, TrafficRecord, WorkerRecord
from kelp.transport.metadata import pack_metadata

LAYOUT = LayoutRecord(
    num_blocks=4, num_layers=1, num_kv_heads=1, block_size=16, head_dim=2, dtype="float32", model_id="m"
)
COMMAND = GenerateCommand(request_id="r", role=Role.DECODE, sampling=SamplingParams(), seed_hash_hex="0" * 32)
RICH_COMMAND = GenerateCommand(
    request_id="r2", role=Role.PREFILL, seed_hash_hex="a" * 32, num_generated=1, remaining_ms=5.0, lora_name="l",
    lora_digest="b" * 32, tenant_hex="c" * 32, lower_tier_blocks=2, wants_receipt=True,
    rendezvous=Rendezvous(handoff_id="h", endpoint="h:1", prefill_epoch="e"),
    sampling=SamplingParams(
        temperature=1.0, stop_token_ids=(1, 2), bad_words_ids=((1, 2), (3,)),
        guide=GuideSpec(kind="choice", choices=("a", "b")),
    ),
)  # fmt: skip
DESCRIPTION = PeerDescription(
    worker="w", epoch="e", agent_name="a", agent_metadata_hex=pack_metadata("nixl", "a", b"x").hex(), base_address=1,
    device="cpu", **LAYOUT.model_dump(),
)  # fmt: skip
WORKER = WorkerRecord(
    worker_id="w", epoch="e", model_name="m", role=Role.DECODE, state=WorkerState.READY, endpoint="h:1",
    direct_endpoint="h:2", handoff_endpoint="[::1]:3", handoff_shape=HandoffShape.RENDEZVOUS, events_endpoint="h:4",
    replay_endpoint="h:5", kv_manager_id="k", max_step_tokens=9, tags={"zone": "a"}, version="v2", text_id="t",
    layout=LAYOUT,
)  # fmt: skip
MANAGER = KvManagerRecord(manager_id="m", epoch="e", host="h", endpoint="h:1", model_name="m", events_endpoint="h:6")
ROUTER = RouterRecord(router_id="r", epoch=1, loads_endpoint="h:1", answers_endpoint="h:2")
TRAFFIC = TrafficRecord(shares={"base": 90.0, "v2": 10.0}, before={"base": 1.0})


def document_parser(name: str, adapter: TypeAdapter[Any], *examples: Message) -> Parser:
    """A parser of JSON documents of the wire."""
    parse: Callable[[bytes], object] = lambda raw: decode_message(adapter, raw, "peer")  # noqa: E731
    return Parser(name, parse, tuple(map(encode_message, examples)), "json")
