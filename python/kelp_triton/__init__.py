"""The bridge between kelp and Triton's Python backend; only here is `triton_python_backend_utils` imported."""
