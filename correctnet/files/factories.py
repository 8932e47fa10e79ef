"""Functions that a configuration names as `package.module:function`: where their source is, and calling them.

The source is found without importing it, so that a workflow can plan without torch, and what depends on a function is
run again when its source changes. Besides the module itself, modules of the same folder that it imports count.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import os
import re
import sys
from pathlib import Path
from typing import Any

from correctnet.errors import UserError, one_line

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_name(value: str) -> str:
    """`value`, if it names a function of a module. Raises ValueError otherwise.

    Descriptions of models name functions, too: those of the standard library (`os:system`) are refused.
    """
    if not NAME.fullmatch(value):
        raise ValueError("package.module:function is expected")
    if value.partition(":")[0].split(".")[0] in sys.stdlib_module_names:
        raise ValueError("a module that is not of Python's standard library is expected")
    return value


def source_digest(name: str, what: str) -> str:
    """Hexadecimal digest of the source of a function's module, and of modules beside it that it imports.

    Args:
        name: package.module:function.
        what: the setting, for messages.

    Raises:
        UserError: there is no such module, or its source has a mistake.
    """
    module = name.partition(":")[0]
    origin = _find(module)
    if origin is None:
        raise UserError(f"{what}: {name}: no module {module!r} here ({os.getcwd()}) or among those installed")
    whole = hashlib.sha256()
    for path in sorted(_with_own_imports(origin, what)):
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def call(name: str, options: dict[str, Any], what: str) -> Any:
    """Import a function and call it. Raises UserError where there is none, or it fails."""
    function = imported(name, what)
    try:
        return function(**options)
    except UserError:
        raise
    except Exception as error:  # of code that is not ours: whatever it is, the mistake is there
        raise UserError(f"{what}: {name}: {type(error).__name__}: {one_line(error, 200)}") from error


def imported(name: str, what: str) -> Any:
    """Import the function that `name` names; modules of the present folder come first, as with `python -m`.

    Raises UserError where there is none.
    """
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # of code that is not ours
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{what}: {name}: no module {error.name!r} here or among those installed") from error
        raise UserError(f"{what}: {name}: {type(error).__name__}: {one_line(error, 200)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UserError(f"{what}: {name}: {module} has no {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{what}: {name}: a function is expected, not {type(found).__name__}")
    return found


def _find(module: str) -> Path | None:
    """The source file of a module, found as `imported` does but without importing the packages that it is in."""
    places: list[str] | None = [os.getcwd(), *sys.path]
    spec = None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: i + 1]), places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
        if places is None and i + 1 < len(parts):
            return None
    return Path(spec.origin) if spec and spec.origin and os.path.isfile(spec.origin) else None


def _with_own_imports(origin: Path, what: str) -> set[Path]:
    """A source file, and those that it imports, directly or not, from its own folder and the folders in it."""
    found, waiting = set(), [origin]
    if "site-packages" in origin.parts:  # of a package that is installed: its version says what it is
        return {origin}
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix != ".py":
            continue
        try:
            tree = ast.parse(path.read_bytes(), str(path))
        except (SyntaxError, ValueError, OSError) as error:
            raise UserError(f"{what}: {path}: {type(error).__name__}: {one_line(error, 200)}") from error
        for name in _imports(tree):
            for stem in (path.parent / name.replace(".", "/"), origin.parent / name.replace(".", "/")):
                waiting += [file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()]
    return found


def _imports(tree: ast.AST) -> set[str]:
    """Names of modules that a source imports, relative ones without their dots."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if node.module else set()
            found |= {f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names}
    return {name for name in found if name}
