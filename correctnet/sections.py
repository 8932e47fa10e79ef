"""Groups of settings that are checked when they are read, and messages about what is wrong in them."""

from __future__ import annotations

import difflib
import functools
import math
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from correctnet.errors import UserError


class Section(BaseModel):
    """A group of settings; unknown keys are errors, and so are values of another kind than the setting's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would convert: `yes` for 1, "5" for 5, 1 for true."""
        number, several, truth = _expected(cls.model_fields[info.field_name].annotation)  # type: ignore[index]
        if truth and not isinstance(value, bool):
            raise ValueError("true or false is expected")
        if not number:
            return value
        values = (value,) if not several else value if isinstance(value, list | tuple) else ()
        for single in values:
            if isinstance(single, bool):
                raise ValueError("a number is expected")
            if isinstance(single, str) and (meant := _as_number(single)):
                raise ValueError(f"a number is expected (write {meant})")
        return value


@functools.cache
def _expected(annotation: Any) -> tuple[bool, bool, bool]:
    """Whether a setting is a number (or empty), several numbers, and a truth value."""
    kinds = get_args(annotation) or (annotation,)
    return int in kinds or float in kinds, get_origin(annotation) is tuple, annotation is bool


def _as_number(text: str) -> str | None:
    """How YAML writes the number that a text looks like, e.g. 1.0e-4 for "1e-4"; None: no (finite) number."""
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return exact(value) if "e" not in repr(value) else yaml.safe_dump(value).split()[0]


def exact(value: float) -> str:
    """A number as text, for paths, options and messages: the shortest that reads back as the same float.

    0.5 is "0.5", 1.0 is "1" and 1e-05 is "1e-05"; `float` is the inverse.
    """
    return repr(float(value) + 0.0).removesuffix(".0")  # + 0.0: no "-0"


class Grown(Section):
    """A section with settings that came after results were made with it.

    They are left out of its values where they have their defaults, so that values without them stay as they were.
    """

    later: ClassVar[tuple[str, ...]]
    """those settings"""

    @model_serializer(mode="wrap")
    def _given(self, handler: Any) -> dict[str, Any]:
        fields, values = type(self).model_fields, handler(self)
        return {
            key: value
            for key, value in values.items()
            if key not in self.later or getattr(self, key) != fields[key].get_default(call_default_factory=True)
        }


class Sourced(Section):
    """A section with several settings of which exactly one says where something comes from.

    Settings that are not used are no part of the section's values: those of a data set or a network of this package are
    the same as without the others.
    """

    sources: ClassVar[tuple[str, ...]]
    """those settings; the first has a default"""
    added: ClassVar[tuple[str, ...]]
    """settings that are left out of the values where they are empty"""
    of_first: ClassVar[tuple[str, ...]] = ()
    """settings that go with the first source only"""

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = [key for key in cls.sources if values.get(key) is not None]
        if len(given) > 1:
            raise ValueError(f"one of {', '.join(cls.sources)} is expected, not both {given[0]} and {given[1]}")
        if not given and cls.sources[0] in values:
            raise ValueError(f"one of {', '.join(cls.sources)} is expected")
        if not given or given[0] == cls.sources[0]:
            return values
        if odd := [key for key in cls.of_first if values.get(key) is not None]:
            raise ValueError(f"{odd[0]} goes with {cls.sources[0]} and not with {given[0]}")
        return {**values, cls.sources[0]: None}

    @model_serializer(mode="wrap")
    def _used(self, handler: Any) -> dict[str, Any]:
        first = getattr(self, self.sources[0]) is not None
        left = self.added if first else (self.sources[0], *self.added)
        values = {key: value for key, value in handler(self).items() if key not in left or value not in (None, {})}
        return values if first else {key: value for key, value in values.items() if key not in self.of_first}

    @property
    def kind(self) -> str:
        """Which of the sources is used."""
        return next(key for key in self.sources if getattr(self, key) is not None)


def place(value: str) -> str:
    """A path of the configuration. Raises ValueError for one that no command can be given."""
    if not value.strip():
        raise ValueError("a path is expected")
    if unprintable(value) or "\n" in value or "\t" in value:
        raise ValueError("a path without control characters is expected")
    return value


def unprintable(text: str) -> bool:
    """Whether a text has control characters (other than line breaks and tabs) or lone surrogates."""
    return any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` updated with the values of `over`, mappings merged key by key."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def validate(model: type[Section], values: Any, source: str, prefix: str = "") -> Any:
    """`model(**values)`; mistakes become a UserError with one line each: source, the key's path, what is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_line(model, e, source, prefix) for e in error.errors()]
        raise UserError("\n".join(lines)) from error


def tag(kind: str) -> str:
    """The tag of a kind of section in a discriminated union. Messages leave it out of the path of a key."""
    return f"<{kind}>"


def members(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation names: one, several kinds of which a value has one, or none."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if _is_section(annotation):
        return [annotation]
    return [section for inner in get_args(annotation) for section in members(inner)]


def _line(model: type[BaseModel], error: Any, source: str, prefix: str) -> str:
    whole = [str(p) for p in error["loc"]]
    path = [part for part in whole if not (part.startswith("<") and part.endswith(">"))]
    where = ".".join([*([prefix] if prefix else []), *path]) or "(top)"
    if error["type"] == "extra_forbidden":
        return f"{source}: {where}: unknown key{suggest(path[-1], _fields_at(model, path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{source}: {where}: missing"
    return f"{source}: {where}: {message}, not {error['input']!r}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section at a path; of several kinds, of all of them."""
    kinds: list[type[BaseModel]] = [model]
    for part in path:
        fields = [kind.model_fields[part] for kind in kinds if part in kind.model_fields]
        # A field is a section, one of several, or a mapping from names to sections.
        nested = [section for field in fields for section in members(field.annotation)]
        if not nested:
            break
        kinds = nested
    return list(dict.fromkeys(key for kind in kinds for key in kind.model_fields))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
