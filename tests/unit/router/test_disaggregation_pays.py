"""Whether a prefill worker pays: two predicted completions, and what others are made to wait."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kelp.core.types import Role
from kelp.router.decision.costs import Costs
from kelp.router.decision.disaggregation import Ways, Weights, pays
from kelp.router.decision.selector import FirstToken
from support.selector_rig import Rig, hashes, worker

MEASURED = SimpleNamespace(is_measured=True, is_transfer_measured=True)
NEUTRAL = Weights(itl=1.0, stall=1.0)


def _costs(**columns: float | list[float]) -> Costs:
    names = [name for name in Costs.__dataclass_fields__ if name not in ("slots", "overlap_tiers")]
    fields: dict[str, object] = {name: np.zeros(2) for name in names}
    fields |= {"slots": np.arange(2, dtype=np.intp), "overlap_tiers": None, "usual_output": 101.0}
    for name, value in columns.items():
        fields[name] = np.array(value, float) if isinstance(value, list) else value
    return Costs(**fields)  # type: ignore[arg-type]


def _pays(weights: Weights = NEUTRAL, max_tokens: int = 1000, **figures: float) -> bool:
    """Worker 0 would do everything; worker 1 would decode what a prefill worker has computed."""
    get = figures.get
    alone = _costs(
        ttft_s=[get("alone_ttft_s", 1.0), 0.0], compute_s=[get("compute_s", 0.0), 0.0], num_decoding=[4.0, 0.0]
    )
    prefill = _costs(ttft_s=[get("prefill_ttft_s", 1.0), 0.0])
    decode = _costs(transfer_s=[0.0, get("transfer_s", 0.0)], itl_s=[get("alone_itl_s", 0.0), get("decode_itl_s", 0.0)])
    ways = Ways((alone, 0), (prefill, 0), (decode, 1), max_tokens)
    return pays(MEASURED, ways, weights)  # type: ignore[arg-type]


def test_the_sooner_first_token_wins_transfer_included() -> None:
    assert _pays(prefill_ttft_s=0.6, transfer_s=0.3)
    assert not _pays(prefill_ttft_s=0.6, transfer_s=0.5)


def test_a_stall_of_others_counts_by_its_weight() -> None:
    assert _pays(prefill_ttft_s=1.3, compute_s=0.1)
    assert not _pays(Weights(itl=1.0, stall=0.5), prefill_ttft_s=1.3, compute_s=0.1)


@pytest.mark.parametrize(("decode_itl_s", "expected"), [(0.014, True), (0.016, False)])
def test_tokens_that_come_later_count_for_as_long_as_answers_are(decode_itl_s: float, expected: bool) -> None:
    figures = {"prefill_ttft_s": 0.5, "alone_itl_s": 0.01, "decode_itl_s": decode_itl_s}
    assert _pays(**figures) is expected
    assert _pays(Weights(itl=0.0, stall=1.0), **figures), "not where they have no weight"
    assert _pays(max_tokens=50, **figures), "nor beyond what may be generated"


def test_a_request_for_one_token_has_none_that_come_later() -> None:
    assert _pays(max_tokens=1, prefill_ttft_s=0.9, decode_itl_s=100.0)


@pytest.mark.parametrize(("stall_weight", "expected"), [(0.0, ("d",)), (1000.0, ("p", "d"))])
def test_the_weights_are_those_of_the_configuration(stall_weight: float, expected: tuple[str, ...]) -> None:
    fleet = [worker("p", Role.PREFILL), worker("d", Role.DECODE)]
    rig = Rig(fleet, disaggregation_stall_weight=stall_weight)
    rig.learn()
    names = hashes(*range(100))
    rig.index.blocks[1] = set(names[:50])
    for number in range(4):
        rig.place(rig.request(160, request_id=f"running-{number}"))
        rig.selector.first_token(f"running-{number}", FirstToken(0, 0.0, 0.1))
    assert rig.place(rig.request(1601, block_hashes=names)).worker_ids == expected
