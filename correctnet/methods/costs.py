"""What digital hardware multiplies: layers that are digital, protected weights, compensation and paths.

A layer's weights are few or many, and each is used once for every position of its output. The overhead in weights says
nothing of that: the first convolution of LeNet-5 holds 0.3 % of the weights and 15 % of the multiplications.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.probe import left_alone, run
from correctnet.datasets.inputs import Inputs
from correctnet.errors import UserError
from correctnet.methods.compensation import compensation_modules
from correctnet.methods.sidepaths import side_paths


def multiplications(network: nn.Module, images: Tensor | Inputs) -> dict[str, int]:
    """Multiplications of each layer for one input: its weights times the positions to which they are applied.

    Args:
        network: converted or not, compensated or not.
        images: (N, ...), a few inputs that are run.

    Returns:
        By name, of all convolutions, linear and bilinear layers that the network calls, those of compensation too. A
        layer that is called several times counts all of its calls.

    Raises:
        UserError: weights on crossbars in modules of other kinds, such as attention or recurrent layers.
    """
    for each in crossbars(network):
        if not isinstance(each.module, nn.Linear | nn.Bilinear | _ConvNd) or each.parameter != "weight":
            raise UserError(
                f"multiplications: those of {each.name} ({type(each.module).__name__}) are not counted, only those of "
                "convolutions, linear and bilinear layers"
            )
    counts: dict[str, int] = {}

    def count(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        positions = inputs[0] if isinstance(module, _ConvTransposeNd) else output
        # Of each element of the output, or of a transposed convolution's input, the weights that are applied to it.
        own = positions.numel() * module.get_parameter("weight")[0].numel()
        counts[name] = counts.get(name, 0) + own // len(images)

    found = {m: name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Bilinear | _ConvNd)}
    hooks = [
        m.register_forward_hook(lambda module, x, y, name=name: count(name, module, x, y)) for m, name in found.items()
    ]
    try:
        with torch.no_grad(), left_alone(network):
            run(network, images, "multiplications")
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def digital_multiplications(
    network: nn.Module,
    images: Tensor | Inputs,
    layers: Iterable[str] | str = (),
    masks: Mapping[str, Tensor] | None = None,
) -> float:
    """Multiplications in digital hardware / multiplications of the original network, for one input.

    Args:
        network: converted or not; its compensation is digital.
        images: as for `multiplications`.
        layers: names of layers that are digital, as `correctnet.convert` takes them for `exclude`.
        masks: by name of the layer, its protected weights, as for `correctnet.protect`; each counts as often as it is
            used.

    Raises:
        UserError: as `multiplications`, or a mask of a layer that the network does not call.
    """
    counts, names = multiplications(network, images), (layers,) if isinstance(layers, str) else tuple(layers)
    added = [f"{name}.{part}" for name in compensation_modules(network) for part in ("generator", "compensator")]
    added = [name.removeprefix(".") for name in added]
    digital = float(sum(counts.get(name, 0) for name in added))
    for name, beside in side_paths(network).items():
        inside = f"{name}.path.".lstrip(".")
        digital += beside.path.density * sum(n for own, n in counts.items() if own.startswith(inside))
    analog = {each.name for each in crossbars(network)}
    for name in analog & set(counts):
        if any(not own or name == own or name.startswith(f"{own}.") for own in names):
            digital += counts[name]
        elif masks and name in masks:
            digital += counts[name] * float(masks[name].double().mean())
    if unknown := [name for name in masks or {} if name not in counts]:
        raise UserError(f"digital_multiplications: the network calls no layer {unknown[0]!r}")
    return digital / sum(counts[name] for name in analog & set(counts))
