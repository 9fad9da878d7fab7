"""KV handoff from prefill to decode workers: rendezvous, announcements, leases and pull transfers.

    decode                                   prefill
    Describe  ────────────────────────────►  PeerDescription (once per incarnation)
    Attach (= heartbeat 0)  ──────────────►  LeaseRenewed, then Announce per finished chunk
    READ of announced blocks, one-sided      (computes the next chunk)
    Heartbeat n  ─────────────────────────►  LeaseRenewed n
                            ◄──────────────  PrefillDone (first token) or HandoffFailed
    Acknowledge  ─────────────────────────►  blocks released

The reader may also come late: an offer stays as long as its lease.
"""

from __future__ import annotations

from kelp.kv.handoff.fetch import FetchPlan, FetchResult
from kelp.kv.handoff.offer import Offer
from kelp.kv.handoff.quarantine import QuarantinedTransferError
from kelp.kv.handoff.reader import HandoffReader
from kelp.kv.handoff.server import HandoffServer

__all__ = [
    "FetchPlan",
    "FetchResult",
    "HandoffReader",
    "HandoffServer",
    "Offer",
    "QuarantinedTransferError",
]
