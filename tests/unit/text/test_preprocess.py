"""Prompts of every form become checked, hashed token ids."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kelp.core.errors import ConfigError, InvalidRequest, NotSupported, PromptTooLong
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.model_identity import adapter_digest, model_identity
from kelp.core.preprocess_messages import PreprocessOptions
from kelp.core.request import Prompt
from kelp.text.preprocess import PreprocessLimits, Preprocessor
from kelp.text.tokenizer import Tokenizer

MAX_POSITIONS = 128


@pytest.fixture
def preprocessor(model_folder):
    return Preprocessor(model_folder)


def _options(**changes):
    return PreprocessOptions(**{"block_size": 4, "max_tokens": 1, **changes})


def _ids(*values):
    return Prompt(input_ids=np.array(values, dtype=np.int32))


def test_raw_text_gets_the_tokenizers_special_tokens(preprocessor):
    prepared = preprocessor.prepare(Prompt(text="the dog"), _options())
    assert prepared.input_ids.tolist() == preprocessor.tokenizer.encode("the dog").tolist()
    plain = preprocessor.prepare(Prompt(text="the dog"), _options(add_special_tokens=False))
    assert plain.input_ids.tolist() == prepared.input_ids[1:].tolist()


def test_messages_get_the_templates_special_tokens_only(preprocessor):
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    prepared = preprocessor.prepare(Prompt(messages=messages), _options(return_prompt_text=True))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prepared.prompt_text == text
    assert prepared.input_ids.tolist() == preprocessor.tokenizer.encode(text, add_special_tokens=False).tolist()


def test_token_ids_pass_through(preprocessor):
    assert preprocessor.prepare(_ids(5, 6, 7), _options()).input_ids.tolist() == [5, 6, 7]


def test_the_prompts_text_is_returned_on_demand_only(preprocessor):
    ids = preprocessor.tokenizer.encode("the dog").tolist()
    assert preprocessor.prepare(_ids(*ids), _options(return_prompt_text=True)).prompt_text == "the dog"
    assert preprocessor.prepare(Prompt(text="x"), _options(return_prompt_text=True)).prompt_text == "x"
    assert preprocessor.prepare(Prompt(text="x"), _options()).prompt_text == ""


def test_full_blocks_are_hashed_from_a_seed_of_model_adapter_and_salt(preprocessor, model_folder):
    prompt = _ids(*range(10))
    prepared = preprocessor.prepare(prompt, _options(cache_salt="tenant"))
    seed = seed_hash(model_identity(model_folder), "", "tenant")
    assert prepared.message.seed_hash_hex == seed.hex()
    assert prepared.block_hashes == sequence_hashes(prompt.input_ids, 4, seed)
    assert len(prepared.block_hashes) == 2


def test_another_salt_shares_no_block(preprocessor):
    def hashes(salt):
        return set(preprocessor.prepare(_ids(*range(64)), _options(cache_salt=salt)).block_hashes)

    assert len(hashes("a")) == 16
    assert not hashes("a") & hashes("b")
    assert not hashes("a") & hashes("")


@pytest.fixture
def adapters(tmp_path):
    folders = {name: tmp_path / "adapters" / name for name in ("sql", "chat")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(name)
    return folders


def test_blocks_are_shared_within_one_content_of_one_adapter_only(model_folder, adapters):
    def hashes(lora_name):
        prepared = Preprocessor(model_folder, lora_adapters=adapters).prepare(
            _ids(*range(64)), _options(lora_name=lora_name)
        )
        return frozenset(prepared.block_hashes)

    before = [hashes(name) for name in ("", "sql", "chat")]
    assert [hashes(name) for name in ("", "sql", "chat")] == before
    shutil.copyfile(adapters["chat"] / "adapter_model.safetensors", adapters["sql"] / "adapter_model.safetensors")
    changed = hashes("sql")
    assert len(frozenset().union(*before, changed)) == 4 * 16


def test_the_router_is_told_which_content_of_an_adapter_the_hashes_stand_for(model_folder, adapters):
    preprocessor = Preprocessor(model_folder, lora_adapters=adapters)
    assert preprocessor.prepare(_ids(5), _options()).message.lora_digest == ""
    message = preprocessor.prepare(_ids(5), _options(lora_name="sql")).message
    assert message.lora_digest == adapter_digest(adapters["sql"])


def test_an_unknown_adapter_is_refused_with_the_known_ones(model_folder, preprocessor, adapters):
    with pytest.raises(InvalidRequest, match="lora_name: 'x' given, this server's adapters: none"):
        preprocessor.prepare(_ids(5), _options(lora_name="x"))
    with pytest.raises(InvalidRequest, match="lora_name: 'x' given, this server's adapters: sql, chat"):
        Preprocessor(model_folder, lora_adapters=adapters).prepare(_ids(5), _options(lora_name="x"))


def test_an_adapter_without_files_is_refused_at_load(model_folder, adapters):
    (adapters["sql"] / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.lora_adapters: .*sql/adapter_config\.json"):
        Preprocessor(model_folder, lora_adapters=adapters)


def test_bad_words_are_tokenised_at_a_words_start_and_inside(preprocessor):
    encode = preprocessor.tokenizer.encode
    prepared = preprocessor.prepare(Prompt(text="a"), _options(bad_words=("dog",)))
    assert set(prepared.message.bad_words_ids) == {
        tuple(encode("dog", add_special_tokens=False).tolist()),
        tuple(encode(" dog", add_special_tokens=False).tolist()),
    }


def test_a_bad_word_of_white_space_does_not_ban_the_plain_space(preprocessor):
    encode = preprocessor.tokenizer.encode
    prepared = preprocessor.prepare(Prompt(text="a"), _options(bad_words=("\n",)))
    assert prepared.message.bad_words_ids == (tuple(encode("\n", add_special_tokens=False).tolist()),)


@pytest.mark.parametrize("value", [512, 2**31 - 1])
def test_a_token_id_beyond_the_vocabulary_is_refused_with_its_place(preprocessor, value):
    with pytest.raises(InvalidRequest, match=rf"input_ids\[1\]: {value} given, must be from 0 to 511"):
        preprocessor.prepare(_ids(5, value), _options())


def test_a_stop_token_id_beyond_the_vocabulary_is_refused(preprocessor):
    with pytest.raises(InvalidRequest, match=r"stop_token_ids\[1\].*50256"):
        preprocessor.prepare(_ids(5), _options(stop_token_ids=(2, 50256)))


def test_a_prompt_without_tokens_is_refused(preprocessor):
    with pytest.raises(InvalidRequest, match="text_input: the prompt has no tokens"):
        preprocessor.prepare(Prompt(text=""), _options(add_special_tokens=False))


def test_prompt_and_output_together_must_fit_the_model(preprocessor):
    fits = [5] * (MAX_POSITIONS - 8)
    preprocessor.prepare(_ids(*fits), _options(max_tokens=8))
    with pytest.raises(PromptTooLong, match="input_ids: 120 prompt tokens plus max_tokens=9 exceed the limit of 128"):
        preprocessor.prepare(_ids(*fits), _options(max_tokens=9))


def test_a_prompt_that_cannot_fit_is_refused_without_tokenising_it(preprocessor, monkeypatch):
    monkeypatch.delattr(Tokenizer, "encode")
    with pytest.raises(PromptTooLong, match="text_input: at least [0-9]+ prompt tokens exceed the limit of 128"):
        preprocessor.prepare(Prompt(text="a" * 1_000_000), _options())


def test_a_configured_limit_lowers_the_models_own_but_never_raises_it(model_folder):
    assert Preprocessor(model_folder, PreprocessLimits(max_model_tokens=10)).max_model_tokens == 10
    assert Preprocessor(model_folder, PreprocessLimits(max_model_tokens=1000)).max_model_tokens == MAX_POSITIONS


def test_a_model_without_length_needs_a_configured_one(model_folder):
    (model_folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"max_position_embeddings.*executor\.max_model_tokens"):
        Preprocessor(model_folder)
    assert Preprocessor(model_folder, PreprocessLimits(max_model_tokens=10)).max_model_tokens == 10


def test_a_folder_without_config_is_refused(model_folder):
    (model_folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        Preprocessor(model_folder)


def test_malformed_messages_are_refused(preprocessor):
    with pytest.raises(InvalidRequest, match="messages: "):
        preprocessor.prepare(Prompt(messages="{"), _options())
    with pytest.raises(NotSupported, match="messages"):
        parts = [{"type": "image_url"}]
        preprocessor.prepare(Prompt(messages=json.dumps([{"role": "user", "content": parts}])), _options())


def test_threads_may_share_one_preprocessor(preprocessor):
    prompts = [Prompt(text="the quick brown fox " * count) for count in range(1, 6)]
    expected = [preprocessor.prepare(prompt, _options()).input_ids.tolist() for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: preprocessor.prepare(prompt, _options()), prompts * 10))
    assert [prepared.input_ids.tolist() for prepared in found] == expected * 10
