"""docs/clients.md is the clients' reference: it may not forget a tensor or an error."""

from pathlib import Path

from kelp.core.errors import error_types
from kelp.core.metrics import FAMILIES
from kelp.core.schema import LLM

_TEXT = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()


def test_every_tensor_of_llm_is_documented_for_clients():
    names = [spec.name for spec in (*LLM.inputs, *LLM.outputs)]
    assert [name for name in names if f"`{name}`" not in _TEXT] == []


def test_every_metric_is_documented_for_clients():
    assert [family.name for family in FAMILIES if f"`{family.name}" not in _TEXT] == []


def test_every_error_code_is_documented_for_clients():
    shown = {code for code in error_types() if not code.startswith("TRANSFER")}
    assert [code for code in sorted(shown) if f"`{code}`" not in _TEXT] == []
