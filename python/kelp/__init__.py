"""kelp: KV-aware Ensemble for LLM Prefill/decode, a Triton model repository.

Everything that makes kelp work without Triton's Python backend lives here; `kelp_triton` is the thin
bridge to `triton_python_backend_utils`. docs/architecture.md has the map.
"""

__version__ = "0.1.0"
