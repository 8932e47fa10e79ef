"""Networks by name, networks that a function of the user's makes, and their weights."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from correctnet.errors import UserError, one_line
from correctnet.files.factories import imported
from correctnet.networks import NETWORKS
from correctnet.noise import streams


def build(name: str, classes: int, channels: int, seed: int = 0, stage: str = "build", **options: object) -> nn.Module:
    """Make a network by name, its weights drawn from `seed`; torch's global generator is left unchanged.

    `options` are arguments of the function that makes it. Each `stage` that begins with new weights has its own.
    Raises UserError for an unknown name.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network {name!r} (known: {', '.join(NETWORKS)})")
    with streams.global_generators(seed, "network", stage):
        return NETWORKS[name].make()(classes, channels, **options)


def build_own(
    factory: str,
    options: Mapping[str, Any],
    classes: int,
    shape: tuple[int, int, int],
    seed: int = 0,
    stage: str = "build",
) -> nn.Module:
    """Make a network with a function of the user's, its weights drawn from `seed`, as `build` does.

    The function is also given what it names among its parameters and `options` do not say: `classes` or `num_classes`,
    `channels` or `in_channels`, and `shape` (channels, height, width).

    Args:
        factory: package.module:function.
        options: arguments of the function.
        classes: outputs that are expected.
        shape: channels, height and width of the images.
        seed: of the weights.
        stage: as for `build`.

    Raises:
        UserError: there is no such function, it fails, or what it returns is no network for these images and classes.
    """
    function = imported(factory, "network.factory")
    with streams.global_generators(seed, "network", stage):
        try:
            network = function(**(_known(function, classes, shape) | dict(options)))
        except UserError:
            raise
        except Exception as error:  # of code that is not ours
            raise UserError(
                f"network.factory: {factory}: {type(error).__name__}: {one_line(error, 200)} (its arguments are in "
                "network.options)"
            ) from error
        if not isinstance(network, nn.Module):
            raise UserError(f"network.factory: {factory}: an nn.Module is expected, not {type(network).__name__}")
        check_fits(network, classes, shape, f"network.factory: {factory}")
    return network


def _known(function: Any, classes: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What the images say, under the names that a function has for it."""
    known: dict[str, Any] = {"classes": classes, "num_classes": classes, "shape": shape}
    known |= {"channels": shape[0], "in_channels": shape[0]}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return {}
    return {p.name: known[p.name] for p in parameters if p.name in known and p.kind is not p.VAR_KEYWORD}


@torch.no_grad()
def check_fits(network: nn.Module, classes: int, shape: tuple[int, int, int], what: str) -> None:
    """Try a network in evaluation mode on two images of zeros. Layers that find their sizes then have them.

    Raises UserError, its message beginning with `what`, where it does not take images of `shape` (channels, height,
    width), or its outputs are not (N, classes).
    """
    modes = {module: module.training for module in network.modules()}
    size = " x ".join(map(str, shape))
    device = next((p.device for p in network.parameters()), None)
    try:
        outputs = network.eval()(torch.zeros(2, *shape, device=device))
    except Exception as error:  # of code that is not ours
        raise UserError(
            f"{what}: fails on images of {size} (channels x height x width): {type(error).__name__}: "
            f"{one_line(error, 200)}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(outputs, Tensor):
        raise UserError(f"{what}: one tensor of outputs (N, classes) is expected, not {type(outputs).__name__}")
    if outputs.dim() != 2 or len(outputs) != 2:
        raise UserError(f"{what}: outputs (N, classes) are expected, not {tuple(outputs.shape)} for 2 images of {size}")
    if outputs.shape[1] != classes:
        raise UserError(
            f"{what}: gives {outputs.shape[1]} classes, and the data has {classes}; network.options has the arguments "
            "of the function"
        )


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a network: safetensors, or a state dict that `torch.save` wrote, without its code.

    A mapping with the state dict under `state_dict`, as some training programs write it, is taken, too, and so are
    files without BatchNorm's counters of batches.

    Raises:
        UserError: the file cannot be read, holds anything else, or does not fit; it names the first key that does not.
    """
    what = f"network.weights: {path}"
    found = _tensors(Path(path).expanduser(), what)
    own = network.state_dict()
    for key, tensor in own.items():
        if key not in found:
            if key.endswith("num_batches_tracked"):
                found[key] = tensor
                continue
            raise UserError(f"{what}: has no {key!r}, which the network has")
        if found[key].shape != tensor.shape:
            raise UserError(f"{what}: {key!r} is {tuple(found[key].shape)}, and the network's is {tuple(tensor.shape)}")
    if odd := [key for key in found if key not in own]:
        raise UserError(f"{what}: has {odd[0]!r}, which the network has not")
    network.load_state_dict(found)


def _tensors(path: Path, what: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{what}: no such file") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{what}: no state dict alone; write it with torch.save(model.state_dict(), ...)") from error
    except (OSError, ValueError, RuntimeError, EOFError, safetensors.SafetensorError) as error:
        raise UserError(f"{what}: cannot be read ({one_line(error, 120)})") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{what}: a state dict, tensors by their names, is expected")
    return dict(found)
