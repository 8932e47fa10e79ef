"""A chip as a plain network, without analog layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from correctnet.crossbar.convert import check_forwards, chip_of, copy_model, programmed
from correctnet.crossbar.layers import ANALOG, AnalogLayer, analog_layers
from correctnet.errors import UserError

_PLAIN = {analog: plain for plain, analog in ANALOG.items()}
_REMOVE = {prune.BasePruningMethod: prune.remove, WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}
_OWN = ("variation", "layer_index", "chip", "_copied_from")


@torch.no_grad()
def chip(analog: nn.Module, sample: int | None) -> nn.Module:
    """Chip `sample` as a plain network: a copy whose conv and linear layers hold the weights of that chip.

    The copy has no analog layers and draws nothing, so it can be exported (`torch.export`, ONNX), saved,
    loaded and measured like any other network. On the same batch it computes what `analog` computes on the chip.

    Args:
        analog: from `correctnet.convert`. It is left unchanged.
        sample: number of the chip in [0, 2^32); None: the nominal weights.

    Returns:
        The copy, with the modes of `analog`. Weights that pruning or `weight_norm` derives from other parameters become
        parameters, as those of the chip are fixed.

    Raises:
        UserError: a model that was not converted, or whose copy would still run code of the original; more chips than
            one, or a number outside the range.
    """
    chip_of(analog)
    if isinstance(sample, list | tuple | range):
        raise UserError(f"chip: one chip is expected, not {len(sample)}")
    plain = copy_model(analog, "chip")
    check_forwards(analog, plain, "chip")
    layers = analog_layers(plain)
    for layer in layers:
        for hook in _derivations(layer):
            hook(layer, ())
    with programmed(plain, sample):
        weights = [layer.chip_weight().detach().clone() for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        trained = any(p.requires_grad for n, p in layer._parameters.items() if n.startswith("weight"))
        derivations = _derivations(layer)
        layer.__class__ = _PLAIN[type(layer)]
        for name in _OWN:
            layer.__dict__.pop(name, None)
        for hook in derivations:
            _REMOVE[next(kind for kind in _REMOVE if isinstance(hook, kind))](layer, "weight")
        layer.weight = nn.Parameter(weight, requires_grad=trained)
    return plain


def _derivations(layer: AnalogLayer) -> list[Any]:
    """The hooks that derive the layer's weight from other parameters before each forward pass."""
    if layer._parameters.get("weight") is not None:
        return []
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, tuple(_REMOVE))]
