"""One name means one thing: no two public modules, classes or functions of llm/ and data/ share a name."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for package in ("llm", "data") for path in (ROOT / package).rglob("*.py"))

DOORS = {
    "llm/compress.py": "python -m llm.compress",
    "llm/export.py": "python -m llm.export",
    "llm/harness.py": "python -m llm.harness",
    "llm/replay.py": "python -m llm.replay",
    "llm/commands/report.py": "python -m llm.report",
    "data/prepare.py": "python -m data.prepare",
}
"""Files that share the name of what they open, because a documented command contains it; they define only `main`."""

ENTRY_POINT = "main"
"""The function that a command calls; by convention each command has one under this name."""


def modules() -> dict[str, list[str]]:
    """Return the files and packages by name, without doors."""
    places = defaultdict(list)
    for path in FILES:
        relative = str(path.relative_to(ROOT))
        if path.name == "__init__.py":
            places[path.parent.name].append(relative)
        elif not path.stem.startswith("_") and relative not in DOORS:
            places[path.stem].append(relative)
    return places


def definitions(kind: type | tuple[type, ...]) -> dict[str, list[str]]:
    """Return the files that define each public class or function at their top level."""
    places = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, kind) and not node.name.startswith("_") and node.name != ENTRY_POINT:
                places[node.name].append(str(path.relative_to(ROOT)))
    return places


@pytest.mark.parametrize(
    "places",
    [modules(), definitions(ast.ClassDef), definitions((ast.FunctionDef, ast.AsyncFunctionDef))],
    ids=["modules", "classes", "functions"],
)
def test_no_two_share_a_name(places):
    assert len(places) > 100
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_defines_nothing_but_its_entry_point(door):
    body = ast.parse((ROOT / door).read_text()).body
    assert {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)} <= {ENTRY_POINT}
