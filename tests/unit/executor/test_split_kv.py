"""The Triton kernels without a device: interpreted against the definition, and compiled down to machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent


def run_apart(arguments: list[str], **environment: str) -> None:
    """In a process of its own: the compiler interprets for a whole process or not at all."""
    finished = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, cwd=FOLDER, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_definition():
    run_apart(["-m", "pytest", "-q", "--no-header", "split_kv_cases.py"], TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper():
    run_apart(["split_kv_compiled.py"], TRITON_INTERPRET="0")


@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_definition_on_a_mixed_step():
    cases = "agree_with_the_gather_backend or planned_on_the_device or interpreted_here"
    run_apart(["-m", "pytest", "-q", "--no-header", "split_kv_cases.py", "-k", cases], TRITON_INTERPRET="1")
