"""What a sequence needs of guided decoding: which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Guide(Protocol):
    """The grammar of one sequence and how far its output has come. Called from the engine's thread only."""

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and nothing may follow."""

    @property
    def error(self) -> str:
        """Why the output cannot go on, a token that was refused or a grammar that became too complex; else empty."""

    def allowed(self, draft: Sequence[int]) -> list[npt.NDArray[np.int32]]:
        """Bitmasks as `SamplePoint.allowed` takes them: after the output, and after each further draft token.

        Shorter than `len(draft) + 1` if the grammar refuses a draft token, or is finished with one: what follows it
        is not worth computing.
        """

    def accept(self, token_id: int) -> None:
        """The output goes on with this token; one that may not come is an `error`."""
