"""A checkpoint's text files without a model, and a language model on a fake engine process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from naiad.backends.llm.client import EngineClient, Supervision
from naiad.backends.llm.link import Progress
from naiad.backends.llm.model import EngineLanguageModel, load_language_model
from naiad.engine.config import EngineConfig
from tests.backends.llm import fake_engine

BOS, EOS, END_OF_TURN = "<s>", "</s>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

IMPATIENT = Supervision(exit_grace_s=0.2)
"""The default, but an engine that hangs is killed soon."""

MakeModel = Callable[..., Awaitable[EngineLanguageModel]]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


def byte_level_tokenizer() -> Tokenizer:
    """In the manner of Llama 3: byte-level BPE that adds a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog on the log"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def write_text_files(folder: Path, **fake_options: Any) -> Path:
    """A checkpoint's text files, and what its fake engine shall do."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": {"content": EOS}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "fake_engine.json").write_text(json.dumps(fake_options))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_text_files(tmp_path / "tiny")


class FolderClient(EngineClient):
    """A client that tells where its fake engine reads what to do wrong."""

    folder: Path


MakeClient = Callable[..., Awaitable[FolderClient]]


@pytest.fixture
async def make_client(tmp_path: Path) -> AsyncIterator[MakeClient]:
    """Makes clients of fake engine processes, which end with the test."""
    async with AsyncExitStack() as stack:

        async def make(
            *,
            supervision: Supervision | None = None,
            config: EngineConfig | None = None,
            progress: Progress | None = None,
            **fake_options: Any,
        ) -> FolderClient:
            client = FolderClient(
                tmp_path,
                config or EngineConfig(),
                supervision=supervision or IMPATIENT,
                progress=progress,
                command=fake_engine.COMMAND,
            )
            client.folder = tmp_path
            (tmp_path / "fake_engine.json").write_text(json.dumps(fake_options))
            stack.push_async_callback(client.close)
            await client.start()
            return client

        yield make


@pytest.fixture
async def make_model(tmp_path: Path) -> AsyncIterator[MakeModel]:
    """Makes models on fake engine processes, which end with the test."""
    async with AsyncExitStack() as stack:

        async def make(
            *, supervision: Supervision | None = None, config: Any = None, **fake_options: Any
        ) -> EngineLanguageModel:
            path = write_text_files(tmp_path / "tiny", **fake_options)
            model = await load_language_model(
                path,
                EngineConfig(**(config or {})),
                command=fake_engine.COMMAND,
                supervision=supervision or IMPATIENT,
            )
            stack.push_async_callback(model.close)
            return model

        yield make
