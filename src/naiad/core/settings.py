"""Settings from one source of truth: frozen msgspec structs, one per concern.

A `kind` is a struct whose fields are sections (`engine: EngineConfig = EngineConfig()`); a section's
fields are the settings, with their range in the type and their meaning in the docstring below.
Values come from, in rising order: the defaults, a TOML file with a table per section, environment
variables `NAIAD_<SECTION>__<SETTING>`, and flags. Whatever is unknown or out of range is refused by
the name that the operator wrote. Command lines and reference pages are made from `describe`.

No section is defined here, and nothing is read but the file and mapping given.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import inspect as types

from naiad.core.errors import InvalidSettings

ENVIRONMENT_PREFIX = "NAIAD_"

Kind = TypeVar("Kind", bound=msgspec.Struct)


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, as help texts and loaders see it."""

    section: str
    name: str
    annotation: Any
    """Its type with range, for `msgspec.convert`."""
    type: types.Type
    default: Any
    help: str
    """The docstring below the field, on one line."""

    @property
    def flag(self) -> str:
        """Its command-line option."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{ENVIRONMENT_PREFIX}{self.section}__{self.name}".upper()

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false."""
        return isinstance(self.type, types.BoolType)

    @property
    def is_list(self) -> bool:
        """Whether it takes any number of values."""
        return isinstance(self.type, types.VarTupleType)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it accepts, if only those."""
        return tuple(map(str, self.type.values)) if isinstance(self.type, types.LiteralType) else ()


@functools.cache
def describe(section: str, struct: type[msgspec.Struct]) -> tuple[Setting, ...]:
    """The settings of one section, in the order of its fields."""
    info = types.type_info(struct)
    assert isinstance(info, types.StructType)
    hints, docs = get_type_hints(struct, include_extras=True), field_docs(struct)
    return tuple(
        Setting(
            section=section,
            name=field.name,
            annotation=hints[field.name],
            type=field.type,
            default=field.default_factory()
            if field.default is msgspec.NODEFAULT
            else field.default,
            help=docs.get(field.name, ""),
        )
        for field in info.fields
    )


def sections(kind: type[msgspec.Struct]) -> dict[str, tuple[Setting, ...]]:
    """The settings of every section of `kind`."""
    return {name: describe(name, struct) for name, struct in get_type_hints(kind).items()}


@functools.cache
def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The docstrings below the fields of a struct, each on one line; read from its source."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if not (issubclass(base, msgspec.Struct) and base is not msgspec.Struct):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for node, below in zip(body.body, body.body[1:], strict=False):
            match node, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs


def load(
    kind: type[Kind],
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Kind:
    """Build a `kind` from its defaults, a TOML file, environment variables and flags.

    Args:
        kind: The struct of sections.
        file: A TOML file, or None.
        environ: Variables; those that do not begin with `NAIAD_` are ignored.
        flags: Values by setting name (unique over all sections), as text, a list of texts or a
            Python value; those that are None count as not given.

    Raises:
        InvalidSettings: something is unknown, unreadable or out of range; the message begins with
            the file and key, the variable or the flag.
    """
    known = sections(kind)
    values: dict[str, dict[str, Any]] = {section: {} for section in known}
    for setting, value in (
        *(_from_file(Path(file), known) if file is not None else ()),
        *_from_environment(environ or {}, known),
        *_from_flags(flags or {}, known),
    ):
        values[setting.section][setting.name] = value
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:  # values that do not fit each other
        raise InvalidSettings(f"settings: {error}") from None


Found = Iterable[tuple[Setting, Any]]
Known = Mapping[str, tuple[Setting, ...]]


def _from_file(path: Path, known: Known) -> Found:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{path}: not TOML: {error}") from None
    for section, table in tables.items():
        if section not in known:
            raise _unknown(f"{path}: [{section}]", "section", section, known)
        if not isinstance(table, dict):
            raise InvalidSettings(
                f"{path}: {section} is a section, write [{section}] above its keys"
            )
        by_name = {setting.name: setting for setting in known[section]}
        for name, value in table.items():
            source = f"{path}: [{section}] {name}"
            if name not in by_name:
                raise _unknown(source, "setting", name, by_name)
            yield by_name[name], _convert(source, by_name[name], value, strict=True)


def _from_environment(environ: Mapping[str, str], known: Known) -> Found:
    by_variable = {setting.variable: setting for part in known.values() for setting in part}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable not in by_variable:
            raise _unknown(variable, "environment variable", variable, by_variable)
        setting = by_variable[variable]
        yield setting, _convert(variable, setting, _split(setting, text), strict=False)


def _from_flags(flags: Mapping[str, Any], known: Known) -> Found:
    by_name = {setting.name: setting for part in known.values() for setting in part}
    for name, value in flags.items():
        if value is not None:
            setting = by_name[name]
            yield setting, _convert(setting.flag, setting, _split(setting, value), strict=False)


def _split(setting: Setting, value: Any) -> Any:
    """Text of a list or mapping, as JSON or separated by commas, as what it stands for."""
    if not isinstance(value, str):
        return value
    if value[:1] in ("[", "{") and not isinstance(setting.type, types.StrType):
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value
    return value.split(",") if setting.is_list else value


def convert_text(setting: Setting, value: Any) -> Any:
    """One value as a flag gives it, converted and checked; raises `InvalidSettings`."""
    return _convert(setting.flag, setting, _split(setting, value), strict=False)


def _convert(source: str, setting: Setting, value: Any, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, setting.annotation, strict=strict)
    except msgspec.ValidationError as error:
        if setting.choices:
            what = f"expected one of {', '.join(setting.choices)}"
        else:
            what = str(error).partition(" - at `")[0].partition(", got")[0]
            what = what[:1].lower() + what[1:]
        raise InvalidSettings(f"{source}: {what}, got {value!r}", hint=setting.help) from None


def _unknown(source: str, what: str, name: str, known: Iterable[str]) -> InvalidSettings:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(known))}"
    return InvalidSettings(f"{source}: no such {what}", hint=hint)


def describe_type(node: types.Type) -> str:
    """A type in words: `integer, 0 to 4096`."""
    match node:
        case types.BoolType():
            return "true or false"
        case types.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case types.IntType():
            return "integer" + _describe_range(node)
        case types.FloatType():
            return "number" + _describe_range(node)
        case types.StrType():
            return "text"
        case types.VarTupleType(item_type=item) | types.ListType(item_type=item):
            return f"list of {describe_type(item)}"
        case types.DictType(key_type=key, value_type=value):
            return f"map of {describe_type(key)} to {describe_type(value)}"
        case types.UnionType(types=options):
            parts = [describe_type(o) for o in options if not isinstance(o, types.NoneType)]
            return " or ".join(parts) + " or nothing"
    raise TypeError(f"a setting cannot be a {type(node).__name__}")


def _describe_range(node: types.IntType | types.FloatType) -> str:
    bounds = (("≥", node.ge), (">", node.gt), ("≤", node.le), ("<", node.lt))
    # 0 and 0.0 are one to typing's cache: which of the two a range has depends on who came first.
    return "".join(f", {sign} {_plain(bound)}" for sign, bound in bounds if bound is not None)


def _plain(bound: float) -> float:
    return int(bound) if bound == int(bound) else bound


def settings_reference(kind: type[msgspec.Struct]) -> str:
    """Every setting of `kind` as Markdown, a table per section."""
    structs = get_type_hints(kind)
    blocks = []
    for section, settings in sections(kind).items():
        summary = inspect.cleandoc(structs[section].__doc__ or "")
        rows = [
            f"| `{s.name}` | {describe_type(s.type)} | {_default(s)} | {s.help} |" for s in settings
        ]
        head = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        blocks.append("\n".join([f"## [{section}]", "", summary, "", *head, *rows]))
    return "\n\n".join(blocks).replace(" |  |", " | |") + "\n"


def _default(setting: Setting) -> str:
    return f"`{msgspec.json.encode(setting.default).decode()}`"
