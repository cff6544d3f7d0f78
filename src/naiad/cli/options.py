"""Command-line options made from settings: name, type, range, default and help come from the structs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import click
import msgspec

from naiad.core.settings import Setting, describe_type, load, sections

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = TypeVar("Kind", bound=msgspec.Struct)


def option(setting: Setting, *aliases: str) -> Callable[[Function], Function]:
    """One setting as an option whose value is None when it is not given.

    Values stay text: `naiad.core.settings` converts and refuses them, as it does for files.
    """
    bounds = describe_type(setting.type).removesuffix(" or nothing").partition(", ")[2]
    default = f"default: {_shown(setting.default)}"
    text = f"{setting.help} [{'; '.join(filter(None, (default, bounds)))}]".strip()
    if setting.is_switch:
        off = "--no-" + setting.flag.removeprefix("--")
        return click.option(f"{setting.flag}/{off}", setting.name, default=None, help=text)
    return click.option(
        setting.flag,
        *aliases,
        setting.name,
        default=None,
        multiple=setting.is_list,
        metavar=_metavar(setting),
        help=text,
        callback=lambda _ctx, _option, value: None if value == () else value,
    )


def options(
    settings: Iterable[Setting], aliases: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Function], Function]:
    """Several settings as options, in their order; `aliases` has second flags by setting name."""

    def decorate(function: Function) -> Function:
        for setting in reversed(list(settings)):
            also = (aliases[setting.name],) if setting.name in aliases else ()
            function = option(setting, *also)(function)
        return function

    return decorate


def settings_options(
    kind: type[msgspec.Struct],
    only: Iterable[str] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Function], Function]:
    """Every setting of `kind` (of the sections `only`, if given) as an option, and `--config`."""
    wanted = tuple(only) or tuple(sections(kind))
    every = [setting for name in wanted for setting in sections(kind)[name]]
    config = click.option(
        "--config",
        type=click.Path(dir_okay=False),
        help="TOML file of settings, a table per section; flags and NAIAD_* variables win over it.",
    )
    return lambda function: config(options(every, aliases)(function))


def load_settings(kind: type[Kind], config: str | None, flags: dict[str, Any]) -> Kind:
    """The settings of this run, from defaults, the file, our environment and flags."""
    return load(kind, file=config, environ=os.environ, flags=flags)


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    words = describe_type(setting.type).removeprefix("list of ").removesuffix(" or nothing")
    return words.partition(",")[0].upper().replace(" ", "-")


def _shown(default: Any) -> str:
    match default:
        case None:
            return "unset"
        case bool():
            return "on" if default else "off"
        case () | {} | "":
            return "none"
    return str(default)
