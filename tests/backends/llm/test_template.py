"""Chat templates: what Hugging Face's renderer offers, with bounds."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from naiad.backends.llm import template
from naiad.backends.llm.template import ChatTemplate
from naiad.core.errors import InvalidModel, InvalidRequest

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>you</b> & 'me'"},
]
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'].strip() + '<|im_end|>' }}\n"
    "    {{- '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)


def render(source: str, messages: list[dict[str, Any]] = TALK, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages, **options
    )


def test_renders_a_chatml_template_exactly() -> None:
    assert render(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi <b>you</b> & 'me'<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert not render(CHATML, add_generation_prompt=False).endswith("assistant\n")


def test_agrees_with_transformers_own_renderer() -> None:
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    source = CHATML + "{{ bos_token }}{{ messages | tojson }}{% generation %}x{% endgeneration %}"
    theirs = rendering.render_jinja_template(
        conversations=[TALK], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )[0][0]
    assert render(source) == theirs


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{% generation %}a{% endgeneration %}{%- generation -%} b {%- endgeneration %}", "ab"),
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "Be brief."}'),
        ("{{ messages[1].content | tojson }}", "\"Hi <b>you</b> & 'me'\""),
        ("{{ {'é': 1} | tojson(indent=1) }}", '{\n "é": 1\n}'),
        ("{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}s{% endfor %}", "s"),
        ("{% set x = namespace() %}{% for m in messages %}{% set x.n = 2 %}{% endfor %}{{ x.n }}", "2"),
        ("{% if tools is defined %}t{% endif %}-{{ messages[1:] | length }}", "-1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)  # fmt: skip
def test_offers_what_templates_use(source: str, text: str) -> None:
    assert render(source) == text


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}",
        "{{ missing.attribute }}",
        "{{ 'x' * 10000000000 }}",
        "{{ messages | tojson(nonsense=1) }}",
    ],
)
def test_what_goes_wrong_in_a_template_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        render(source)


def test_the_text_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_PROMPT_CHARS", 10)
    with pytest.raises(InvalidRequest, match="11 characters, the limit is 10"):
        render("{{ 'x' * 11 }}")


def test_a_template_that_cannot_be_parsed_refuses_chats_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = ChatTemplate("{% nonsense %}", {})
    assert "nonsense" in caplog.text
    with pytest.raises(InvalidRequest, match="unknown statement nonsense"):
        broken.render(TALK)


def test_parts_of_text_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": "hi"}, "message 0 has no role"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part of type image_url"),
        ({"role": "user", "content": ["hi"]}, "part of type str"),
    ],
)
def test_messages_a_text_model_cannot_take_are_refused(
    message: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        render(CHATML, [message])


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="messages is empty"):
        render(CHATML, [])


def test_renders_in_any_thread() -> None:
    chat = ChatTemplate(CHATML, {})
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(chat.render(TALK)))
    thread.start()
    thread.join()
    assert texts == [chat.render(TALK)]


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_file_of_its_own_wins_over_the_tokenizers_settings(tmp_path: Path) -> None:
    write(tmp_path, "chat_template.json", {"chat_template": "json"})
    assert ChatTemplate.from_folder(tmp_path, {}).render(TALK) == "json"
    write(tmp_path, "tokenizer_config.json", {"chat_template": "config"})
    assert ChatTemplate.from_folder(tmp_path, {}).render(TALK) == "config"
    write(tmp_path, "chat_template.jinja", "jinja")
    assert ChatTemplate.from_folder(tmp_path, {}).render(TALK) == "jinja"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert ChatTemplate.from_folder(tmp_path, {}).render(TALK) == "plain"
    write(tmp_path, "tokenizer_config.json", {"chat_template": named[:1]})
    assert ChatTemplate.from_folder(tmp_path, {}).render(TALK) == "tools"
    write(tmp_path, "tokenizer_config.json", {"chat_template": ["what"]})
    with pytest.raises(InvalidModel, match="chat_template"):
        ChatTemplate.from_folder(tmp_path, {})


def test_without_a_template_there_is_a_plain_one_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plain = ChatTemplate.from_folder(tmp_path, {})
    assert "no chat template" in caplog.text
    assert plain.is_plain
    assert plain.render(TALK[:1]) == "system: Be brief.\nassistant:"
