"""Backends are thin shells: short, importing only what a shell may, and offering what Triton looks for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kelp.core.schema import MODEL_SCHEMAS

BACKENDS = Path(__file__).resolve().parents[2] / "backends"
SHELLS = sorted(path for path in BACKENDS.glob("kelp_*/model.py"))
MAX_LINES = 80
ALLOWED = ("__future__", "triton_python_backend_utils", "kelp_triton", "kelp.build", "kelp.core")

each_shell = pytest.mark.parametrize("shell", SHELLS, ids=lambda path: path.parent.name)


def imported_modules(tree: ast.Module) -> list[str]:
    """Everything imported, inside functions too."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a shell is no package"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def is_allowed(module: str) -> bool:
    return any(module == allowed or module.startswith(f"{allowed}.") for allowed in ALLOWED)


def defined_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def parse(shell: Path) -> ast.Module:
    return ast.parse(shell.read_text(), str(shell))


def test_every_model_of_the_graph_has_its_shell() -> None:
    assert {schema.backend for schema in MODEL_SCHEMAS} == {shell.parent.name for shell in SHELLS}


@each_shell
def test_a_shell_is_short(shell: Path) -> None:
    assert len(shell.read_text().splitlines()) <= MAX_LINES


@each_shell
def test_a_shell_imports_only_the_bridge(shell: Path) -> None:
    assert [module for module in imported_modules(parse(shell)) if not is_allowed(module)] == []


@each_shell
def test_a_shell_offers_the_class_that_triton_looks_for(shell: Path) -> None:
    assert "TritonPythonModel" in defined_names(parse(shell))


@each_shell
def test_a_shell_says_what_it_is(shell: Path) -> None:
    assert ast.get_docstring(parse(shell))


@pytest.mark.parametrize(
    ("source", "is_fine"),
    [
        ("from kelp_triton.model import KelpModel", True),
        ("import triton_python_backend_utils as pb_utils", True),
        ("from kelp.core.types import Role", True),
        ("from kelp.router.service import RouterService", False),
        ("from kelp import router", False),
        ("import torch", False),
        ("def later():\n    import os", False),
        ("from kelp_tritonic import x", False),
    ],
)
def test_the_import_check_tells_right_from_wrong(source: str, is_fine: bool) -> None:
    assert all(map(is_allowed, imported_modules(ast.parse(source)))) is is_fine
