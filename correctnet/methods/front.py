"""Layers in digital hardware: the first ones hold few weights, and an error there passes through all others.

    analog = convert(network, variation, exclude=front_layers(network, images, 1))

The rest of the network keeps its chips: a layer has the same address whatever is digital.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from correctnet.crossbar.kinds import crossbars
from correctnet.datasets.batches import Batches
from correctnet.errors import UserError, whole
from correctnet.methods.candidates import executed
from correctnet.metrics import Metric, checked
from correctnet.networks.blocks import original_parameters


def front_layers(network: nn.Module, data: Batches, count: int, metric: Metric | None = None) -> tuple[str, ...]:
    """Names of the first `count` layers that a network runs, as `exclude` of `correctnet.convert` takes them.

    Args:
        network: converted or not, compensated or not.
        data: images and labels, as in `correctnet.evaluate`; two images are run, to observe the order.
        count: number of layers, less than the network has.
        metric: a `correctnet.Metric`, which says what labels are; None: the accuracy.

    Raises:
        UserError: a count out of range, or a layer that the network does not use.
    """
    count, layers = whole(count, "front_layers: count"), len(crossbars(network))
    if not 0 <= count < layers:
        raise UserError(
            f"front_layers: of {layers} layers 0 to {layers - 1} can be digital, so that one at least is analog, not "
            f"{count}"
        )
    return tuple(executed(network, data, checked(metric, "front_layers").targets)[:count]) if count else ()


def digital_share(network: nn.Module, layers: Iterable[str] | str) -> float:
    """Overhead of digital layers: their weights / parameters of the original network.

    Biases are digital in any case, and no overhead; they count among the parameters, as in `correctnet.overhead`.

    Args:
        network: converted or not, compensated or not; compensation is no part of the original network.
        layers: names of layers, of modules that contain layers, or of single weights of modules with several.

    Raises:
        UserError: a name that holds no layer.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    found = crossbars(network)
    known = {each.name: (each.name, f"{each.name}.{each.parameter}") for each in found}
    for name in names:
        if not any(_holds(name, own) for places in known.values() for own in places):
            raise UserError(f"digital layers: the network has no layer {name!r} (layers: {', '.join(known)})")
    chosen = [each for each in found if any(_holds(name, own) for name in names for own in known[each.name])]
    original = original_parameters(network)
    return sum(each.weight.numel() for each in chosen) / original


def _holds(name: str, layer: str) -> bool:
    return not name or layer == name or layer.startswith(f"{name}.")
