"""Writes config.pbtxt of every model from `core.schema`.

    python -m kelp.core.schema_render model_repository          write
    python -m kelp.core.schema_render model_repository --check  exit 1 and name the files that differ

Every model has one instance on KIND_CPU: a worker is one process with one engine, and the engine, not Triton,
chooses its device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kelp.core.schema import MODEL_SCHEMAS
from kelp.core.schema_types import ModelSchema, TensorSpec

_HEADER = "# Written by `python -m kelp.core.schema_render model_repository`; edit python/kelp/core/schema*.py instead."


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _render_tensor(field: str, spec: TensorSpec) -> str:
    dims = ", ".join(str(dim) for dim in spec.dims)
    optional = " optional: true" if field == "input" and spec.optional else ""
    return f"{field} {{ name: {_quote(spec.name)} data_type: {spec.datatype.config_name} dims: [ {dims} ]{optional} }}"


def render_config(schema: ModelSchema) -> str:
    """The text of one model's config.pbtxt."""
    lines = [
        _HEADER,
        f"name: {_quote(schema.name)}",
        f"backend: {_quote(schema.backend)}",
        "max_batch_size: 0",
        f"model_transaction_policy {{ decoupled: {str(schema.is_decoupled).lower()} }}",
        "instance_group { count: 1 kind: KIND_CPU }",
        *(_render_tensor("input", spec) for spec in schema.inputs),
        *(_render_tensor("output", spec) for spec in schema.outputs),
        *(
            f"parameters {{ key: {_quote(key)} value {{ string_value: {_quote(value)} }} }}"
            for key, value in schema.parameters
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensor_document(spec: TensorSpec) -> dict[str, object]:
    document: dict[str, object] = {
        "name": spec.name,
        "data_type": spec.datatype.config_name,
        "dims": list(spec.dims),
    }
    return {**document, "optional": True} if spec.optional else document


def render_json(schema: ModelSchema) -> str:
    """The same configuration as JSON: the `config` override of Triton's model-repository API."""
    return json.dumps(
        {
            "name": schema.name,
            "backend": schema.backend,
            "max_batch_size": 0,
            "model_transaction_policy": {"decoupled": schema.is_decoupled},
            "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
            "input": [_tensor_document(spec) for spec in schema.inputs],
            "output": [_tensor_document(spec) for spec in schema.outputs],
            "parameters": {key: {"string_value": value} for key, value in schema.parameters},
        }
    )


def render_repository() -> dict[Path, str]:
    """Paths relative to the model repository and what belongs there.

    The version folders hold a `.gitkeep` only, because git keeps no empty folder and Triton needs one.
    """
    files: dict[Path, str] = {}
    for schema in MODEL_SCHEMAS:
        files[Path(schema.name) / "config.pbtxt"] = render_config(schema)
        files[Path(schema.name) / "1" / ".gitkeep"] = ""
    return files


def differing_files(repository: Path) -> list[Path]:
    """Files of `repository` that are missing or not what the schema says."""
    return [
        relative
        for relative, text in render_repository().items()
        if not (repository / relative).is_file() or (repository / relative).read_text() != text
    ]


def write_repository(repository: Path) -> None:
    """Write every file of `render_repository`; nothing is removed."""
    for relative, text in render_repository().items():
        path = repository / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kelp.core.schema_render", description="Write config.pbtxt files.")
    parser.add_argument("repository", type=Path, help="folder that holds one folder per model")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    options = parser.parse_args(arguments)
    if not options.check:
        write_repository(options.repository)
        return 0
    differing = differing_files(options.repository)
    for relative in differing:
        print(f"{options.repository / relative}: differs from kelp.core.schema", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
