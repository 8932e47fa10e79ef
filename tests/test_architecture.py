"""The import graph of the package: data flows one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import correctnet

ROOT = Path(correctnet.__file__).parent

# Lowest first: a module imports modules of its own package and of those before it, at run time, too.
FLOORS = (
    {"machine", "precision", "progress", "reloading", "study"},
    {"errors"},
    {"files", "metrics", "noise", "sections"},
    {"datasets", "devices", "networks"},
    {"sources"},
    {"crossbar", "settings"},
    {"engine", "training"},
    {"evaluation"},
    {"methods"},
    {"report"},
    {"correction"},
    {"pipeline"},
    {"bench"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, those inside of functions included."""
    paths = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}

    def module(name: str) -> str:
        return name if name in paths else name.rpartition(".")[0]

    found = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "correctnet":
                found[name] |= {module(f"{node.module}.{alias.name}") for alias in node.names}
            elif isinstance(node, ast.Import):
                found[name] |= {module(a.name) for a in node.names if a.name.split(".")[0] == "correctnet"}
        found[name] -= {name, "correctnet"}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def test_no_module_imports_itself_through_others():
    order = list(TopologicalSorter(imports()).static_order())  # CycleError names the circle
    assert len(order) > 80


def test_packages_import_what_is_below_them():
    found = {name: targets for name, targets in imports().items() if name != "correctnet"}
    assert {room(name) for name in found} == set(FLOOR)
    upwards = {
        (name, target)
        for name, targets in found.items()
        for target in targets
        if room(name) != room(target) and FLOOR[room(target)] >= FLOOR[room(name)]
    }
    assert not upwards
