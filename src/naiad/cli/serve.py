"""`naiad serve`: loads a model and serves it until told to stop."""

from __future__ import annotations

import gc
import time
from typing import Any

import click
import uvloop

from naiad.backends.llm.model import load_language_model
from naiad.cli.logs import configure_logs
from naiad.cli.main import debug_option
from naiad.cli.options import load_settings, settings_options
from naiad.cli.settings import ALIASES, Settings
from naiad.cli.startup import LoadingProgress, print_startup, startup_rows
from naiad.server.lifecycle import Server, serve


@click.command("serve", short_help="Serve the model at PATH over HTTP.", no_args_is_help=True)
@click.argument("path", type=click.Path())
@settings_options(Settings, aliases=ALIASES)
@debug_option
def command(path: str, *, config: str | None, **flags: Any) -> None:
    """Serve the model at PATH over HTTP.

    PATH is a folder in Hugging Face's layout, or `builtin` for the small model that comes with
    Naiad. Clients of OpenAI, KServe v2 and Triton's generate extension are answered on one port.
    SIGTERM lets running requests finish.
    """
    settings = load_settings(Settings, config, flags)
    configure_logs(settings.log)
    uvloop.run(run(path, settings))


async def run(path: str, settings: Settings) -> None:
    """Load, serve, and say so once the ports answer."""
    begun_s = time.monotonic()
    with LoadingProgress() as progress:
        model = await load_language_model(
            path, settings.engine, settings.model.served_model_name, progress
        )
    name, *aliases = model.metadata.name, *model.metadata.aliases

    def started(server: Server) -> None:
        gc.collect()
        gc.freeze()  # modules and tables stay: collections while requests run need not walk them
        rows = startup_rows([name, *aliases], model.client.info, listening(server))
        print_startup(rows)

    load_s = {name: time.monotonic() - begun_s}
    try:
        await serve([model], settings.server, load_s=load_s, started=started)
    finally:
        await model.close()


def listening(server: Server) -> list[str]:
    """Where the server answers, as a client on this host would write it."""
    address = server.settings.http_address
    host = "localhost" if address in ("0.0.0.0", "::") else address  # noqa: S104 - compared only
    host = f"[{host}]" if ":" in host else host
    urls = [f"http://{host}:{server.port}"]
    if server.settings.allow_metrics:
        urls.append(f"http://{host}:{server.metrics_port}/metrics")
    return urls
