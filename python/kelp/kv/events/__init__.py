"""KV events between workers and routers, in vLLM's wire format with three additions of our own.

    worker: pool -> publisher -> PUB     [topic, seq, batch]   what entered or left the prefix cache, in order
                              -> ROUTER  [seq]              -> [topic, seq, batch]* [end]    (as vLLM's)
                                         [SNAPSHOT_REQUEST] -> [topic, as-of seq, part]* [end]
                              -> PUB     [digest topic, as-of seq, digest]                   (also the sign of life)

`seq` is 8 bytes, big-endian. Our topics carry the epoch of the incarnation; a digest and a snapshot part are batches
with one more array element, which vLLM's decoders skip. vLLM's publisher reads `SNAPSHOT_REQUEST` as a sequence number
far ahead and answers with the end alone, which tells that it gives no snapshots.
"""

from __future__ import annotations

from kelp.kv.events.publisher import EventPublisher

__all__ = ["EventPublisher"]
