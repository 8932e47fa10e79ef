"""Protection of single weights of a converted network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from correctnet.crossbar.convert import chip_of
from correctnet.crossbar.layers import AnalogLayer, OnCrossbar, analog_layers, analog_names
from correctnet.devices.protected import Protected
from correctnet.errors import UserError


def protect(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Make some weights of a converted network exact on every chip, in evaluation and in training.

    All other weights keep their values on each chip. A further call replaces the masks of the one before; without masks
    nothing is protected.

    Args:
        model: from `correctnet.convert`.
        masks: by name of the layer, or of the weight in modules with several, a bool tensor in the shape of the weight,
            True where a weight is protected.

    Raises:
        UserError: a model that was not converted, a name of no analog weight, or a mask that is not bool or of another
            shape than the weight.
    """
    chip_of(model)
    found, names = analog_layers(model), analog_names(model)
    layers: dict[str, OnCrossbar] = {names[id(own)]: own for own in found}
    layers |= {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, AnalogLayer)}
    by_index = {}
    for name, mask in masks.items():
        if name not in layers:
            raise UserError(f"protect: the model has no analog layer {name!r}; it has {', '.join(layers)}")
        by_index[layers[name].layer_index] = mask
    bare = [layer.variation.device if isinstance(layer.variation, Protected) else layer.variation for layer in found]
    made = {id(device): Protected(device, by_index) if by_index else device for device in bare}
    for layer, device in zip(found, bare, strict=True):
        if by_index:
            made[id(device)].mask(layer.nominal, layer.layer_index)  # refuses another shape
    for layer, device in zip(found, bare, strict=True):
        layer.variation = made[id(device)]
