"""Chat messages to prompt text, by the template that comes with the checkpoint.

The template is the model's, never the request's. It runs in minijinja, which executes no code, with
a bound on its steps (fuel) and on the text it makes. What Hugging Face's renderer offers to templates
is offered here: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, the special tokens,
`{% generation %}` blocks, trimmed blocks.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import minijinja

from naiad.backends.llm.tokenizer import read_json
from naiad.core.errors import InvalidModel, InvalidRequest

logger = logging.getLogger(__name__)

MAX_FUEL = 5_000_000
"""Template instructions per prompt: thousands of messages, a fraction of a second."""
MAX_PROMPT_CHARS = 16 * 2**20

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_NAME = "chat"
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class ChatTemplate:
    """One model's template, compiled.

    Args:
        source: Jinja text; None for a plain `role: content` one.
        special_tokens: Role to content; variables of the template.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.is_plain = source is None
        """True: the text has no special tokens yet, the tokenizer must add them."""
        self._special_tokens = dict(special_tokens)
        self._error: str | None = None
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=MAX_FUEL,
            auto_escape_callback=lambda _name: False,
            filters={"tojson": _to_json},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        )
        try:
            self._environment.add_template(_NAME, _rewrite(source or PLAIN_TEMPLATE))
        except minijinja.TemplateError as error:
            # The model can still complete plain text; only chat requests are refused.
            self._error = f"the model's chat template cannot be used: {_describe(error)}"
            logger.warning("%s", self._error)

    @staticmethod
    def from_folder(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """The template of a checkpoint, or the plain one and a warning.

        Raises:
            InvalidModel: a template file that cannot be read.
        """
        source = _find_source(folder)
        if source is None:
            logger.warning("%s has no chat template; using a plain `role: content` one", folder)
        return ChatTemplate(source, special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a conversation.

        Raises:
            InvalidRequest: messages the template refuses, or that make it run too long.
        """
        if self._error is not None:
            raise InvalidRequest(self._error)
        if not messages:
            raise InvalidRequest("messages is empty", hint="send at least one message")
        try:
            text = self._environment.render_template(
                _NAME,
                messages=[_plain_message(n, message) for n, message in enumerate(messages)],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except minijinja.TemplateError as error:
            raise InvalidRequest(f"the chat template failed: {_describe(error)}") from error
        except (TypeError, ValueError, OverflowError) as error:  # from a value or from tojson
            raise InvalidRequest(
                f"the chat template cannot render the messages: {error}"
            ) from error
        if len(text) > MAX_PROMPT_CHARS:
            raise InvalidRequest(
                f"the rendered chat has {len(text)} characters, the limit is {MAX_PROMPT_CHARS}"
            )
        return text


def _find_source(folder: Path) -> str | None:
    """A file of its own wins over the tokenizer's settings, as in transformers."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidModel(f"{own} cannot be read: {error}") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            return _pick_named(template, folder / name)
    return None


def _pick_named(templates: list[Any], path: Path) -> str | None:
    """Of a list of `{"name", "template"}`: the default one, else the first."""
    try:
        by_name = {str(entry["name"]): str(entry["template"]) for entry in templates}
    except (KeyError, TypeError):
        raise InvalidModel(f"{path}: chat_template must be text or [{{name, template}}]") from None
    return by_name.get("default", next(iter(by_name.values()), None))


def _plain_message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one text: what nearly every template expects."""
    if not isinstance(message.get("role"), str):
        raise InvalidRequest(f"message {number} has no role")
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"message {number} has a part of type {kind}; this model takes text"
            )
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _rewrite(source: str) -> str:
    """`{% generation %}` only marks what to train on; minijinja does not know it."""
    return _GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", source
    )


def _describe(error: minijinja.TemplateError) -> str:
    """The first line: the rest is an excerpt of the template."""
    return str(error).partition("\n")[0]


def _raise_exception(message: str) -> str:
    raise InvalidRequest(f"the chat template refuses the messages: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as in transformers


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
