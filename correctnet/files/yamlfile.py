"""Configuration files: YAML or JSON whose every value is read as what it looks like.

YAML 1.1 silently takes the last of two equal keys, reads `no` as False, 010 as 8 and 1:30 as 90. `read_values` refuses
such values and names the place.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from correctnet.errors import UserError, one_line

PREFIX = "tag:yaml.org,2002:"
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
OCTAL = re.compile(r"[-+]?0[0-9_]+")
TEMPLATES = "__use_yte__"
"""the key that makes Snakemake treat a file as a template"""


def read_values(path: str | Path) -> Any:
    """The values of a YAML or JSON file, as Snakemake reads it. Merge keys (`<<`), anchors and aliases are fine.

    Raises:
        UserError: the file cannot be read, or is no YAML; or, with a line for each mistake, it has a duplicate key in a
            mapping, a key that is no text (`no`, `1`), a number whose notation means another one (010, 1:30), a date,
            a YAML tag (`!!set`), or a value that contains itself.
    """
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not UTF-8 text (byte {error.start + 1})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    try:
        values = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        values, mistakes = _yaml(text, path)
    else:
        mistakes = list(_json_mistakes(values))
    if isinstance(values, dict) and TEMPLATES in values:
        mistakes.append(f"{TEMPLATES}: templates are not supported")
    if mistakes:
        raise UserError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return values


def _yaml(text: str, path: str | Path) -> tuple[Any, list[str]]:
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        mistakes = [] if node is None else list(_Walk().mistakes(node))
        return (None if mistakes or node is None else loader.construct_document(node)), mistakes
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        tabs = "; indent with spaces" if "'\\t'" in str(error) else ""
        raise UserError(f"{path}: {one_line(error)}{tabs}") from error


class _Walk:
    """A walk over the nodes of a YAML document, each once however many aliases it has."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self.inside: set[int] = set()

    def mistakes(self, node: yaml.Node, path: str = "") -> Iterator[str]:
        if id(node) in self.inside:
            yield f"{path or '(top)'}: contains itself"
        if id(node) in self.done:
            return
        self.done.add(id(node))
        self.inside.add(id(node))
        if node.tag.removeprefix(PREFIX) not in PLAIN:
            yield f"{path or '(top)'}: {_found(node)}"
        elif isinstance(node, yaml.MappingNode):
            yield from self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                yield from self.mistakes(value, f"{path}.{i}".lstrip("."))
        elif _other_number(node):
            read = yaml.safe_load(node.value)
            yield f"{path or '(top)'}: {node.value} is read as {read}; write {read}, or put it in quotes"
        self.inside.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: str) -> Iterator[str]:
        seen = set()
        for key, value in node.value:
            merge = key.tag == f"{PREFIX}merge"
            if not merge and key.tag != f"{PREFIX}str":
                yield f"{path or '(top)'}: a name is expected as key, and {_found(key)}"
                continue
            where = f"{path}.{key.value}".lstrip(".")
            if key.value in seen:
                yield f"{where}: is listed twice" + ("; write <<: [*a, *b]" if merge else "")
            seen.add(key.value)
            yield from self.mistakes(value, where)
            if merge and isinstance(value, yaml.SequenceNode):
                # Versions of PyYAML differ in which of them counts.
                several = [name for name, count in Counter(_merged(value)).items() if count > 1]
                for name in (name for name in several if name not in (own.value for own, _ in node.value)):
                    yield f"{where}: {name} is in several of the mappings; set it in this one, too"


def _merged(node: yaml.Node) -> Iterator[str]:
    """The keys of the mappings in the list of a merge key, including those that they merge themselves."""
    for mapping in node.value:
        pairs = mapping.value if isinstance(mapping, yaml.MappingNode) else []
        nested = [value for key, value in pairs if key.tag == f"{PREFIX}merge"]
        names = {key.value for key, _ in pairs if key.tag != f"{PREFIX}merge"}
        for value in nested:
            inner = value if isinstance(value, yaml.SequenceNode) else yaml.SequenceNode("", [value])
            names |= set(_merged(inner))
        yield from names


def _other_number(node: yaml.Node) -> bool:
    """Whether a number is written in base 8 or 60."""
    kind = node.tag.removeprefix(PREFIX)
    return (kind in ("int", "float") and ":" in node.value) or (kind == "int" and bool(OCTAL.fullmatch(node.value)))


def _found(node: yaml.Node) -> str:
    """What a scalar is read as, or that a tag is not known here."""
    kind = node.tag.removeprefix(PREFIX)
    names = {"timestamp": "a date", "int": "a number", "float": "a number", "bool": "true or false", "null": "empty"}
    if not isinstance(node, yaml.ScalarNode):
        return "a list or mapping is there" if kind in PLAIN else f"the tag {node.tag} is not supported"
    if kind in names:
        shown = f"{node.value} is read as {names[kind]}" if node.value else "it is empty"
        return f"{shown}; put it in quotes"
    if kind in ("value", "merge"):
        return f"{node.value} has a special meaning; put it in quotes"
    return f"the tag {node.tag} is not supported"


def json_values(text: str) -> Any:
    """The values of a JSON text. Raises ValueError where it is none, or has a duplicate key in an object."""
    values = json.loads(text, object_pairs_hook=_Pairs)
    if mistakes := list(_json_mistakes(values)):
        raise ValueError(mistakes[0])
    return values


class _Pairs(dict):
    """An object of a JSON file, and its duplicate keys."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = list(dict.fromkeys(name for name in names if names.count(name) > 1))


def _json_mistakes(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, _Pairs):
        yield from (f"{path}.{name}: is listed twice".lstrip(".") for name in value.twice)
        for name, inner in value.items():
            yield from _json_mistakes(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _json_mistakes(inner, f"{path}.{i}".lstrip("."))
