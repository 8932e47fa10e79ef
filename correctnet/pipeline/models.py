"""Model files of the stages: networks of this package with their description and history."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from correctnet import devices
from correctnet.datasets import DATASETS
from correctnet.datasets.base import DataSet
from correctnet.devices.configuration import DeviceSettings
from correctnet.errors import UserError, one_line
from correctnet.files import storage
from correctnet.files.factories import check_name, source_digest
from correctnet.methods import saved
from correctnet.networks import NETWORKS
from correctnet.networks.building import build, build_own
from correctnet.pipeline.specs import STAGES, Stage
from correctnet.sections import exact, validate
from correctnet.settings import Data, Network, Settings


def read_network(path: str | Path, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Read the network at `path` as a plain module in evaluation mode, and its description.

    Raises UserError where the files are absent, damaged, or describe no network of this package.
    """
    tensors, description = storage.read_model(path)
    if "network" not in description:
        raise UserError(f"{path}: holds no network of correctnet.networks; load it with correctnet.load")
    _check_description(storage.model_files(path)[1], description)
    _warn_of_another_source(path, description["network"])
    try:
        # The weights drawn here are replaced.
        model = build_described(description["network"], 0, "restore")
        model = saved.restore(model, tensors, description, str(path))
    except (TypeError, ValueError) as error:  # settings that no network and no compensation has
        raise UserError(f"{storage.model_files(path)[1]}: describes no network ({one_line(error)})") from error
    return model.eval().to(device), description


def _warn_of_another_source(path: str | Path, network: dict[str, Any]) -> None:
    """Warn where the function that makes the user's own network is no longer the one that the model was made with."""
    if "source" in network and network["source"] != source_digest(network["factory"], "network.factory"):
        warnings.warn(
            f"{path}: the source of {network['factory']} has changed since this model was made; what is computed now "
            "may be another network with its weights",
            stacklevel=3,
        )


def _compensated(description: dict[str, Any]) -> bool:
    """Whether a network has compensators, or digital paths beside its layers."""
    return bool((description.get("compensation") or {"filters": {}})["filters"] or description.get("sidepath"))


def check_uncompensated(stage: Stage, path: Path, description: dict[str, Any]) -> None:
    """Raise a UserError where a stage that precedes compensation is given a compensated network."""
    if _compensated(description):
        what = "has digital paths" if description.get("sidepath") else "is compensated"
        raise UserError(f"{stage}: {path} {what}; give the network that it was made from")


def is_whole(value: Any, low: int) -> bool:
    """Whether a value of a JSON file is a whole number, at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_number(value: Any, low: float = 0.0, high: float = math.inf) -> bool:
    """Whether a value of a JSON file is a finite number from `low` to `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def are_filters(value: Any) -> bool:
    """Whether a value of a JSON file maps layers to numbers of filters."""
    return isinstance(value, dict) and all(is_whole(m, 1) for m in value.values())


def expect(path: Path, key: str, holds: bool, expected: str, value: Any) -> None:
    """Raise a UserError about a value of a JSON file that is not what is expected."""
    if not holds:
        raise UserError(f"{path}: {key}: {expected} is expected, not {json.dumps(value)[:60]}")


def _check_description(path: Path, description: dict[str, Any]) -> None:
    """Raise a UserError where a model's description has a value that no stage writes."""
    network, history = description["network"], description.get("history", [])
    kind = "factory" if isinstance(network, dict) and "factory" in network else "name"
    expect(path, "network", isinstance(network, dict) and isinstance(network.get(kind), str), "a network", network)
    if kind == "factory":
        expect(path, "network.factory", _is_factory(network["factory"]), "package.module:function", network["factory"])
        options = network.get("options", {})
        expect(path, "network.options", isinstance(options, dict), "arguments by their names", options)
    sizes = ("height", "width") if kind == "factory" else tuple({"height", "width"} & set(network))
    for key in ("classes", "channels", *sizes):
        expect(path, f"network.{key}", is_whole(network.get(key), 1), "a number of them", network.get(key))
    holds = isinstance(history, list) and all(
        isinstance(h, dict) and isinstance(h.get("stage"), str) and is_whole(h.get("epochs"), 0) for h in history
    )
    expect(path, "history", holds, "a list of stages, each with its epochs", history)
    overhead = description.get("overhead", 0.0)
    expect(path, "overhead", is_number(overhead), "a fraction that is at least 0", overhead)
    plan = description.get("compensation") or {"filters": {}}
    expect(path, "compensation", isinstance(plan, dict) and are_filters(plan.get("filters")), "filters by layer", plan)
    converters = description.get("converters")
    holds = converters is None or (isinstance(converters, dict) and _are_ranges(converters.get("ranges")))
    expect(path, "converters", holds, "converters with two ranges for each layer", converters)
    made = description.get("data")
    if made is not None:
        holds = isinstance(made, dict) and is_whole(made.get("seed"), 0) and is_number(made.get("validation"), 0, 1)
        own = holds and any(isinstance(made.get(key), str) for key in Data.sources[1:])
        holds = holds and (own or made.get("dataset") in DATASETS)
        expect(path, "data", holds, "a data set, the fraction held out and a seed", made)


def _are_ranges(value: Any) -> bool:
    pairs = value.values() if isinstance(value, dict) else [()]
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in pairs)


def _is_factory(value: Any) -> bool:
    try:
        return isinstance(value, str) and check_name(value) == value
    except ValueError:
        return False


def describe_network(network: Network, data: DataSet) -> dict[str, Any]:
    """A network's settings as part of a model's description: enough to make it again, without its weights."""
    channels, height, width = data.train.images.shape[1:]
    size = {"height": height, "width": width}
    known: dict[str, Any] = {"classes": data.classes, "channels": channels}
    if network.name is None:
        source = source_digest(network.factory, "network.factory")
        return {"factory": network.factory, "options": network.options, "source": source, **known, **size}
    known |= {} if (height, width) == (32, 32) else size
    options = NETWORKS[network.name].options(network.widths, network.batchnorm, network.dropout)
    return {"name": network.name, **known, **options}


def network_name(network: dict[str, Any]) -> str:
    """The name of a described network, for tables: of the user's own that of the function."""
    return network["name"] if "name" in network else network["factory"].rpartition(":")[2]


def image_shape(network: dict[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of the images of a described network."""
    return network["channels"], network.get("height", 32), network.get("width", 32)


def build_described(network: dict[str, Any], seed: int, stage: str) -> nn.Module:
    """Make the network that a model's description names, with weights drawn from `seed` for `stage`.

    A network of the user's own is made by the function that the description names.
    """
    if "factory" in network:
        options = network.get("options", {})
        return build_own(network["factory"], options, network["classes"], image_shape(network), seed, stage)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in network.items() if k not in ("height", "width")}
    return build(**options, seed=seed, stage=stage)


def write_network(
    out: Path, model: nn.Module, base: dict[str, Any], stage: Stage, settings: Settings, metrics: dict[str, Any]
) -> None:
    """Write a model that `stage` made from one described by `base`, with the stage added to its history.

    Of a stage under a device, the history has the digest of the device's fit or levels, too.
    """
    description = {k: v for k, v in base.items() if k not in ("format", "sha256")}
    own = {**settings.data.model_dump(mode="json"), "seed": settings.seed}
    description["data"] = storage.training_data(base) or own
    entry = {"stage": stage, **metrics, "settings": json.loads(STAGES[stage].canonical(settings))}
    if isinstance(settings.variation, DeviceSettings) and "variation" in entry["settings"]:
        entry["measurement"] = devices.make(settings.variation).describe()["measurement"]
    description["history"] = [*base.get("history", []), entry]
    storage.write_model(out, model.state_dict(), description)


def last_stage(description: dict[str, Any]) -> str:
    """The stage that made a model."""
    return description.get("history", [{"stage": "pretrain"}])[-1]["stage"]


def trained_sigma(history: Sequence[dict[str, Any]]) -> str:
    """What a model was trained for, from the stages whose settings have a variation; "none" without any.

    Of the lognormal, sigma; of a device, its name with time and level.
    """
    found = (h.get("settings", {}).get("variation", {}) for h in history)
    return " + ".join(dict.fromkeys(filter(None, map(_trained_for, found)))) or "none"


def _trained_for(variation: dict[str, Any]) -> str | None:
    if "device" in variation:
        return validate(DeviceSettings, variation, "history").text
    return None if variation.get("sigma") is None else exact(variation["sigma"])
