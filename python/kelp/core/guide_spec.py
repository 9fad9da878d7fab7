"""What a request demands of the form of its output, as it travels from client to worker.

Bounded and hashable, so that it may be a cache key. Whether a grammar is well-formed is for `text.grammar` to say.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_GUIDE_BYTES = 64 * 1024
"""A schema, a regex, a grammar, or all choices together, UTF-8."""
MAX_CHOICES = 1024

_GuideText = Annotated[str, Field(max_length=MAX_GUIDE_BYTES)]
GuideKind = Literal["json", "json_schema", "regex", "choice", "grammar"]


class GuideSpec(BaseModel):
    """A grammar that the whole output must match.

    Attributes:
        kind: `json` is any JSON object; `json_schema` one that a schema describes; `regex` text that matches from
            beginning to end; `choice` one of several texts; `grammar` what a context-free grammar derives.
        text: The schema, the regex (Rust's dialect) or the grammar (GBNF or Lark).
        choices: Of kind `choice`, none of them empty.
        is_compact: Of the JSON kinds: no white space between tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: GuideKind
    text: _GuideText = ""
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MAX_CHOICES)] = ()
    is_compact: bool = False

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> GuideSpec:
        if bool(self.text) != (self.kind in ("json_schema", "regex", "grammar")):
            raise ValueError(f"text: {len(self.text)} characters do not suit kind {self.kind}")
        if bool(self.choices) != (self.kind == "choice"):
            raise ValueError(f"choices: {len(self.choices)} do not suit kind {self.kind}")
        if self.is_compact and self.kind not in ("json", "json_schema"):
            raise ValueError(f"is_compact: does not suit kind {self.kind}")
        num_bytes = len(self.text.encode()) + sum(len(choice.encode()) for choice in self.choices)
        if num_bytes > MAX_GUIDE_BYTES:
            raise ValueError(f"{num_bytes} bytes exceed the limit of {MAX_GUIDE_BYTES}")
        return self
