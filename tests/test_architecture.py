"""The lines of the house: who may import whom, and what may be done where, read from the syntax trees.

A room is a module or a package directly under `peelcli`. Where a line stands in the way of something better,
change the line here and in the layout, and say why in the changelog.
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

# From the roof down: a room imports from its own floor and from those below it.
FLOORS = (
    {"__main__"},
    {"cli", "callbacks"},
    {"watching", "loggers"},
    {"audit", "plan", "demo", "series"},
    {"extract", "fit", "earlier", "report", "replay", "graft"},
    {"peeling", "end_to_end", "measuring"},
    {
        "scoring",
        "fitstore",
        "statedata",
        "modelblock",
        "describe",
        "workspace",
        "opened",
        "keys",
        "baseline",
        "history",
    },
    {"references", "paths", "verdict", "precision"},
    {
        "fittedrun",
        "quant",
        "kernels",
        "activations",
        "checkpoint",
        "calibration",
        "statistics",
        "same_tokens",
    },
    {"check_run"},
    {"config"},
    {"h5files"},
    {"h5read"},
    {
        "records",
        "errors",
        "progress",
        "printable",
        "library_words",
        "machine",
        "sink",
        "locks",
        "durable",
        "workers",
        "revive",
        "smallfiles",
        "metrics",
        "batching",
        "carried",
    },
)
# What a room may import from its house and from outside; a room that is not named here is free of this line.
HOUSE_ONLY = {
    "errors": set(),
    "printable": set(),
    "records": set(),
    "statistics": set(),
    "same_tokens": {"records", "errors"},
    "verdict": {"records", "errors", "config", "statistics"},
    "report": {"records", "errors", "printable"},
    "quant": {"records", "errors", "kernels"},
    "kernels": {"records", "errors"},
    "references": {"records", "errors", "quant", "kernels", "progress", "workers"},
    "paths": {"records", "errors", "progress"},
}
OUTSIDE_ONLY = {
    "errors": set(),
    "printable": set(),
    "records": set(),
    "config": {"yaml"},
    "statistics": {"numpy"},
    "h5files": {"h5py", "numpy"},  # no torch: a report is to start at once
    "h5read": {"h5py", "numpy"},
    "fittedrun": set(),
    "verdict": {"numpy"},
    "report": {"numpy", "rich", "plotly"},
    "quant": {"torch", "numpy"},
    "kernels": {"torch", "triton"},
    "references": {"torch", "numpy"},
    "paths": set(),
}
# Libraries, and the only rooms that may import them.
LIBRARIES = {
    "h5py": {"activations", "fitstore", "h5files", "h5read"},
    "rich": {"report", "cli"},
    "plotly": {"report"},
    "typer": {"cli"},
    "click": {"cli"},
    "triton": {"kernels"},
}
TENSORS_ONLY = ("quant", "kernels", "references")  # they never see a file
FILES_ONLY = ("checkpoint", "activations")  # they never do mathematics
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "glob", "safetensors", "h5py"}
FILE_CALLS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "fromfile", "tofile", "memmap"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
LONGEST_FILE = 400


def python_files(*folders: Path) -> list[Path]:
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    assert files, f"no Python file under {', '.join(map(str, folders))}: this test would check nothing"
    return files


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def rooms() -> dict[str, list[Path]]:
    """Every room with its files; the package's own `__init__` is the room of that name."""
    found: dict[str, list[Path]] = {}
    for path in python_files(PACKAGE):
        found.setdefault(room_of(path), []).append(path)
    assert {"__init__", "errors", "records", "cli", "quant", "report"} <= set(found)
    return found


def imports(tree: ast.AST, package: str) -> Iterator[str]:
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
    """The rooms that `tree` imports from."""
    names = {name.split(".")[1] for name in imports(tree, package) if name.startswith("peelcli.")}
    return {name for name in names if name in rooms() or any(name in floor for floor in FLOORS)}


def outside_imports(tree: ast.AST, package: str = "peelcli") -> set[str]:
    """The top-level modules outside the standard library and the house that `tree` imports."""
    tops = {name.split(".")[0] for name in imports(tree, package)}
    return tops - set(sys.stdlib_module_names) - {"peelcli"}


def console_acts(tree: ast.AST) -> set[str]:
    """What only the command line may do, and `tree` does: print, end the process, read the environment."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in {"print", "input", "exit", "quit", "SystemExit"}:
            found.add(node.id)
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT | {
            "exit",
            "_exit",
            "stdout",
            "stderr",
        }:
            found.add(node.attr)
    named = {name.split(".")[-1] for name in imports(tree, "peelcli") if name.startswith(("os.", "sys."))}
    return found | named & (ENVIRONMENT | {"exit", "_exit", "stdout", "stderr"})


def file_acts(tree: ast.AST) -> set[str]:
    """How `tree` touches files: the modules it imports for them, and the calls it makes."""
    modules = {name.split(".")[0] for name in imports(tree, "peelcli")} & FILE_MODULES
    calls = {_name(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} & FILE_CALLS
    torch_files = {
        f"torch.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and _name(node.value) == "torch"
    }
    return modules | calls | torch_files


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


@cache
def parsed(path: Path) -> tuple[ast.AST, str]:
    """The syntax tree of a file, and the package that its relative imports count from."""
    return ast.parse(path.read_text(encoding="utf-8")), ".".join(path.relative_to(ROOT).parts[:-1])


def test_every_room_has_its_floor_and_imports_from_none_above_it():
    floor = {room: number for number, names in enumerate(FLOORS) for room in names}
    for room, files in rooms().items():
        if room == "__init__":
            continue
        assert room in floor, f"peelcli/{room} has no floor: give it one in FLOORS and in the layout"
        for path in files:
            above = {other for other in house_imports(*parsed(path)) if floor.get(other, 99) < floor[room]}
            assert not above, f"{path.relative_to(ROOT)} imports from a floor above its own: {above}"


def test_nothing_imports_the_command_line_but_main():
    for room, files in rooms().items():
        if room not in ("cli", "__main__"):
            for path in files:
                assert "cli" not in house_imports(*parsed(path)), path


@pytest.mark.parametrize("room", sorted(HOUSE_ONLY))
def test_rooms_that_keep_to_themselves(room):
    for path in rooms()[room]:
        more = house_imports(*parsed(path)) - HOUSE_ONLY[room] - {room}
        assert not more, f"{path.relative_to(ROOT)} imports {more}"


@pytest.mark.parametrize("room", sorted(OUTSIDE_ONLY))
def test_rooms_whose_libraries_are_counted(room):
    for path in rooms()[room]:
        more = outside_imports(*parsed(path)) - OUTSIDE_ONLY[room]
        assert not more, f"{path.relative_to(ROOT)} imports {more}"


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_libraries_that_live_in_few_rooms(library):
    for room, files in rooms().items():
        if room not in LIBRARIES[library]:
            for path in files:
                assert library not in outside_imports(*parsed(path)), (
                    f"{path.relative_to(ROOT)} imports {library}"
                )


def test_only_the_command_line_prints_exits_and_reads_the_environment():
    for room, files in rooms().items():
        if room != "cli":
            for path in files:
                acts = console_acts(parsed(path)[0])
                assert not acts, f"{path.relative_to(ROOT)} uses {acts}"


def test_tensor_rooms_never_touch_files():
    present = [room for room in TENSORS_ONLY if room in rooms()]
    assert {"quant", "references"} <= set(present)
    for room in present:
        for path in rooms()[room]:
            acts = file_acts(parsed(path)[0])
            assert not acts, f"{path.relative_to(ROOT)} touches files: {acts}"
            assert not house_imports(*parsed(path)) & {
                "checkpoint",
                "activations",
                "calibration",
                "fitstore",
            }, path


def test_file_rooms_never_do_mathematics():
    for room in FILES_ONLY:
        for path in rooms()[room]:
            mathematics = house_imports(*parsed(path)) & {*TENSORS_ONLY, "scoring", "statistics", "verdict"}
            assert not mathematics, f"{path.relative_to(ROOT)} imports {mathematics}"


def test_no_file_is_longer_than_a_reader_can_hold():
    for path in python_files(PACKAGE, ROOT / "tests"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines, {LONGEST_FILE} at most"


def test_no_drawer_for_everything():
    for path in python_files(PACKAGE, ROOT / "tests"):
        names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
        assert not names & {"utils", "util", "common", "helpers", "misc"}, path


@pytest.mark.parametrize("module", ["peelcli", "peelcli.cli.main", "peelcli.report", "peelcli.verdict"])
def test_importing_it_loads_neither_torch_nor_transformers(module):
    assert not loaded_by(module, "torch", "transformers", "h5py")


def test_a_report_is_read_without_torch():
    assert loaded_by("peelcli.fittedrun", "torch", "transformers", "h5py") == ["h5py"]


def loaded_by(module, *libraries):
    code = f"import sys, {module}; print(*sorted({set(libraries)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("source", "house", "outside"),
    [
        ("import h5py", set(), {"h5py"}),
        ("def f():\n    from rich.table import Table", set(), {"rich"}),
        ("if TYPE_CHECKING:\n    import torch.nn as nn", set(), {"torch"}),
        ("from . import cli", {"cli"}, set()),
        ("from .cli.main import run", {"cli"}, set()),
        ("from peelcli import records, __version__", {"records"}, set()),
        ("import peelcli.cli.main as m", {"cli"}, set()),
        ("importlib.import_module('peelcli.cli')", {"cli"}, set()),
        ("__import__('torch')", set(), {"torch"}),
        ("import os, json", set(), set()),
    ],
)
def test_the_reader_sees_every_way_to_import(source, house, outside):
    tree = ast.parse(source)
    assert house_imports(tree) == house
    assert outside_imports(tree) == outside


def test_the_reader_resolves_relative_imports_from_within_a_room():
    assert house_imports(ast.parse("from ..quant import schemes"), "peelcli.references") == {"quant"}
    assert house_imports(ast.parse("from .interface import Witness"), "peelcli.references") == {"references"}


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
