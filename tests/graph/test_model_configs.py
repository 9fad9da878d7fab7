"""The files in model_repository are what the schema says, and what Triton can read."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from kelp.core.schema import MODEL_SCHEMAS
from kelp.core.schema_render import differing_files, main, render_config, render_json, render_repository

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"


def _parsed(schema):
    return text_format.Parse(render_config(schema), model_config_pb2.ModelConfig())


def test_every_config_equals_the_schema_byte_for_byte():
    for relative, text in render_repository().items():
        assert (REPOSITORY / relative).read_bytes() == text.encode(), f"run: {relative} differs"


def test_version_folders_hold_a_gitkeep_only():
    for schema in MODEL_SCHEMAS:
        assert [path.name for path in (REPOSITORY / schema.name / "1").iterdir()] == [".gitkeep"]


@pytest.mark.parametrize("schema", MODEL_SCHEMAS, ids=lambda schema: schema.name)
def test_triton_reads_back_what_the_schema_says(schema):
    config = _parsed(schema)
    assert (config.name, config.backend, config.max_batch_size) == (schema.name, schema.backend, 0)
    assert config.model_transaction_policy.decoupled == schema.is_decoupled
    assert [(group.count, group.kind) for group in config.instance_group] == [
        (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    ]
    for declared, specs in ((config.input, schema.inputs), (config.output, schema.outputs)):
        assert [(t.name, model_config_pb2.DataType.Name(t.data_type), tuple(t.dims)) for t in declared] == [
            (spec.name, spec.datatype.config_name, spec.dims) for spec in specs
        ]
    assert [tensor.optional for tensor in config.input] == [spec.optional for spec in schema.inputs]


@pytest.mark.parametrize("schema", MODEL_SCHEMAS, ids=lambda schema: schema.name)
def test_the_json_override_means_the_same_as_the_file(schema):
    assert json_format.Parse(render_json(schema), model_config_pb2.ModelConfig()) == _parsed(schema)


def test_what_answers_once_is_unary_and_streams_are_decoupled():
    unary = {schema.name for schema in MODEL_SCHEMAS if not schema.is_decoupled}
    assert unary == {"preprocess", "kv_block_manager"}


def test_the_check_names_a_file_that_differs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--check"]) == 0
    (tmp_path / "llm" / "config.pbtxt").write_text("name: 'other'")
    assert differing_files(tmp_path) == [Path("llm/config.pbtxt")]
    assert main([str(tmp_path), "--check"]) == 1
    assert "llm/config.pbtxt" in capsys.readouterr().err
