"""Conversations are rendered as transformers would, inside a sandbox and a bound."""

from __future__ import annotations

import json

import pytest

from kelp.core.clock import FakeClock
from kelp.core.errors import ConfigError, InvalidRequest, NotSupported, PromptTooLong
from kelp.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "Hi"}]


def _template(folder, text, max_chars=1000, clock=None, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text, **settings}))
    return ChatTemplate(folder, max_chars, clock)


def test_a_conversation_ends_where_the_assistant_begins(model_folder):
    template = ChatTemplate(model_folder, 1000)
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    assert template.render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_whitespace_round_blocks_is_trimmed_as_transformers_does(tmp_path):
    text = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend"
    assert _template(tmp_path, text).render(USER) == "Hi\nend"


def test_tojson_keeps_characters_and_does_not_escape_html(tmp_path):
    rendered = _template(tmp_path, "{{ messages[0] | tojson }}").render([{"role": "user", "content": "<ü>"}])
    assert rendered == '{"role": "user", "content": "<ü>"}'


def test_loop_controls_and_generation_blocks_work(tmp_path):
    text = (
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}"
    )
    assert _template(tmp_path, text).render(USER * 3) == "[Hi]"


def test_special_tokens_are_variables(tmp_path):
    template = _template(tmp_path, "{{ bos_token }}|{{ eos_token }}", bos_token="<s>", eos_token={"content": "</s>"})
    assert template.render(USER) == "<s>|</s>"


def test_strftime_now_shows_the_clock(tmp_path):
    clock = FakeClock(start_s=1_700_000_000.0)
    assert _template(tmp_path, "{{ strftime_now('%Y') }}", clock=clock).render(USER) == "2023"


def test_the_default_of_several_named_templates_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert _template(tmp_path, named).render(USER) == "plain"


def test_a_template_in_its_own_file_wins(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert _template(tmp_path, "from settings").render(USER) == "from file"


def test_a_model_without_template_does_not_take_messages(tmp_path):
    with pytest.raises(NotSupported, match="messages: this model has no chat template"):
        ChatTemplate(tmp_path, 1000).render(USER)


def test_what_the_template_refuses_is_the_clients_fault(model_folder):
    with pytest.raises(InvalidRequest, match=r"messages: .*unknown role"):
        ChatTemplate(model_folder, 1000).render([{"role": "robot", "content": "Hi"}])


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[5].content }}",
        "{{ messages[0].name.first }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ range(1000000) }}",
    ],
)
def test_a_message_of_unexpected_shape_is_the_clients_fault(tmp_path, text):
    with pytest.raises(InvalidRequest, match="messages: "):
        _template(tmp_path, text).render(USER)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    with pytest.raises(InvalidRequest, match="messages: "):
        _template(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}").render(USER)
    with pytest.raises(InvalidRequest, match="messages: "):
        _template(tmp_path, "{{ messages.append(1) }}").render(USER)


def test_output_is_bounded_while_it_grows(tmp_path):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(PromptTooLong, match="limit of 1000 characters"):
        _template(tmp_path, endless).render(USER)


def test_a_message_that_looks_like_a_template_is_plain_text(model_folder):
    rendered = ChatTemplate(model_folder, 1000).render([{"role": "user", "content": "{{ 6 * 7 }}"}])
    assert "{{ 6 * 7 }}" in rendered


def test_a_template_that_does_not_compile_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="chat template"):
        _template(tmp_path, "{% for %}")
