"""`naiad generate`: one prompt, answered on stdout as the tokens come."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec
import uvloop

from naiad.backends.llm.model import load_language_model
from naiad.cli.main import debug_option
from naiad.cli.options import load_settings, options, settings_options
from naiad.cli.settings import Settings
from naiad.cli.startup import LoadingProgress
from naiad.core.errors import InvalidSettings
from naiad.core.generation import ChatPrompt, GenerateRequest, SamplingParams, TextPrompt
from naiad.core.language import LanguageModel
from naiad.core.settings import convert_text, describe
from naiad.engine.config import EngineConfig

# Log probabilities have no place in a stream of text.
SAMPLING = tuple(s for s in describe("sampling", SamplingParams) if "logprobs" not in s.name)


@click.command(
    "generate", short_help="Continue a prompt with the model at PATH.", no_args_is_help=True
)
@click.argument("path", type=click.Path())
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Send PROMPT as a user's message, through the template.")
@options(SAMPLING)
@settings_options(Settings, only=["engine"])
@debug_option
def command(path: str, prompt: str, *, chat: bool, config: str | None, **flags: Any) -> None:
    """Continue a prompt with the model at PATH.

    PATH is a folder in Hugging Face's layout, or `builtin` for the small model that comes with
    Naiad. PROMPT is text, or - for stdin. The answer goes to stdout, everything else to stderr.
    """
    chosen = {setting.name: flags.pop(setting.name) for setting in SAMPLING}
    request = GenerateRequest(
        id="cli", prompt=read_prompt(prompt, chat=chat), sampling=read_sampling(chosen)
    )
    settings = load_settings(Settings, config, flags)
    uvloop.run(run(path, request, settings.engine))


def read_sampling(flags: dict[str, Any]) -> SamplingParams:
    """Sampling options as given on the command line; raises `InvalidSettings` by flag."""
    values = {
        setting.name: convert_text(setting, flags[setting.name])
        for setting in SAMPLING
        if flags[setting.name] is not None
    }
    try:
        return msgspec.convert(values, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidSettings(f"sampling: {error}") from None


def read_prompt(prompt: str, *, chat: bool) -> TextPrompt | ChatPrompt:
    """The prompt as the command line gives it."""
    text = sys.stdin.read() if prompt == "-" else prompt
    return ChatPrompt(({"role": "user", "content": text},)) if chat else TextPrompt(text)


async def run(path: str, request: GenerateRequest, config: EngineConfig) -> None:
    """Load the model, answer, and end its engine."""
    with LoadingProgress() as progress:
        model = await load_language_model(path, config, progress=progress)
    try:
        await write_answers(model, request)
    finally:
        await model.close()


async def write_answers(model: LanguageModel, request: GenerateRequest) -> None:
    """One answer as it comes; several one after the other, under a line that numbers them."""
    texts = [""] * request.sampling.n
    async for delta in model.generate(request):
        if request.sampling.n == 1:
            click.echo(delta.text, nl=False)
            sys.stdout.flush()
        texts[delta.index] += delta.text
    if request.sampling.n == 1:
        click.echo()
        return
    for number, text in enumerate(texts, 1):
        click.echo(f"--- {number} of {request.sampling.n}\n{text}")
