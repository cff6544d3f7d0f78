"""The project's own checks find what they are for."""

from __future__ import annotations

from pathlib import Path

from grimp import ImportGraph

from tools import check_help_imports, check_map, check_sizes
from tools.import_contracts import NeverContract, OnlyContract


def function(num_lines: int) -> str:
    return "class A:\n    def long(self):\n" + "        pass\n" * (num_lines - 1)


def test_a_long_function_needs_a_reason() -> None:
    sources = {"a.py": function(61), "b.py": function(60)}
    assert check_sizes.problems(sources, {}) == ["a.py::A.long: 61 lines, the limit is 60"]
    assert check_sizes.problems(sources, {"a.py::A.long": "a table"}) == []


def test_a_long_file_needs_a_reason() -> None:
    assert check_sizes.problems({"a.py": "x = 1\n" * 501}, {}) == [
        "a.py: 501 lines, the limit is 500"
    ]


def test_an_exception_without_need_or_reason_is_refused() -> None:
    listed = check_sizes.read_exceptions("# comment\n\na.py::f: for a reason: two\nb.py: \n")
    assert listed == {"a.py::f: for a reason": "two", "b.py": ""}
    assert check_sizes.problems({"b.py": "x = 1\n" * 501}, {"b.py": ""}) != []
    assert "within limits" in check_sizes.problems({"a.py": "x = 1\n"}, {"a.py": "was long"})[0]


def test_the_map_must_name_every_package_and_nothing_else(tmp_path: Path) -> None:
    for name in ("core/__init__.py", "core/clock.py", "server/__init__.py", "server/app.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    complete = "- `core/`: nouns\n  - `core/clock.py`: time\n- `server/`: protocols\n"
    assert check_map.problems(tmp_path, complete) == []
    assert check_map.problems(tmp_path, complete.replace("- `server/`", "- `serve/`")) == [
        "docs/map.md: server/ is missing",
        "docs/map.md: serve/ does not exist",
    ]


def contract(kind: type[NeverContract | OnlyContract], **options: list[str]) -> list[str]:
    graph = ImportGraph()
    graph.add_import(importer="naiad.server.http", imported="naiad.backends.llm")
    graph.add_import(importer="naiad.backends.llm", imported="naiad.engine.kv")
    graph.add_import(importer="naiad.engine.kv", imported="torch")
    graph.add_import(importer="naiad.engine.kv", imported="collections")
    made = kind(name="", session_options={}, contract_options=options)
    check = made.check(graph, verbose=False)
    assert check.kept == (not check.metadata["found"])
    found: list[str] = check.metadata["found"]
    return found


def test_never_counts_indirect_imports_and_passes_over_what_does_not_exist() -> None:
    chain = "naiad.server.http -> naiad.backends.llm -> naiad.engine.kv"
    assert contract(NeverContract, sources=["naiad.server"], forbidden=["naiad.engine"]) == [chain]
    assert contract(NeverContract, sources=["naiad.fleet"], forbidden=["naiad.engine"]) == []
    assert contract(NeverContract, sources=["naiad.server"], forbidden=["naiad.fleet"]) == []


def test_never_has_exceptions_by_module() -> None:
    options = {"sources": ["naiad.engine"], "forbidden": ["torch"]}
    assert contract(NeverContract, **options) == ["naiad.engine.kv -> torch"]
    assert contract(NeverContract, **options, exceptions=["naiad.engine.kv"]) == []


def test_never_does_not_go_through_lazy_modules() -> None:
    options = {"sources": ["naiad.server"], "forbidden": ["naiad.engine"]}
    assert contract(NeverContract, **options, lazy=["naiad.backends.llm"]) == []


def test_only_allows_the_standard_library_and_what_is_listed() -> None:
    assert contract(OnlyContract, sources=["naiad.engine"], allowed=["torch"]) == []
    assert contract(OnlyContract, sources=["naiad.engine"], allowed=["numpy"]) == [
        "naiad.engine.kv -> torch"
    ]


def test_help_imports_nothing_heavy() -> None:
    assert check_help_imports.imported() == []
