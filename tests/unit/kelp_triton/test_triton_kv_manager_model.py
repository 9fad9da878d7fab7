"""The `kv_block_manager` model between Triton's tensors and the manager."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pb_double import Request

from kelp.core.config import CONFIG_ENV
from kelp.core.kv_manager_messages import GetStats, Pin, Refused, Stats, decode_results, encode_batch
from kelp.registry.directory import KvManagerDirectory
from kelp_triton.kv_manager_model import KvManagerModel


def load(tmp_path: Path, **settings: str) -> KvManagerModel:
    parameters = {"registry.path": str(tmp_path), "server.grpc_port": "8001", **settings}
    document = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    model = KvManagerModel()
    model.initialize({"model_name": "kv_block_manager", "model_config": json.dumps(document)})
    return model


def ask(model: KvManagerModel, raw: bytes) -> Request:
    request = Request(operations=np.array([raw], dtype=np.object_))
    model.execute([request])
    assert request.sender.has_ended.wait(10.0)
    return request


@pytest.fixture(autouse=True)
def no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)


def test_a_loaded_manager_can_be_found_answers_and_leaves(tmp_path: Path) -> None:
    registry = KvManagerDirectory(tmp_path, 5.0)
    model = load(tmp_path, epoch="3")
    (record,) = registry.snapshot()
    assert (record.manager_id, record.events_endpoint) == ("127.0.0.1:8001/kv_block_manager", "")
    response = ask(model, encode_batch([GetStats(), Pin((), 1.0)])).sender.responses[0]
    results = decode_results(response.output_tensors()[0].as_numpy()[0])
    assert isinstance(results[0], Stats)
    assert isinstance(results[1], Refused), "nobody has joined"
    assert "KELP_NOT_FOUND" in results[1].message
    model.finalize()
    assert registry.snapshot() == []


def test_what_is_no_batch_gets_a_typed_error(tmp_path: Path) -> None:
    model = load(tmp_path)
    assert "[KELP_PROTOCOL] operations" in ask(model, b"garbage").sender.error.text
    model.finalize()


def test_a_manager_that_shall_not_be_is_loaded_but_not_there(tmp_path: Path) -> None:
    model = load(tmp_path, **{"kv_manager.enabled": "false"})
    assert KvManagerDirectory(tmp_path, 5.0).snapshot() == []
    assert "[KELP_CONFIG] kv_manager.enabled: false" in ask(model, encode_batch([GetStats()])).sender.error.text
    model.finalize()
