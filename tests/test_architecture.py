"""The house rules, read from the syntax trees: who may import whom, and what may be done where.

`peelcli/docs/architecture.md` says what the rooms are for. Where a rule stands in the way of something better, change
it here and there, and say why in a decision record.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peelcli"

EVERYBODY = {"records", "runtime", "errors"}  # every room may import these
HEALTH = {"verdict.health", "verdict.screening", "verdict.policy"}  # what may be asked before a verdict
TENSORS = {"references", "quant"}
# What a room may import besides itself and EVERYBODY. A name with a dot is one part of a room, with a rule of its own.
RULE = {
    "errors": set(),
    "records": set(),
    "runtime": set(),
    "config": set(),
    "quant": set(),
    "quant.kernels": set(),
    "references": {"quant"},
    "storage": TENSORS,
    "storage.activations": {"storage"},
    "checkpoint": set(),
    "calibration": set(),
    "verdict": set(),
    "report": set(),
    "scoring": TENSORS | HEALTH | {"storage", "checkpoint", "calibration"},
    "fitting": TENSORS | HEALTH | {"scoring", "storage", "checkpoint"},
    "fitting.target_maps": set(),
    "tracking": {"checkpoint", "calibration", "config"},
    "stages": TENSORS
    | HEALTH
    | {"fitting", "scoring", "storage", "tracking", "checkpoint", "calibration", "config"},
    "callbacks": {"config", "tracking"},
    "api": {"stages", "storage", "tracking", "verdict", "report", "config"},
    "cli": {"stages", "storage", "tracking", "verdict", "report", "config"},
    "demo": set(),
    "__main__": {"cli"},
}
# Libraries that a room may import; a room that is not named here is free of this rule.
LIBRARIES_OF = {
    "errors": set(),
    "records": set(),
    "config": {"yaml"},
    "storage": {"h5py", "numpy", "torch"},
    "storage.hdf5": {"h5py", "numpy"},
    "storage.fit_reader": {"h5py"},
    "verdict": {"numpy"},
    "report": {"numpy", "rich", "plotly"},
    "quant": {"torch", "numpy"},
    "quant.kernels": {"torch", "triton"},
    "references": {"torch", "numpy"},
    "fitting.target_maps": set(),
}
# Libraries, and the only rooms that may import them.
CONFINED = {
    "h5py": {"storage"},
    "rich": {"report", "cli"},
    "plotly": {"report"},
    "typer": {"cli"},
    "click": {"cli"},
    "triton": {"quant.kernels"},
}
LIGHT = {  # modules that start at once, and which of the heavy libraries each may load
    "peelcli": [],
    "peelcli.cli.main": [],
    "peelcli.report": [],
    "peelcli.verdict": [],
    "peelcli.storage.fit_reader": ["h5py"],
}
# Modules of stages/ that still compute something, and functions that are still too long: both lists only shrink.
NUMERICAL_STAGES = {
    "stages.estimate",
    "stages.fitter",
    "stages.graft",
    "stages.open_model",
    "stages.precision",
}
LONG_FUNCTIONS = {
    "references.challenge.fit_challenge",
    "stages.estimate.run_estimate",
}
MOST_ENTRIES, LONGEST_FILE, LONGEST_FUNCTION = 22, 400, 60
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "glob", "safetensors", "h5py"}
FILE_CALLS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "fromfile", "tofile", "memmap"}
STREAMS = {"exit", "_exit", "stdout", "stderr"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def python_files(*folders: Path) -> list[Path]:
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    assert files, f"no Python file under {', '.join(map(str, folders))}: this test would check nothing"
    return files


def module_of(path: Path) -> str:
    """The dotted name below `peelcli`; "__init__" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def room_of(module: str, table: dict[str, set[str]]) -> str:
    """The longest name in `table` that `module` lies in, else the top-level name."""
    return max((r for r in table if within(module, r)), key=len, default=module.split(".")[0])


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in python_files(PACKAGE)}


def rooms() -> dict[str, list[str]]:
    """Every room and its modules; without the package's own `__init__`."""
    found: dict[str, list[str]] = {}
    for module in modules():
        if module != "__init__":
            found.setdefault(room_of(module, RULE), []).append(module)
    assert {"errors", "records", "cli", "quant", "report"} <= set(found)
    return found


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def package_of(module: str) -> str:
    """What a relative import in the module counts from."""
    return ".".join(modules()[module].relative_to(ROOT).parts[:-1])


def imports(tree: ast.AST, package: str = "peelcli") -> Iterator[str]:
    """The dotted names imported anywhere in `tree`; `package` is what a relative import counts from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            yield from (
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )


def house_imports(tree: ast.AST, package: str = "peelcli") -> set[str]:
    """The modules below `peelcli` that `tree` imports, or imports names from."""
    found = set()
    for name in imports(tree, package):
        parts = name.split(".")[1:] if name.startswith("peelcli.") else []
        while parts and ".".join(parts) not in modules():
            parts.pop()
        found |= {".".join(parts)} if parts else set()
    return found


def outside_imports(tree: ast.AST) -> set[str]:
    """The top-level modules outside the standard library and the house that `tree` imports."""
    return {name.split(".")[0] for name in imports(tree)} - set(sys.stdlib_module_names) - {"peelcli"}


def console_acts(tree: ast.AST) -> set[str]:
    """What only the command line may do, and `tree` does: print, end the process, read the environment."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in {"print", "input", "exit", "quit", "SystemExit"}:
            found.add(node.id)
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT | STREAMS:
            found.add(node.attr)
    named = {name.split(".")[-1] for name in imports(tree) if name.startswith(("os.", "sys."))}
    return found | named & (ENVIRONMENT | STREAMS)


def file_acts(tree: ast.AST) -> set[str]:
    """How `tree` touches files: the modules it imports for them, and the calls it makes."""
    found = {name.split(".")[0] for name in imports(tree)} & FILE_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= {_name(node.func)} & FILE_CALLS
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and _name(node.value) == "torch":
            found.add(f"torch.{node.attr}")
    return found


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def long_functions() -> dict[str, int]:
    """Functions of the package with more lines than fit on a screen, and how many each has."""
    found = {}
    for module in modules():
        for node in ast.walk(tree_of(module)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found[f"{module}.{node.name}"] = lines
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of the graph, [] where there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def test_every_room_imports_only_what_the_rule_lets_it():
    for room, members in rooms().items():
        assert room in RULE, f"peelcli/{room} has no rule: give it one in RULE and in docs/architecture.md"
        allowed = {room, *RULE[room], *EVERYBODY}
        for module in members:
            found = house_imports(tree_of(module), package_of(module))
            more = {other for other in found if not any(within(other, a) for a in allowed)}
            assert not more, f"{module} imports {sorted(more)}, which {room} may not"


def at_run_time(tree: ast.Module) -> ast.Module:
    """`tree` without what is imported for annotations alone: that makes no cycle."""
    kept = [s for s in tree.body if not (isinstance(s, ast.If) and _name(s.test) == "TYPE_CHECKING")]
    return ast.Module(kept, [])


def test_no_two_modules_import_each_other():
    graph = {
        m: house_imports(at_run_time(tree_of(m)), package_of(m)) - {m} for m in modules() if m != "__init__"
    }
    assert sum(map(len, graph.values())) > 100
    assert not cycle(graph), " → ".join(cycle(graph))


@pytest.mark.parametrize("room", sorted(LIBRARIES_OF))
def test_rooms_whose_libraries_are_counted(room):
    for module in modules():
        if room_of(module, LIBRARIES_OF) == room:
            more = outside_imports(tree_of(module)) - LIBRARIES_OF[room]
            assert not more, f"{module} imports {more}"


@pytest.mark.parametrize("library", sorted(CONFINED))
def test_libraries_that_live_in_few_rooms(library):
    for room, members in rooms().items():
        if not any(within(room, home) for home in CONFINED[library]):
            for module in members:
                assert library not in outside_imports(tree_of(module)), f"{module} imports {library}"


def test_only_the_command_line_prints_exits_and_reads_the_environment():
    for room, members in rooms().items():
        for module in members if room != "cli" else ():
            assert not console_acts(tree_of(module)), f"{module} uses {console_acts(tree_of(module))}"


def test_tensor_rooms_never_touch_files():
    for room in ("quant", "quant.kernels", "references"):
        for module in rooms().get(room, ()):
            assert not file_acts(tree_of(module)), f"{module} touches files: {file_acts(tree_of(module))}"


def test_nothing_numerical_is_written_in_stages():
    found = {m for m in modules() if within(m, "stages") and outside_imports(tree_of(m)) & {"torch", "numpy"}}
    assert found <= NUMERICAL_STAGES, f"{found - NUMERICAL_STAGES} compute: move that to fitting or scoring"
    assert found >= NUMERICAL_STAGES, f"take {NUMERICAL_STAGES - found} off NUMERICAL_STAGES"


def test_few_rooms_at_the_top():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_no_file_and_no_function_is_longer_than_a_reader_can_hold():
    for path in python_files(PACKAGE, ROOT / "tests"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines, {LONGEST_FILE} at most"
    found = long_functions()
    more = {name: lines for name, lines in found.items() if name not in LONG_FUNCTIONS}
    assert not more, f"more than {LONGEST_FUNCTION} lines: {more}"
    assert found.keys() >= LONG_FUNCTIONS, f"take {LONG_FUNCTIONS - found.keys()} off LONG_FUNCTIONS"


def test_no_drawer_for_everything():
    for path in python_files(PACKAGE, ROOT / "tests"):
        names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
        assert not names & {"utils", "util", "common", "helpers", "misc"}, path


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_importing_it_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'h5py'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == LIGHT[module]


@pytest.mark.parametrize(
    ("source", "house", "outside"),
    [
        ("import h5py", set(), {"h5py"}),
        ("def f():\n    from rich.table import Table", set(), {"rich"}),
        ("if TYPE_CHECKING:\n    import torch.nn as nn", set(), {"torch"}),
        ("from . import cli", {"cli"}, set()),
        ("from .cli.main import run", {"cli.main"}, set()),
        ("from peelcli import records, __version__", {"records"}, set()),
        ("import peelcli.cli.main as m", {"cli.main"}, set()),
        ("importlib.import_module('peelcli.cli')", {"cli"}, set()),
        ("__import__('torch')", set(), {"torch"}),
        ("import os, json", set(), set()),
    ],
)
def test_the_reader_sees_every_way_to_import(source, house, outside):
    assert house_imports(ast.parse(source)) == house
    assert outside_imports(ast.parse(source)) == outside


def test_the_reader_resolves_relative_imports_from_within_a_room():
    assert house_imports(ast.parse("from ..quant import schemes"), "peelcli.references") == {"quant.schemes"}
    assert house_imports(ast.parse("from .plan import Plan"), "peelcli.references") == {"references.plan"}


def test_the_reader_finds_a_cycle_and_only_that():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("source", "acts"),
    [
        ("print('x')", {"print"}),
        ("from sys import exit as leave", {"exit"}),
        ("import os as o\no.environ['A']", {"environ"}),
        ("from os import getenv", {"getenv"}),
        ("raise SystemExit(2)", {"SystemExit"}),
        ("os._exit(1)", {"_exit"}),
        ("sys.stdout.write('x')", {"stdout"}),
        ("console.print('x')", set()),
    ],
)
def test_the_reader_sees_what_belongs_to_the_command_line(source, acts):
    assert console_acts(ast.parse(source)) == acts


@pytest.mark.parametrize(
    ("source", "acts"),
    [
        ("from pathlib import Path", {"pathlib"}),
        ("open('x')", {"open"}),
        ("path.open()", {"open"}),
        ("torch.save(x, 'x')", {"torch.save"}),
        ("import json", set()),
    ],
)
def test_the_reader_sees_files_touched(source, acts):
    assert file_acts(ast.parse(source)) == acts


def test_an_empty_folder_is_a_failure_not_a_pass(tmp_path):
    with pytest.raises(AssertionError, match="would check nothing"):
        python_files(tmp_path)
