"""Conversion of a network to analog layers, and the programming of chips.

analog = convert(network, LogNormalVariation(0.5), seed=0)
program(analog, 137)      # chip sample 137
logits = analog(images)
program(analog, None)     # the nominal weights again
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from correctnet.crossbar.chips import Chip
from correctnet.crossbar.kinds import (
    FIRST,
    Crossbar,
    check_parameter,
    crossbars,
    declare,
    declared,
    kind_of,
    plain_type,
)
from correctnet.crossbar.layers import AnalogLayer, AnalogModule, CoverageWarning, analog_layers
from correctnet.crossbar.modules import make_analog
from correctnet.devices.base import Variation
from correctnet.errors import UserError, one_line, whole

# The parameters of these are vectors or tables, which no crossbar multiplies with; they stay digital without a warning.
DIGITAL = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.PReLU)


def carries_variation(model: nn.Module) -> bool:
    """Return whether a network is converted: has analog modules."""
    return any(isinstance(module, AnalogModule) for module in model.modules())


def check_plain(model: nn.Module, what: str, name: str = "network") -> None:
    """Raise a UserError, which begins with `what`, if a network is converted."""
    if carries_variation(model):
        raise UserError(f"{what}: the {name} carries variation; give the one that was converted")


def convert(
    model: nn.Module,
    variation: Variation,
    seed: int = 0,
    exclude: Iterable[str] | str = (),
    analog: Iterable[str] | str = (),
) -> nn.Module:
    """Copy `model` with its weights on crossbars. Its outputs do not change until a chip is programmed.

    Args:
        model: any module. The weights of linear layers, of convolutions (also transposed ones) in one to three
            dimensions, of `nn.Bilinear`, `nn.MultiheadAttention`, `nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells become
            analog, those of subclasses and with parametrizations as well; biases, normalisation and embeddings stay
            digital.
        variation: the device model.
        seed: seed of the simulation; with the sample number it addresses a chip.
        exclude: names of layers, of modules that contain layers, or of single weights of modules with several, that
            stay digital, and of parameters to leave out of the `CoverageWarning`; a string is one name.
        analog: names of further parameters, matrices (out, ...), that are on a crossbar, each on one of its own,
            such as "head.weight" of a module of your own. A module whose attribute `analog_parameters` lists names of
            its parameters says the same, to every function of this package.

    Warns:
        CoverageWarning: lists the matrices that will not carry variation.

    Raises:
        UserError: not a module or device model, nothing to convert, an unknown excluded name, an analog name that is no
            matrix of the model, a model that is already converted, modules with attributes named like those of analog
            ones, or a model whose copy would still run code of the original.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"convert: a torch.nn.Module is expected, not a {type(model).__name__}")
    if isinstance(variation, type) or not callable(getattr(variation, "sample", None)):
        raise UserError(f"convert: a device model such as LogNormalVariation(0.5) is expected, not {variation!r}")
    if carries_variation(model):
        raise UserError("convert: the model carries variation already; convert the original one")
    _check_convertible(model)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    named = (analog,) if isinstance(analog, str) else tuple(analog)
    for name in (*named, *declared(model)):
        if problem := check_parameter(model, name):
            raise UserError(f"convert: analog: {problem}")
    # A layer in several places has several names; each of them excludes it.
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    known = {
        *(name for names in aliases.values() for name in names),
        *(name for name, _ in model.named_parameters(remove_duplicate=False)),
    }
    for name in exclude:
        if name not in known:
            raise UserError(f"convert: exclude: the model has no module {name!r}, nor such a parameter")
    seed = whole(seed, "convert: the seed")
    if not 0 <= seed < 2**64:
        raise UserError(f"convert: seed must lie in [0, 2^64), not {seed}")
    copied, chip = copy_model(model), Chip(seed)
    check_forwards(model, copied)
    declare(copied, named)
    originals = dict(model.named_modules())
    names = {id(module): name for name, module in copied.named_modules()}
    kept: dict[str, list[Crossbar]] = {}
    for crossbar in crossbars(copied):
        module = names[id(crossbar.module)]
        own = () if crossbar.name == module else (crossbar.parameter,)  # several weights can be excluded one by one
        places = [".".join(filter(None, (alias, *own))) for alias in aliases[id(originals[module])]]
        if not any(_within(place, exclude) for place in places):
            kept.setdefault(module, []).append(crossbar)
    if not kept:
        raise UserError(f"convert: the model has no layer left to convert{_instead(model)}")
    for name, found in kept.items():
        if clash := make_analog(found[0].module, found, variation, chip, originals[name]):
            raise UserError(
                f"convert: {name or 'the layer'} has an attribute {clash!r}, as analog layers do; rename it"
            )
    _warn_uncovered(copied, exclude)
    return copied


def _within(name: str, parents: Iterable[str]) -> bool:
    return any(not p or name == p or name.startswith(f"{p}.") for p in parents)


def _check_convertible(model: nn.Module) -> None:
    """Raise UserError for a model that cannot be copied layer by layer."""
    for name, module in model.named_modules():
        where = f"its module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"convert: {where} is compiled by TorchScript, which fixes its layers")
        if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in module._parameters.values()):
            raise UserError(f"convert: {where} is lazy and has no weights yet; run a batch through the model first")
        if any(p is not None and p.is_meta for p in module._parameters.values()):
            raise UserError(f"convert: {where} is on the device meta and has no weights yet; load them first")


def _instead(model: nn.Module) -> str:
    """List a model's kinds of layers with weights, for an error message."""
    kinds = {
        f"{type(m).__module__}.{type(m).__qualname__}"
        for m in model.modules()
        if kind_of(m) is None and (next(m.parameters(recurse=False), None) is not None or "quantized" in str(type(m)))
    }
    return f" (it holds {', '.join(sorted(kinds)[:4])}, which cannot carry variation)" if kinds else ""


def copy_model(model: nn.Module, what: str = "convert") -> nn.Module:
    """Copy a model deeply; weights that pruning or weight normalisation derived from parameters are copied by value.

    Raises UserError, which begins with `what`, for a model that cannot be copied.
    """
    derived = {
        id(value): value.detach().clone()
        for module in model.modules()
        for held in vars(module).values()
        for value in (held if isinstance(held, list) else [held])  # recurrent layers list their weights
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model, derived)
    except Exception as error:  # attributes of the model may raise anything
        raise UserError(f"{what}: the model cannot be copied ({one_line(error, 200)})") from error


def check_forwards(model: nn.Module, copied: nn.Module, what: str = "convert") -> None:
    """Raise UserError, beginning with `what`, for a copy with a patched `forward` that runs the original's layers."""
    originals = {id(module): name for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        patched = vars(module).get("forward")
        if patched is not None and any(id(held) in originals for held in _held(patched)):
            where = f"of {name!r} " if name else ""
            raise UserError(
                f"{what}: the forward {where}was replaced by a function that runs the original's layers, so that the "
                "copy's would carry no variation; remove it (del model.forward), or make it a method of a class"
            )


def _held(function: Any) -> Iterator[nn.Module]:
    """Yield the modules that a callable holds: bound, in its closure or defaults, as globals, or in what it wraps."""
    waiting, seen = [function], set()
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, nn.Module):
            yield held
        elif isinstance(held, types.MethodType):
            waiting += [held.__self__, held.__func__]
        elif isinstance(held, partial):
            waiting += [held.func, *held.args, *held.keywords.values()]
        elif isinstance(held, types.FunctionType):
            for cell in held.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    waiting.append(cell.cell_contents)
            waiting += [*(held.__defaults__ or ()), getattr(held, "__wrapped__", None)]
            if not (held.__module__ or "").startswith("torch"):  # torch's globals hold no user's network
                waiting += [held.__globals__.get(name) for name in held.__code__.co_names]


def _warn_uncovered(analog: nn.Module, exclude: tuple[str, ...]) -> None:
    modules = [m for m in analog.modules() if isinstance(m, AnalogModule)]
    covered = {id(p) for m in modules if plain_type(m) in FIRST for p in m.parameters()}
    covered |= {id(m._parameters.get(own.parameter)) for m in modules for own in m.crossbars()}
    for prefix, module in analog.named_modules():
        digital = getattr(module, "digital_children", ())
        covered |= {id(p) for name in digital for p in module.get_submodule(name).parameters()}
        if isinstance(module, AnalogModule):  # the originals of derived weights
            derived = getattr(module, "parametrizations", {})
            names = [own.parameter for own in module.crossbars()]
            covered |= {id(p) for name in names if name in derived for p in derived[name].parameters()}
            covered |= {id(p) for n, p in module._parameters.items() for name in names if n.startswith(f"{name}_")}
        if isinstance(module, DIGITAL) or _within(prefix, exclude):
            covered |= {id(p) for p in module.parameters()}
    left = [
        name
        for name, p in analog.named_parameters()
        if p.dim() > 1 and id(p) not in covered and not _within(name, exclude)
    ]
    if left:
        warnings.warn(
            f"no variation on {', '.join(left)}: no layer of a known kind multiplies with them; name those that are on "
            "crossbars in `analog`, and those that are digital, or their modules, in `exclude`",
            CoverageWarning,
            stacklevel=3,
        )
    # An embedding that shares a weight reads it as a table; any other module may multiply with it.
    held = {(id(m), own.parameter) for m in modules for own in m.crossbars()}
    weights = {id(m._parameters.get(own.parameter)) for m in modules for own in m.crossbars()}
    again = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in analog.named_modules()
        if not isinstance(module, (AnalogLayer, *DIGITAL)) and not _within(prefix, exclude)
        for name, p in module._parameters.items()
        if p is not None
        and id(p) in weights
        and (id(module), name) not in held
        and not _within(f"{prefix}.{name}".lstrip("."), exclude)
    ]
    if again:
        warnings.warn(
            f"no variation on {', '.join(again)}, the weight of an analog layer under another name: read it from the "
            "layer itself; name it, or its module, in `exclude` if it is digital",
            CoverageWarning,
            stacklevel=3,
        )


def chip_of(model: nn.Module) -> Chip:
    """Return the chip of a converted model. Raises UserError for a model that was not converted, or in parts."""
    layers = analog_layers(model)
    if not layers:
        if any(type(module).__module__ == AnalogModule.__module__ for module in model.modules()):
            raise UserError(
                "correctnet.crossbar.layers was reloaded after the model was converted; restart Python, and convert"
            )
        raise UserError("the model carries no variation: pass it through convert() first")
    if any(layer.chip is not layers[0].chip for layer in layers):
        raise UserError("parts of the model were converted on their own, each with a chip; convert the whole model")
    return layers[0].chip


def program(
    model: nn.Module, sample: int | Sequence[int] | None, first_layer: int = 0, seed: int | None = None
) -> None:
    """Program a chip, or several, into a converted model; None programs the nominal weights.

    With several chips, each batch (N, ...) is divided evenly among them, in order: the first N / S inputs see the first
    of S chips. A forward pass then gives the outputs of S chips, and a backward pass the gradients of their sum, as in
    variation-aware training with several chips a batch. Analog layers compute all chips at once by `noisy_linear` and
    `noisy_conv2d`; layers to which those do not apply (other device models, autocast, padding other than zeros) compute
    chip by chip. The batch must remain the first dimension, in order; BatchNorm in training mode sees all chips.

    Args:
        model: from `convert`.
        sample: number of the chip in [0, 2^32), numbers of S chips, or None.
        first_layer: layers of a smaller index keep their nominal weights (the sweep of Fig. 9).
        seed: replaces the seed given to `convert` from now on.

    Raises:
        UserError: an argument is outside its range, or another thread is evaluating the model.
    """
    chip = chip_of(model)
    sample, first_layer = _checked_address(sample, first_layer)
    if seed is not None and not 0 <= whole(seed, "program: the seed") < 2**64:
        raise UserError(f"program: the seed lies in [0, 2^64), not {seed}")
    if not chip.lock.acquire(blocking=False):
        raise UserError("program: another thread is evaluating this model; give each thread a copy of its own")
    try:
        chip.sample, chip.first_layer = sample, first_layer
        if seed is not None:
            chip.seed = seed
    finally:
        chip.lock.release()


def _checked_address(sample: int | Sequence[int] | None, first_layer: int) -> tuple[int | tuple[int, ...] | None, int]:
    samples = sample if isinstance(sample, (list, tuple, range)) else () if sample is None else (sample,)
    for each in samples:
        if not 0 <= whole(each, "program: a sample") < 2**32:
            raise UserError(f"program: a sample lies in [0, 2^32), not {each}")
    if whole(first_layer, "program: first_layer") < 0:
        raise UserError(f"program: first_layer must be at least 0, not {first_layer}")
    if isinstance(sample, (list, tuple, range)):
        if not samples:
            raise UserError("program: at least one sample is needed; None programs the nominal weights")
        return tuple(int(each) for each in samples), first_layer
    return sample, first_layer


@contextmanager
def programmed(model: nn.Module, sample: int | Sequence[int] | None, first_layer: int = 0) -> Iterator[nn.Module]:
    """Program a model for the length of a block, as `program` does, and restore the previous chip after it.

    Other threads that enter such a block with the same model wait.
    """
    chip = chip_of(model)
    sample, first_layer = _checked_address(sample, first_layer)
    with chip.lock:
        before = chip.sample, chip.first_layer
        chip.sample, chip.first_layer = sample, first_layer
        try:
            yield model
        finally:
            chip.sample, chip.first_layer = before


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """Draw each layer's weights once a chip instead of once a forward pass, for the length of a block.

    For loops over many batches in which the nominal weights do not change.
    """
    chip = chip_of(model)
    before, chip.drawn = chip.drawn, {}
    try:
        yield
    finally:
        chip.drawn = before
