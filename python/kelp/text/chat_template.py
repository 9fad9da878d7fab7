"""Renders a conversation into a prompt with the model's own Jinja template.

Behaves as transformers' `apply_chat_template(add_generation_prompt=True, tokenize=False)`: same whitespace rules,
`tojson`, `raise_exception`, `strftime_now`, loop controls and `{% generation %}` blocks. Templates run in Jinja's
immutable sandbox, because they come with a downloaded model, and their output is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kelp.core.clock import Clock, SystemClock
from kelp.core.errors import ConfigError, InvalidRequest, NotSupported, PromptTooLong
from kelp.core.request_limits import short_repr
from kelp.text.model_files import read_json, special_token

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)
"""What a template may raise when a message has another shape than it expects."""


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model wrote, for training; here it is plain content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _new_environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    def strftime_now(pattern: str) -> str:
        now = datetime.fromtimestamp(clock.wall_ns() / 1e9, tz=timezone.utc)
        return now.astimezone().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _flat(template: jinja2.Template) -> jinja2.Template:
    """The same with its globals in one dict: jinja reads them anew for every prompt, and its chain of maps is slow."""
    template.globals = dict(template.globals)
    return template


def _template_text(folder: Path, settings: Mapping[str, Any]) -> str | None:
    separate_file = folder / "chat_template.jinja"
    if separate_file.is_file():
        return separate_file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


class ChatTemplate:
    """The chat template of one model folder; a model may have none. May be used from several threads."""

    def __init__(self, folder: Path, max_chars: int, clock: Clock | None = None) -> None:
        """Compile the template.

        Args:
            folder: Holds chat_template.jinja or tokenizer_config.json.
            max_chars: Longest prompt that is rendered.
            clock: What `strftime_now` shows.

        Raises:
            ConfigError: The template does not compile.
        """
        self._max_chars = max_chars
        settings = read_json(folder, "tokenizer_config.json")
        self._variables = {
            name: special_token(settings, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        text = _template_text(folder, settings)
        try:
            environment = _new_environment(clock or SystemClock())
            self._template = None if text is None else _flat(environment.from_string(text))
        except jinja2.TemplateError as error:
            raise ConfigError(f"model.path={folder}: chat template: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt up to where the assistant begins to answer.

        Raises:
            InvalidRequest: The template refuses the conversation.
            NotSupported: The model has no chat template.
            PromptTooLong: The prompt exceeds `max_chars`.
        """
        if self._template is None:
            raise NotSupported("messages: this model has no chat template, send text_input")
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **self._variables
            ):
                num_chars += len(piece)
                if num_chars > self._max_chars:
                    raise PromptTooLong(
                        f"messages: the rendered prompt exceeds the limit of {self._max_chars} characters"
                    )
                pieces.append(piece)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {short_repr(str(error))}"
            ) from None
        return "".join(pieces)
