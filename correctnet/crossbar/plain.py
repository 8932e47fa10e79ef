"""A chip as a plain network, without analog layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from correctnet.crossbar.convert import check_forwards, chip_of, copy_model, programmed
from correctnet.crossbar.layers import AnalogModule, analog_layers
from correctnet.crossbar.modules import make_plain
from correctnet.errors import UserError

_REMOVE = {prune.BasePruningMethod: prune.remove, WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}


@torch.no_grad()
def chip(analog: nn.Module, sample: int | None) -> nn.Module:
    """Chip `sample` as a plain network: a copy whose layers hold the weights of that chip.

    The copy has no analog layers and draws nothing, so it can be exported (`torch.export`, ONNX), saved,
    loaded and measured like any other network. On the same batch it computes what `analog` computes on the chip.

    Args:
        analog: from `correctnet.convert`. It is left unchanged.
        sample: number of the chip in [0, 2^32); None: the nominal weights.

    Returns:
        The copy, with the modes of `analog`. Weights that pruning or a parametrization derives from other parameters
        become parameters, as those of the chip are fixed.

    Raises:
        UserError: a model that was not converted, or whose copy would still run code of the original; more chips than
            one, or a number outside the range; converters, which no plain layer has.
    """
    chip_of(analog)
    if isinstance(sample, list | tuple | range):
        raise UserError(f"chip: one chip is expected, not {len(sample)}")
    if sample is not None and any(own.periphery is not None for own in analog_layers(analog)):
        raise UserError("chip: a plain network has no converters; take them off first: add_converters(analog, None)")
    plain = copy_model(analog, "chip")
    check_forwards(analog, plain, "chip")
    modules = [module for module in plain.modules() if isinstance(module, AnalogModule)]
    for module in modules:
        for hook in _derivations(module):
            hook(module, ())
    with programmed(plain, sample):
        weights = [(m, own.parameter, own.chip_weight().detach().clone()) for m in modules for own in m.crossbars()]
    for module in modules:
        make_plain(module)
    for module, name, weight in weights:
        _fix(module, name, weight)
    return plain


def _derivations(module: nn.Module) -> list[Any]:
    """The hooks that derive weights from other parameters before each forward pass."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, tuple(_REMOVE))]


def _fix(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give a plain module a weight as a parameter of its own, in the place of one or of what derives one."""
    trained = any(p.requires_grad for n, p in module._parameters.items() if n.startswith(name) and p is not None)
    derived = getattr(module, "parametrizations", {})
    if name in derived:
        trained = any(p.requires_grad for p in derived[name].parameters())
        _drop_parametrizations(module, name)
    for hook in _derivations(module):
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            _REMOVE[next(kind for kind in _REMOVE if isinstance(hook, kind))](module, name)
    setattr(module, name, nn.Parameter(weight, requires_grad=trained))


def _drop_parametrizations(module: nn.Module, name: str) -> None:
    """Remove a parametrization, whose class the original module still has."""
    kind, derived = type(module), module.parametrizations
    others = {own: getattr(module, own) for own in derived if own != name}
    module.__class__ = kind.__mro__[1]
    del module.parametrizations
    for own, value in others.items():  # are fixed as well
        kept = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        module.register_parameter(own, kept)
    module.register_parameter(name, None)
