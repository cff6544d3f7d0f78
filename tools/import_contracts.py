"""Two kinds of import-linter contract that pyproject.toml uses beside the built-in ones.

`never` is `forbidden` for a house under construction: a package that does not exist yet is passed
over, so that its rules count from its first day; and single modules may be excepted.
`only` lists everything a package may import beside the standard library and itself.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

from importlinter import Contract, ContractCheck, fields, output

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from grimp import ImportGraph


def is_within(module: str, packages: Iterable[str]) -> bool:
    """Whether `module` is one of `packages` or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _names(option: object) -> list[str]:
    # On an instance, import-linter replaces each field by the parsed value.
    return cast("list[str]", option) or []


def _modules_of(graph: ImportGraph, packages: Iterable[str]) -> Iterator[str]:
    return (module for module in sorted(graph.modules) if is_within(module, packages))


class NeverContract(Contract):
    """No module of `sources` imports one of `forbidden`, directly or through others."""

    sources = fields.ListField(subfield=fields.StringField())
    forbidden = fields.ListField(subfield=fields.StringField())
    # Modules that may import it; a source that imports such a module breaks the contract.
    exceptions = fields.ListField(subfield=fields.StringField(), required=False)
    # Modules that import only when they are used (`naiad` itself): no chain goes through them.
    lazy = fields.ListField(subfield=fields.StringField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look for the shortest chain from every source module to every forbidden package."""
        sources, forbidden = _names(self.sources), _names(self.forbidden)
        exceptions = _names(self.exceptions)
        for module in graph.modules & set(_names(self.lazy)):
            for imported in graph.find_modules_directly_imported_by(module):
                graph.remove_import(importer=module, imported=imported)
        chains = []
        for source in _modules_of(graph, sources):
            if is_within(source, exceptions):
                continue
            for target in _modules_of(graph, forbidden):
                chain = graph.find_shortest_chain(importer=source, imported=target)
                if chain:
                    chains.append(" -> ".join(chain))
                    break
        return ContractCheck(kept=not chains, metadata={"found": chains})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one chain per line."""
        _print_found(check.metadata)


class OnlyContract(Contract):
    """Modules of `sources` import themselves, `allowed` and the standard library."""

    sources = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look at every direct import."""
        sources = _names(self.sources)
        allowed = [*sources, *_names(self.allowed), *sys.stdlib_module_names]
        found = [
            f"{source} -> {imported}"
            for source in _modules_of(graph, sources)
            for imported in sorted(graph.find_modules_directly_imported_by(source))
            if not is_within(imported, allowed)
        ]
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one import per line."""
        _print_found(check.metadata)


def _print_found(metadata: dict[str, Any]) -> None:
    for line in metadata["found"]:
        output.print_error(line)
    output.new_line()
