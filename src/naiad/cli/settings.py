"""Every setting of the command line's programs: the sections of `naiad.toml`."""

from __future__ import annotations

import msgspec

from naiad.cli.logs import LogSettings
from naiad.engine.config import EngineConfig
from naiad.server.settings import ServerSettings


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the served model is called."""

    served_model_name: tuple[str, ...] = ()
    """Name that clients use for the model; more than one may be given. The folder's name and its path
    always work."""


ALIASES = {"http_address": "--host", "http_port": "--port"}
"""Second spellings of flags, as vLLM has them."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section per concern."""

    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineConfig = EngineConfig()
    log: LogSettings = LogSettings()
