import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import save_model

import kelp.executor.torch.decoder
import kelp.executor.torch.decoder_parts
from kelp.core.clock import FakeClock
from kelp.core.config import ExecutorConfig
from kelp.core.errors import ConfigError
from kelp.core.model_identity import model_identity
from kelp.core.types import KVLayout
from kelp.executor.torch.decoder_parts import load_decoder_parts
from kelp.executor.torch.load import load_parts
from kelp.executor.torch.load_progress import LoadProgress
from kelp.executor.torch.memory import allocate_pool, size_pool
from kelp.executor.torch.model_config import load_model_config
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.executor.torch.rotary import RotaryTable
from kelp.executor.torch.tensor_files import TensorFiles

CPU = torch.device("cpu")
LAYOUT = KVLayout(0, 2, 2, 4, 8, "float32", "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path)
    return tmp_path


def load(folder: Path, on_progress=lambda done, total: None):
    return load_decoder_parts(folder, load_model_config(folder), torch.float32, CPU, on_progress)


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_tied_embeddings_are_one_tensor(folder, monkeypatch):
    given = []

    def take(weight, bias=None):
        given.append(weight)

    monkeypatch.setattr(kelp.executor.torch.decoder_parts, "make_linear", take)
    assert load(folder).embedding is given[-1]


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match="tensor model.layers.1.mlp.up_proj.weight is missing"):
        load(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ConfigError, match=r"tensor model.norm.weight is \[3\], config.json says \[48\]"):
        load(folder)


def test_a_missing_or_damaged_file_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match="model.safetensors"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model.safetensors"):
        load(folder)


def test_a_cut_off_tensor_is_named(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=rf"tensor model.norm.weight ends at byte {len(content)}, the file at"):
        load(folder)


def test_an_empty_file_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="model.safetensors: the file is empty"):
        load(folder)


def test_a_tensor_of_an_unsupported_type_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(ConfigError, match="tensor model.norm.weight is I8, only F32, F16, BF16"):
        load(folder)


def test_a_tensor_is_a_view_of_the_file_and_outlives_its_release(folder):
    files = TensorFiles(folder)
    name, shape = "model.layers.0.mlp.down_proj.weight", (48, 96)
    first, second = files.get(name, *shape), files.get(name, *shape)
    expected = load_file(folder / "model.safetensors")[name]
    assert first.data_ptr() == second.data_ptr()
    assert files.release() == expected.nbytes
    assert files.release() == 0
    assert torch.equal(first, expected)


def test_progress_rises_layer_by_layer_to_the_whole(folder):
    seen = []
    load(folder, lambda done, total: seen.append((done, total)))
    (total,) = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert total == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert len(done) == 3
    assert 0 < done[0] < done[1] < done[2] == total


def test_a_long_load_is_logged_every_two_seconds_and_a_short_one_never(caplog):
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    short = LoadProgress(clock)
    for _ in range(2):
        clock.advance(0.9)
        short(5, 10)
    short(10, 10)
    assert not caplog.messages
    long = LoadProgress(clock)
    for done in range(1, 7):
        clock.advance(1.0)
        long(done << 30, 6 << 30)
    assert caplog.messages == [
        "weights: 33 % (2.0 of 6.0 GiB) after 2 s",
        "weights: 66 % (4.0 of 6.0 GiB) after 4 s",
        "weights: 100 % (6.0 of 6.0 GiB) after 6 s",
    ]


@pytest.mark.parametrize("document", ["{}", "{", '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_bad_shard_index_is_refused(folder, document):
    (folder / "model.safetensors.index.json").write_text(document)
    with pytest.raises(ConfigError, match="model.safetensors.index.json"):
        load(folder)


def test_the_pool_is_page_aligned_zeroed_and_described(folder):
    sized = size_pool(LAYOUT, CPU, 0.2)
    pool, memory = allocate_pool(sized, CPU)
    assert tuple(pool.shape) == (sized.num_blocks, 2, 2, 2, 4, 8)
    assert pool.is_contiguous()
    assert memory.base_address == pool.data_ptr()
    assert memory.base_address % 4096 == 0
    assert memory.num_bytes == sized.pool_bytes == pool.numel() * 4
    assert not pool.any()


def test_an_automatic_pool_stays_below_4096_blocks_on_cpu():
    assert size_pool(LAYOUT, CPU, 0.9).num_blocks == 4096


def test_a_pool_beyond_free_memory_is_refused_with_both_sizes():
    huge = KVLayout(10**12, 2, 2, 4, 8, "float32", "model")
    with pytest.raises(ConfigError, match="executor.num_blocks: 1000000000000 blocks of 1024 bytes do not fit"):
        size_pool(huge, CPU, 0.2)


def test_a_block_larger_than_the_share_of_memory_is_refused():
    with pytest.raises(ConfigError, match="executor.num_blocks: 0 blocks"):
        size_pool(LAYOUT, CPU, 1e-12)


@pytest.mark.parametrize(("num_blocks", "num_positions"), [(8, 32), (512, 256)])
def test_rotary_tables_reach_as_far_as_sequences_and_the_pool(folder, monkeypatch, num_blocks, num_positions):
    sizes = []

    def table(rope, size, *args):
        sizes.append(size)
        return RotaryTable(rope, size, *args)

    monkeypatch.setattr(kelp.executor.torch.decoder, "RotaryTable", table)
    load_parts(folder, TorchExecutorOptions(dtype="float32", block_size=4, num_blocks=num_blocks, threads=1))
    assert [size.num_positions for size in sizes] == [num_positions]


def test_the_parts_report_limits_and_layout(folder):
    parts = load_parts(folder, TorchExecutorOptions(dtype="bfloat16", num_blocks=8, threads=1))
    assert parts.limits.max_model_tokens == 256
    assert parts.layout == KVLayout(8, 2, 2, 16, 8, "bfloat16", model_identity(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_model_tokens": 257}, "executor.max_model_tokens: 257 exceeds max_position_embeddings 256"),
        ({"device": "tpu9"}, "executor.device: 'tpu9'"),
        ({"device": "meta"}, "executor.device: 'meta'"),
        ({"dtype": "float16"}, "executor.dtype: 'float16'"),
        ({"max_step_tokens": 8}, "executor.max_step_tokens: 8 is below executor.max_running 64"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(folder, fields, message):
    with pytest.raises(ConfigError) as refusal:
        load_parts(folder, TorchExecutorOptions(**{"num_blocks": 8, **fields}))
    assert message in refusal.value.text


def test_options_take_every_engine_field_of_the_configuration():
    config = ExecutorConfig(block_size=32, max_running=3, enable_prefix_cache=False, num_blocks=9)
    options = TorchExecutorOptions.from_config(config, "cpu", 2)
    shared = set(ExecutorConfig.model_fields) & set(TorchExecutorOptions.__dataclass_fields__)
    for field in shared - {"device", "threads"}:
        assert getattr(options, field) == getattr(config, field)
    assert (options.device, options.threads) == ("cpu", 2)
