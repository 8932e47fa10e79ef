"""Compensated models in files: safetensors for the tensors, JSON for the compensation plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from correctnet.crossbar.calibration import ranges_of
from correctnet.errors import UserError, one_line
from correctnet.files import storage
from correctnet.methods.compensation import compensate, compensation_modules
from correctnet.methods.sidepaths import add_side_paths
from correctnet.networks.blocks import Block


def save(model: nn.Module, path: str | Path) -> None:
    """Write a compensated model as safetensors + JSON, including the arguments of `compensate`, for `load`.

    The ranges of its converters, if it has any, are written, too, for `add_converters`.

    Raises UserError as `plan_of`, or if the files cannot be written.
    """
    ranges = ranges_of(model)
    converters = {"converters": {"ranges": ranges}} if ranges else {}
    storage.write_model(path, model.state_dict(), {"compensation": plan_of(model), **converters})


def plan_of(model: nn.Module) -> dict[str, Any]:
    """The arguments of `compensate` that give the architecture of a compensated model.

    Raises UserError if its layers differ in place, activation or pooling, which `compensate` sets for all alike.
    """
    filters: dict[str, int] = {}
    made: dict[str, set[str]] = {"place": set(), "activation": set(), "pool": set()}
    for name, module in compensation_modules(model).items():
        block = isinstance(module.original, Block)
        filters[f"{name}.layer".lstrip(".") if block else name] = module.generator.weight.shape[0]
        made["place"].add("block" if block else "layer")
        made["activation"].add("relu" if isinstance(module.activation, nn.ReLU) else "none")
        if module.pool != "none":  # a linear layer does not pool, whatever the option said
            made["pool"].add(module.pool)
    if any(len(values) > 1 for values in made.values()):
        raise UserError("save: the compensated layers differ in place, activation or pooling")
    return {"filters": filters, **{option: value for option, values in made.items() for value in values}}


def load(original: nn.Module, path: str | Path) -> nn.Module:
    """The compensated model at `path` as a plain `nn.Module`.

    Args:
        original: a network of the same architecture, without compensation. It is copied.
        path: the folder or file that `save` wrote.

    Raises:
        UserError: the files are damaged or were made for another network.
    """
    tensors, description = storage.read_model(path)
    return restore(original, tensors, description, str(path))


def restore(original: nn.Module, tensors: dict[str, Tensor], description: dict[str, Any], source: str) -> nn.Module:
    """A copy of `original` with the compensation and the tensors that `storage.read_model` returned.

    Raises UserError, which begins with `source`, if they do not fit `original`.
    """
    plan, sided = description.get("compensation") or {"filters": {}}, description.get("sidepath")
    what = "digital paths" if sided else "compensation"
    try:  # the weights drawn here are replaced below
        original = add_side_paths(original, **sided) if sided else original
        model = compensate(original, **plan, stage="restore")
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{source}: {what}: not a known plan ({one_line(error, 200)})") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = one_line(error, 200)
        raise UserError(f"{source}: made for another network ({first})") from error
    return model
