"""Classes that survive a reload of their module."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def survives_reload(new: Class) -> Class:
    """Class decorator that updates a class in place when its module is reloaded (`importlib.reload`).

    Other modules keep the class that they imported and use it in `isinstance` and `except`, which would not recognise a
    second class of the same name.

    @survives_reload
    class PlanStep: ...
    """
    old = vars(sys.modules[new.__module__]).get(new.__name__)
    if not isinstance(old, type) or old.__module__ != new.__module__:
        return new
    for name, value in vars(new).items():
        if name in ("__dict__", "__weakref__"):
            continue
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if variable == "__class__":  # of super()
                    cell.cell_contents = old
        setattr(old, name, value)
    for name in set(vars(old)) - set(vars(new)):
        delattr(old, name)
    return old
