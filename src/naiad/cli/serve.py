"""`naiad serve`: loads a model and serves it until told to stop."""

from __future__ import annotations

from typing import Any

import click
import uvloop

from naiad.backends.llm.model import load_language_model
from naiad.cli.logs import configure_logs
from naiad.cli.main import debug_option
from naiad.cli.options import load_settings, settings_options
from naiad.cli.settings import ALIASES, Settings
from naiad.cli.startup import LoadingProgress, print_startup, startup_rows
from naiad.server.lifecycle import serve


@click.command("serve", short_help="Serve the model at PATH over HTTP.", no_args_is_help=True)
@click.argument("path", type=click.Path())
@settings_options(Settings, aliases=ALIASES)
@debug_option
def command(path: str, *, config: str | None, **flags: Any) -> None:
    """Serve the model at PATH over HTTP.

    PATH is a folder in Hugging Face's layout. Clients of OpenAI, KServe v2 and Triton's generate
    extension are answered on one port. SIGTERM lets running requests finish.
    """
    settings = load_settings(Settings, config, flags)
    configure_logs(settings.log)
    uvloop.run(run(path, settings))


async def run(path: str, settings: Settings) -> None:
    """Load, say so, serve."""
    with LoadingProgress() as progress:
        model = await load_language_model(
            path, settings.engine, settings.model.served_model_name, progress
        )
    try:
        urls = [f"http://{settings.server.http_address}:{settings.server.http_port}"]
        names = (model.metadata.name, *model.metadata.aliases)
        print_startup(startup_rows(names, model.client.info, urls))
        await serve([model], settings.server)
    finally:
        await model.close()
