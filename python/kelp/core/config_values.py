"""What all groups of the configuration are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]


class Group(BaseModel):
    """Fields that belong together; frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
