"""Routing wishes: what clients may say about where."""

from __future__ import annotations

import pytest

from kelp.core.errors import InvalidRequest
from kelp.core.request_limits import RequestLimits
from kelp.core.request_routing import RoutingWishes, read_explained_id, read_wishes

LIMITS = RequestLimits(max_name_bytes=200)


def test_without_parameters_nothing_is_wished() -> None:
    assert read_wishes({"temperature": 1}, LIMITS) == RoutingWishes()
    assert read_explained_id({}, LIMITS) is None


@pytest.mark.parametrize("tags", ["zone=a, rack = r1,", '{"zone": "a", "rack": "r1"}'], ids=["list", "JSON"])
def test_tags_come_as_a_list_or_as_json(tags: str) -> None:
    wishes = read_wishes({"kelp_require_tags": tags, "kelp_prefer_tags": "zone=b", "kelp_worker": "decode_1"}, LIMITS)
    assert wishes == RoutingWishes("decode_1", {"zone": "a", "rack": "r1"}, {"zone": "b"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kelp_worker", 7, "kelp_worker: 7 given, must be a string"),
        ("kelp_worker", "x" * 201, "kelp_worker: 201 bytes exceed the limit of 200"),
        ("kelp_require_tags", "zone", "kelp_require_tags: 'zone' given, must be tag=value"),
        ("kelp_require_tags", "=a", "kelp_require_tags: '=a' given"),
        ("kelp_prefer_tags", '{"zone": 1}', "kelp_prefer_tags.zone: 1 given"),
        ("kelp_prefer_tags", '{"zone"', "is not a JSON object"),
        ("kelp_prefer_tags", ",".join(f"t{n}=v" for n in range(17)), "17 tags given, at most 16"),
    ],
)
def test_a_malformed_wish_is_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_wishes({name: value}, LIMITS)
    assert message in caught.value.text


def test_an_explanation_is_asked_for_by_a_request_id() -> None:
    assert read_explained_id({"kelp_explain": "r1"}, LIMITS) == "r1"
    with pytest.raises(InvalidRequest, match="kelp_explain: empty"):
        read_explained_id({"kelp_explain": ""}, LIMITS)
