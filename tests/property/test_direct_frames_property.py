"""Frames of a direct channel: however they are cut they arrive whole; whatever comes, the answer is typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kelp.client.direct.frames import LENGTH, FrameReader
from kelp.client.direct.wire import (
    MAX_OUTPUT_TOKENS,
    MAX_OUTPUTS,
    MAX_WORKER_FRAME_BYTES,
    Cancel,
    Control,
    Hello,
    Output,
    Outputs,
    Start,
    decode_router_frame,
    decode_worker_frame,
    encode_frame,
    encode_outputs,
)
from kelp.core.errors import ProtocolError

_MAX = 64
_payloads = st.lists(st.binary(min_size=1, max_size=_MAX), max_size=8)
_numbers = st.integers(0, 2**53 - 1)
_names = st.text(min_size=1, max_size=20)
_router_frames = st.one_of(
    st.builds(Hello, st.integers(0, 2**16 - 1), _names, _names),
    st.builds(Start, _numbers, st.binary(max_size=50), st.binary(max_size=50)),
    st.builds(Cancel, _numbers),
    st.builds(Control, _numbers, st.binary(max_size=50)),
)
_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
_log_probs = st.lists(st.floats(allow_nan=False), max_size=5).map(tuple)
_outputs = st.builds(
    Output, _numbers, _ids, _log_probs, st.binary(max_size=20), st.text(max_size=20), is_last=st.booleans()
)


def framed(payload: bytes) -> bytes:
    return LENGTH.pack(len(payload)) + payload


@given(_payloads, st.data())
def test_frames_arrive_whole_and_in_order_however_they_are_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(framed, payloads))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    reader = FrameReader("peer", _MAX)
    arrived: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        arrived += reader.feed(stream[start:end])
    assert arrived == payloads
    assert reader.num_held_bytes == 0


@given(_payloads, st.one_of(st.just(0), st.integers(_MAX + 1, 2**32 - 1)))
def test_a_frame_of_a_length_that_is_not_allowed_is_refused_before_it_has_come(
    payloads: list[bytes], size: int
) -> None:
    reader = FrameReader("peer", _MAX)
    with pytest.raises(ProtocolError, match=f"peer: frame of {size} bytes, the limit is {_MAX}"):
        reader.feed(b"".join(map(framed, payloads)) + LENGTH.pack(size))


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_a_reader_holds_no_more_than_one_frame_whatever_comes(chunks: list[bytes]) -> None:
    reader = FrameReader("peer", _MAX)
    try:
        for chunk in chunks:
            reader.feed(chunk)
            assert reader.num_held_bytes < LENGTH.size + _MAX
    except ProtocolError:
        pass


@given(_router_frames)
def test_what_a_router_sends_arrives_as_it_was(frame: Hello | Start | Cancel | Control) -> None:
    (raw,) = FrameReader("router", 2**20).feed(bytes(encode_frame(frame)))
    assert decode_router_frame(raw, "router") == frame


@given(st.lists(_outputs, max_size=5))
def test_what_a_worker_says_arrives_as_it_was(outputs: list[Output]) -> None:
    frames = FrameReader("worker", MAX_WORKER_FRAME_BYTES).feed(b"".join(map(bytes, encode_outputs(outputs))))
    assert len(frames) == bool(outputs)
    told = [decode_worker_frame(raw, "worker") for raw in frames]
    assert [item for frame in told if isinstance(frame, Outputs) for item in frame.items] == outputs


def test_outputs_beyond_the_limits_of_a_frame_are_spread_over_several_and_lose_nothing() -> None:
    num_tokens = 2 * MAX_OUTPUT_TOKENS + 3
    long = Output(0, tuple(range(num_tokens)), (-0.5,) * num_tokens, b"{}", "", True)
    outputs = [long, *(Output(number, (number,), (0.0,)) for number in range(1, 2 * MAX_OUTPUTS))]
    reader = FrameReader("worker", MAX_WORKER_FRAME_BYTES)
    items: list[Output] = []
    for buffer in encode_outputs(outputs):
        (raw,) = reader.feed(bytes(buffer))
        frame = decode_worker_frame(raw, "worker")
        assert isinstance(frame, Outputs)
        items += frame.items
    assert [token for item in items if item.number == 0 for token in item.token_ids] == list(range(num_tokens))
    assert [item.is_last for item in items if item.number == 0] == [False, False, True]
    assert [item.number for item in items if item.number] == list(range(1, 2 * MAX_OUTPUTS))


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"\x92\x02\xff", "number|Expected|Invalid"),
        (b"\x92\x02\x01\x00", "trailing|MessagePack"),
        (b"\x93\x02\x01\x01", "length"),
        (b"\x92\x09\x01", "Invalid value 9"),
        (b"\xc1", "."),
    ],
    ids=["negative number", "more behind it", "more fields", "unknown kind", "no MessagePack"],
)
def test_a_wrong_frame_of_a_router_is_refused(raw: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        decode_router_frame(raw, "router")
