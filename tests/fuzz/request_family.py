"""What clients say to `llm`: tensors, the JSON inside them, and guides; up to where a worker would be asked."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pydantic import TypeAdapter

from fuzz.parsers import Family, Label, Parser, check_text
from kelp.core.chat_messages import parse_messages
from kelp.core.errors import InvalidRequest, ProtocolError
from kelp.core.guide_spec import GuideSpec
from kelp.core.messages import GenerateCommand
from kelp.core.preprocess_messages import (
    Prepared,
    PreparedPrompt,
    decode_prepared,
    decode_preprocess_request,
    encode_prepared,
    encode_preprocess_request,
    options_for,
)
from kelp.core.request import Prompt, parse_request
from kelp.core.request_limits import RequestLimits
from kelp.core.request_routing import EXPLAIN, PREFERRED_TAGS, REQUIRED_TAGS, WORKER, read_explained_id
from kelp.core.schema_inputs import LLM_INPUTS_BY_NAME
from kelp.core.types import Role, SequenceHash
from kelp.core.wire import decode_message, encode_message
from kelp.text.chat_template import ChatTemplate
from kelp.text.grammar import GrammarCompiler
from support.request_bounds import assert_within

_LIMITS = RequestLimits(max_request_bytes=4096, max_stop_words=3, max_word_bytes=8, max_name_bytes=64)
_NOT_READ = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_DTYPES = ("u1", "i4", "i8", "f2", "f4", "f8", "b1", "U3", "S3", "M8[s]", "c16", "O")
_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message['content'] | trim }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}{{ call.function.name }}"
    "({{ call.function.arguments | tojson }}){% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _arrays(raw: bytes) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]] | None:
    """Tensors and parameters of a request as Triton hands them over; None if Triton would not."""
    try:
        tensors, parameters = msgspec.msgpack.decode(
            raw, type=tuple[dict[str, Any], dict[str, str | int | bool | float]]
        )
        return {name.split(":")[0]: _array(name, value) for name, value in tensors.items()}, parameters
    except (*_NOT_READ, ValueError, TypeError, OverflowError):
        return None


def _array(name: str, value: Any) -> np.ndarray[Any, Any]:
    """`name:dtype` asks for another type than the schema's."""
    plain, _, dtype = name.partition(":")
    spec = LLM_INPUTS_BY_NAME.get(plain)
    wanted = np.dtype(dtype) if dtype in _DTYPES else np.dtype(spec.datatype.numpy if spec else object)
    if wanted.kind != "O":
        with np.errstate(all="ignore"):
            return np.array(value).astype(wanted)
    items = value if isinstance(value, list) else [value]
    array = np.empty(len(items), dtype=object)
    array[:] = [item if isinstance(item, bytes) else str(item).encode() for item in items]
    return array


def _request(raw: bytes) -> object:
    """A request, and all that is made of it before it reaches a worker."""
    read = _arrays(raw)
    if read is None:
        return None
    tensors, parameters = read
    if read_explained_id(parameters, _LIMITS) is not None:
        return Label("explain")
    request = parse_request(tensors, _LIMITS, parameters)
    assert_within(request, _LIMITS)
    json.dumps(asdict(request.wishes), ensure_ascii=False).encode()
    prompt, options = decode_preprocess_request(encode_preprocess_request(request.prompt, options_for(request, 16)))
    encode_message(
        GenerateCommand(
            request_id="r", role=Role.DECODE, sampling=request.sampling, seed_hash_hex="0" * 32,
            lora_name=request.lora_name[:256], remaining_ms=request.deadline_ms,
        )
    )  # fmt: skip
    if prompt.messages:
        rendered = _template().render(parse_messages(prompt.messages))
        check_text(rendered)
    given = [name for name in request.__dataclass_fields__ if getattr(request, name)]
    return Label(" ".join([prompt.field, *given, "" if options.guide is None else options.guide.kind]))


@functools.cache
def _folder() -> Path:
    """A model's tokenizer and chat template; gone with the process."""
    # It brings torch, which only guides and templates need here.
    from support.guided import write_vocabulary

    folder = Path(tempfile.mkdtemp(prefix="kelp-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _SIZES.append(write_vocabulary(folder).get_vocab_size())
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


_SIZES: list[int] = []


@functools.cache
def _template() -> ChatTemplate:
    return ChatTemplate(_folder(), max_chars=20_000)


@functools.cache
def _compiler() -> GrammarCompiler:
    folder = _folder()
    return GrammarCompiler(folder, _SIZES[0], (_SIZES[0] - 1,))


_GUIDE: TypeAdapter[GuideSpec] = TypeAdapter(GuideSpec)


def _guide(raw: bytes) -> object:
    """A guide as a request brings it, compiled."""
    spec = decode_message(_GUIDE, raw, "guide")
    grammar = _compiler().compile(spec)
    grammar.advance(1)
    return Label(spec.kind)


def _packed(tensors: Mapping[str, Any], **parameters: Any) -> bytes:
    return msgspec.msgpack.encode((tensors, parameters))


def _preprocessed(raw: bytes) -> object:
    """What `preprocess` is asked, and what it answers."""
    read = _arrays(raw)
    if read is None:
        return None
    kinds: list[str] = []
    for decode in (decode_preprocess_request, decode_prepared):
        try:
            kinds.append(type(decode(read[0])).__name__)
        except ProtocolError as error:
            kinds.append(error.text[:40])
    return Label(" ".join(kinds))


_ANSWER = encode_prepared(
    PreparedPrompt(np.arange(3, dtype=np.int32), [SequenceHash(bytes(16))], Prepared(seed_hash_hex="0" * 32), "p")
)
_CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "x"},
]
_SAMPLING = {
    "temperature": 0.5, "seed": 3, "n": 2, "stop": ["a"], "max_tokens": 5, "stop_token_ids": [1], "ignore_eos": False,
    "best_of": 1, "structured_outputs": {"json": {"type": "object"}}, "lora_name": "l", "min_p": "0.1",
}  # fmt: skip
REQUESTS = Family(
    "requests",
    (
        Parser(
            "request", _request,
            (
                _packed({"text_input": b"hi", "max_tokens": [3], "temperature": [0.5], "stream": [True],
                         "stop_words": [b"a", b"b"], "bad_words": [b"c"], "random_seed": [7], "priority": [1],
                         "deadline_ms": [100], "cache_salt": b"s", "session_id": b"t"}),
                _packed({"messages": json.dumps(_CONVERSATION).encode(), "guided_decoding_guide_type": b"json_schema",
                         "guided_decoding_guide": b'{"type":"object"}', "lora_name": b"l"}),
                _packed({"input_ids": [1, 2, 3], "input_lengths": [3], "beam_width": [1], "request_output_len": [4],
                         "return_log_probs": [True], "exclude_input_in_output": [False], "end_id": [2]}),
                _packed({"text_input": b"hi", "sampling_parameters": json.dumps(_SAMPLING).encode()}),
                _packed({"text_input": b"hi", "image": [], "temperature:f8": [1.0]},
                        **{WORKER: "w", REQUIRED_TAGS: "zone=a, rack=b", PREFERRED_TAGS: '{"zone": "a"}',
                           "temperature": "0.1", "seed": 5, "stop": "a"}),
                _packed({}, **{EXPLAIN: "r"}),
            ), "msgpack", (InvalidRequest,),
        ),
        Parser(
            "guide", _guide,
            tuple(
                encode_message(spec) for spec in (
                    GuideSpec(kind="json_schema", text='{"type":"object","properties":{"a":{"type":"integer"}}}'),
                    GuideSpec(kind="regex", text="(a|b)+[0-9]{2,3}"), GuideSpec(kind="choice", choices=("a", "b")),
                    GuideSpec(kind="grammar", text='start: "a" start | "b"'), GuideSpec(kind="json", is_compact=True),
                )
            ), "json", (ProtocolError, InvalidRequest),
        ),
        Parser(
            "preprocess", _preprocessed,
            tuple(
                _packed({f"{name}:{array.dtype.str[1:]}": array.tolist() for name, array in tensors.items()})
                for tensors in (
                    _ANSWER,
                    encode_preprocess_request(
                        Prompt("t"), options_for(parse_request({"text_input": np.array([b"t"], object)}, _LIMITS), 16)
                    ),
                )
            ), "msgpack", (),
        ),
    ),
)  # fmt: skip
