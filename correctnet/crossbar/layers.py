"""Layers that carry variation, and the conversion of any network to them.

analog = convert(network, LogNormalVariation(0.5), seed=0)
program(analog, 137)      # chip sample 137
logits = analog(images)
program(analog, None)     # the nominal weights again

A layer becomes analog in place: its class changes, the object stays, so whatever holds it (an attribute, a list, a
dict) holds the analog layer. Its `weight` is what the present chip carries, whoever reads it; the trained, nominal
weights are `nominal`, and what `parameters()` and `state_dict()` give.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.devices.lognormal import Variation
from correctnet.errors import UserError, one_line, whole
from correctnet.reloading import survives_reload

# Parameters of these are vectors or tables that no crossbar multiplies with; they stay digital without a warning.
DIGITAL = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.PReLU)


@survives_reload
class CoverageWarning(UserWarning):
    """Some parameters of the network cannot carry variation, or carry it without an effect."""


class Watcher(Protocol):
    """What is told of every weight that a layer draws (`correctnet.evaluation.coverage.Probe`)."""

    def drawing(self, layer: AnalogLayer, draw: Callable[[], Tensor]) -> Tensor:
        """The weights that `draw` gives."""


@survives_reload
@dataclass
class Chip:
    """Which chip sample the layers of one converted network carry; shared by all of them.

    Attributes:
        seed: of the simulation.
        sample: number of the chip; None: nominal weights.
        first_layer: layers of a smaller index stay nominal.
        drawn: weights of the present chip by layer index, kept between forward passes; None: drawn for each. Only
            `keeping` sets it, for a time in which nobody changes the nominal weights.
        watcher: told of every weight that is drawn, or None.
        running: whether this package runs the network: its code then reads plain tensors.
        lock: held while the network is programmed for a block of code, so that two threads take turns.
    """

    seed: int
    sample: int | None = None
    first_layer: int = 0
    drawn: dict[int, tuple[object, Tensor]] | None = None
    watcher: Watcher | None = None
    running: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy stands for the same chip; locks, kept weights and watchers belong to the original.
        return Chip, (self.seed, self.sample, self.first_layer)


@survives_reload
class ChipWeight(Tensor):
    """The weights of a layer on a chip, for whoever asks the layer for its `weight`.

    Reads give what the chip carries. Changes in place (`mul_`, `[...] =`, `.data = `, also through `.data`, `detach()`
    and views) go to the nominal weights, which the chip's follow from: a chip's own weights are drawn anew each time.
    """

    _nominal: Tensor

    @classmethod
    def of(cls, drawn: Tensor, nominal: Tensor) -> ChipWeight:
        """The weights `drawn` of a chip, whose nominal ones are `nominal`."""
        weight = drawn.as_subclass(cls)
        weight._nominal = nominal
        return weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        # In a pickle it is a plain tensor, as `torch.load` takes by itself.
        return self.as_subclass(Tensor).detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], ChipWeight) else None
        change = _changes(func)
        with torch._C.DisableTorchFunctionSubclass():
            if change and not args:  # torch.nn.init's, which name their argument
                return func(**{k: v._nominal if isinstance(v, ChipWeight) else v for k, v in kwargs.items()})
            if "out" in kwargs and isinstance(kwargs["out"], ChipWeight):
                return func(*args, **{**kwargs, "out": kwargs["out"]._nominal})
            if target is None:
                if change and isinstance(args[0], list | tuple):  # torch._foreach_mul_ and its like
                    changed = [v._nominal if isinstance(v, ChipWeight) else v for v in args[0]]
                    return func(changed, *args[1:], **kwargs)
                return func(*args, **kwargs)
            if change or _of_parameter(func):
                return func(target._nominal, *args[1:], **kwargs)
            result = func(*args, **kwargs)
            if not _view(result, target):
                return result
            nominal = func(target._nominal, *args[1:], **kwargs)
            if isinstance(result, Tensor):
                return cls.of(result, nominal)
            return type(result)(cls.of(*pair) for pair in zip(result, nominal, strict=True))


_OPERATORS = ["add", "sub", "mul", "matmul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]
_CHANGING = {f"__i{name}__" for name in (*_OPERATORS, "lshift", "rshift")} | {"__setitem__", "__set__"}


def _changes(func: Any) -> bool:
    """Whether a function of torch changes its first argument in place."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _CHANGING


def _of_parameter(func: Any) -> bool:
    """Whether a function reads what belongs to the parameter: its gradient, and whether it wants one."""
    if getattr(func, "__name__", "") != "__get__":
        return False
    return getattr(func.__self__, "__name__", "") in ("grad", "is_leaf", "requires_grad")


def _view(result: Any, tensor: Tensor) -> bool:
    """Whether the result of an operation shares memory with a tensor."""
    first = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(first, Tensor) or first.layout != torch.strided:
        return False
    return first.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@survives_reload
class AnalogLayer(nn.Module):
    """What analog layers share: the layer's address and its weights on the present chip."""

    variation: Variation
    layer_index: int
    chip: Chip
    # Weak references to the layers that this one is a copy of, and to their weights: code that still runs them has
    # escaped the variation (`correctnet.evaluation.coverage`).
    _copied_from: tuple[weakref.ref[Any], ...] = ()

    @property
    def varies(self) -> bool:
        """Whether the layer carries variation now."""
        return self.chip.sample is not None and self.layer_index >= self.chip.first_layer

    @property
    def nominal(self) -> Tensor:
        """The trained weights: the parameter `weight`, or what pruning or weight normalisation makes of others."""
        found = self._parameters.get("weight")
        if found is None and "weight" not in self.__dict__:
            raise UserError("a converted layer has lost its weight, as to a parametrization; parametrize, then convert")
        return self.__dict__["weight"] if found is None else found

    @property
    def weight(self) -> Tensor:
        """The weights on the present chip, in the shape of `nominal`; nominal where no chip is programmed.

        What changes them in place changes the nominal ones, see `ChipWeight`.
        """
        try:
            if not self.varies or self.chip.running or torch.compiler.is_compiling():
                return self.chip_weight()
            return ChipWeight.of(self.chip_weight(), self.nominal)
        except AttributeError as error:  # nn.Module would take it for an absent attribute, and give the parameter
            raise RuntimeError(f"the chip's weights cannot be drawn ({one_line(error)})") from error

    @weight.setter
    def weight(self, value: Any) -> None:
        # Parameters never come here (nn.Module registers them); derived weights do, from the hooks that make them.
        self.__dict__["weight"] = value

    def chip_weight(self) -> Tensor:
        """See `weight`."""
        if not self.varies:
            if self._parameters.get("weight") is None:
                return self.nominal
            # By nn.Module's own way, so that torch.fx sees the parameter being read.
            return nn.Module.__getattr__(self, "weight")
        if self.chip.watcher is not None:
            return self.chip.watcher.drawing(self, self._draw)
        return self._draw()

    def _draw(self) -> Tensor:
        if torch.jit.is_tracing():  # which does not see the core fill the weights, and would record arbitrary memory
            raise UserError("torch.jit.trace cannot record a chip's weights; program(model, None) before it")
        nominal = self.nominal
        if nominal.requires_grad and torch.is_grad_enabled():
            return self.variation.sample(nominal, self.chip.seed, self.layer_index, self.chip.sample)
        kept = self.chip.drawn
        if kept is None or nominal.is_inference():  # whose versions are not counted
            with torch.no_grad():
                return self.variation.sample(nominal, self.chip.seed, self.layer_index, self.chip.sample)
        key = (self.chip.seed, self.chip.sample, self.variation, nominal._version, nominal.data_ptr())
        if self.layer_index not in kept or kept[self.layer_index][0] != key:
            with torch.no_grad():
                drawn = self.variation.sample(nominal, self.chip.seed, self.layer_index, self.chip.sample)
            kept[self.layer_index] = key, drawn
        return kept[self.layer_index][1]

    def _become(self, variation: Variation, index: int, chip: Chip, original: nn.Module) -> None:
        """Turn the layer (a plain one, a copy of `original`) into an analog one."""
        self.__class__ = ANALOG[type(self)]
        self.variation, self.layer_index, self.chip = variation, index, chip
        self._copied_from = _traces(original)

    def __deepcopy__(self, memo: dict[int, Any]) -> AnalogLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "_copied_from"}, memo))
        twin.__dict__["_copied_from"] = (*self._copied_from, *_traces(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_copied_from"}


def _traces(layer: nn.Module) -> tuple[weakref.ref[Any], ...]:
    """Weak references to a layer and its weight."""
    weight = layer._parameters.get("weight")
    return (weakref.ref(layer),) if weight is None else (weakref.ref(layer), weakref.ref(weight))


@survives_reload
class AnalogLinear(AnalogLayer, nn.Linear):
    """y = x W^T + b with W on the present chip and b digital. x (..., in), W (out, in), y (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.linear(x, self.chip_weight(), self.bias)


@survives_reload
class AnalogConv2d(AnalogLayer, nn.Conv2d):
    """y = x * W + b with W on the present chip and b digital. x (N, in, H, W), W (out, in / groups, kh, kw)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self._conv_forward(x, self.chip_weight(), self.bias)


ANALOG: dict[type[nn.Module], type[AnalogLayer]] = {nn.Linear: AnalogLinear, nn.Conv2d: AnalogConv2d}


def crossbar_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every conv and linear layer of the original network, in order of registration.

    The position in this order is the layer index of the noise, for excluded layers too. Layers that were added in
    digital hardware (generators, compensators) are no part of the original network and are passed over.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        # Exact types only: a subclass may use its weight in its own way, or leave that to its parent.
        if type(module) in ANALOG or isinstance(module, AnalogLayer):
            yield prefix, module
            return
        digital = getattr(module, "digital_children", ())
        for name, child in module.named_children():
            if name not in digital:
                yield from walk(child, f"{prefix}.{name}" if prefix else name)

    seen: set[int] = set()
    for name, module in walk(model, ""):
        if id(module) not in seen:  # a layer used twice is one layer on one crossbar
            seen.add(id(module))
            yield name, module


def convert(model: nn.Module, variation: Variation, seed: int = 0, exclude: Iterable[str] | str = ()) -> nn.Module:
    """Copy `model` with conv and linear layers that carry variation; until a chip is programmed its output is equal.

    Args:
        model: any module. `nn.Conv2d` and `nn.Linear` (not subclasses of them) become analog; biases, normalisation
            and embeddings stay digital.
        variation: the device model.
        seed: of the simulation; with the sample number it addresses a chip.
        exclude: names of layers, or of modules that hold layers, that stay digital; also names of parameters of which
            no `CoverageWarning` is wanted; a string is one name.

    Warns:
        CoverageWarning: names the matrices that will not carry variation, e.g. attention's in_proj or an LSTM's.

    Raises:
        UserError: no module or device model, nothing to convert, an excluded name that does not exist, a model that
            is converted already, one whose layers have attributes of an analog layer's names, or one whose copy would
            still run code of the original.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"convert: a torch.nn.Module is expected, not a {type(model).__name__}")
    if isinstance(variation, type) or not callable(getattr(variation, "sample", None)):
        raise UserError(f"convert: a device model such as LogNormalVariation(0.5) is expected, not {variation!r}")
    if any(isinstance(module, AnalogLayer) for module in model.modules()):
        raise UserError("convert: the model carries variation already; convert the original one")
    _check_convertible(model)
    layers = dict(crossbar_layers(model))
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
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
    kept = {
        name: i
        for i, (name, layer) in enumerate(layers.items())
        if not any(_within(alias, exclude) for alias in aliases[id(layer)])
    }
    if not kept:
        raise UserError(f"convert: the model has no nn.Conv2d or nn.Linear layer left to convert{_instead(model)}")

    for name in kept:
        layer = layers[name]
        if clash := sorted(_OWN & {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}):
            raise UserError(
                f"convert: {name or 'the layer'} has an attribute {clash[0]!r}, as analog layers do; rename it"
            )
    analog, chip = _copy(model), Chip(seed)
    _check_forwards(model, analog)
    for name, index in kept.items():
        AnalogLayer._become(analog.get_submodule(name), variation, index, chip, layers[name])
    _warn_uncovered(analog, exclude)
    return analog


# Attributes of analog layers, which would hide those of the user's layer.
_OWN = {"variation", "layer_index", "chip", "varies", "nominal", "chip_weight"}


def _within(name: str, parents: Iterable[str]) -> bool:
    return any(not p or name == p or name.startswith(f"{p}.") for p in parents)


def _check_convertible(model: nn.Module) -> None:
    """Refuse what cannot be copied layer by layer."""
    for name, module in model.named_modules():
        where = f"its module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"convert: {where} is compiled by TorchScript, which fixes its layers")
        if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in module._parameters.values()):
            raise UserError(f"convert: {where} is lazy and has no weights yet; run a batch through the model first")
        if any(p is not None and p.is_meta for p in module._parameters.values()):
            raise UserError(f"convert: {where} is on the device meta and has no weights yet; load them first")


def _instead(model: nn.Module) -> str:
    """The kinds of layers with weights that a model has, for a message."""
    kinds = {
        f"{type(m).__module__}.{type(m).__qualname__}"
        for m in model.modules()
        if type(m) not in ANALOG
        and (next(m.parameters(recurse=False), None) is not None or "quantized" in str(type(m)))
    }
    return f" (it holds {', '.join(sorted(kinds)[:4])}, which cannot carry variation)" if kinds else ""


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; of weights that pruning or weight normalisation derived from parameters, their values."""
    derived = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model, derived)
    except Exception as error:  # whatever an attribute of the model raises when it is copied
        raise UserError(f"convert: the model cannot be copied ({one_line(error, 200)})") from error


def _check_forwards(model: nn.Module, copied: nn.Module) -> None:
    """Refuse a copy whose patched `forward` still belongs to the original."""
    originals = {id(module): name for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        patched = vars(module).get("forward")
        if patched is not None and any(id(held) in originals for held in _held(patched)):
            where = f"of {name!r} " if name else ""
            raise UserError(
                f"convert: the forward {where}was replaced by a function that runs the original's layers, so that the "
                "copy's would carry no variation; remove it (del model.forward), or make it a method of a class"
            )


def _held(function: Any) -> Iterator[nn.Module]:
    """The modules that a callable holds: bound to it, in its closure, its defaults, by name, or in what it wraps."""
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
            if not (held.__module__ or "").startswith("torch"):  # which holds no network of the user's by name
                waiting += [held.__globals__.get(name) for name in held.__code__.co_names]


def _warn_uncovered(analog: nn.Module, exclude: tuple[str, ...]) -> None:
    covered = {id(p) for layer in analog_layers(analog) for p in layer.parameters()}
    for prefix, module in analog.named_modules():
        digital = getattr(module, "digital_children", ())
        covered |= {id(p) for name in digital for p in module.get_submodule(name).parameters()}
        if isinstance(module, DIGITAL) or _within(prefix, exclude):
            covered |= {id(p) for p in module.parameters()}
    left = [
        name
        for name, p in analog.named_parameters()
        if p.dim() > 1 and id(p) not in covered and not _within(name, exclude)
    ]
    if left:
        warnings.warn(
            f"no variation on {', '.join(left)}: only nn.Conv2d and nn.Linear become analog; "
            "name them, or their modules, in `exclude` if they are digital",
            CoverageWarning,
            stacklevel=3,
        )
    # An embedding that shares a weight is a table; what else holds it may well multiply with it.
    layers = {id(layer._parameters.get("weight")): layer for layer in analog_layers(analog)}
    again = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in analog.named_modules()
        if not isinstance(module, (AnalogLayer, *DIGITAL)) and not _within(prefix, exclude)
        for name, p in module._parameters.items()
        if p is not None and id(p) in layers and not _within(f"{prefix}.{name}".lstrip("."), exclude)
    ]
    if again:
        warnings.warn(
            f"no variation on {', '.join(again)}, the weight of an analog layer under another name: read it from the "
            "layer itself; name it, or its module, in `exclude` if it is digital",
            CoverageWarning,
            stacklevel=3,
        )


def analog_layers(model: nn.Module) -> list[AnalogLayer]:
    """The layers that can carry variation, by layer index."""
    layers = (m for m in model.modules() if isinstance(m, AnalogLayer))
    return sorted(layers, key=lambda layer: layer.layer_index)


def nominal_weight(layer: nn.Module) -> Tensor:
    """The trained weights of a layer, analog or not, whatever chip is programmed."""
    return layer.nominal if isinstance(layer, AnalogLayer) else layer.weight


def chip_of(model: nn.Module) -> Chip:
    """The chip that `model` stands for. Raises UserError where it was not converted, or in parts."""
    layers = analog_layers(model)
    if not layers:
        if any(type(module).__module__ == __name__ for module in model.modules()):
            raise UserError(
                "correctnet.crossbar.layers was reloaded after the model was converted; restart Python, and convert"
            )
        raise UserError("the model carries no variation: pass it through convert() first")
    if any(layer.chip is not layers[0].chip for layer in layers):
        raise UserError("parts of the model were converted on their own, each with a chip; convert the whole model")
    return layers[0].chip


def program(model: nn.Module, sample: int | None, first_layer: int = 0, seed: int | None = None) -> None:
    """Program chip `sample` into a converted model; None programs the nominal weights.

    Args:
        model: from `convert`.
        sample: number of the chip in [0, 2^32), or None.
        first_layer: layers of a smaller index stay nominal (the sweep of Fig. 9).
        seed: another seed than the one given to `convert`, from now on.

    Raises:
        UserError: an argument outside its range, or a model that another thread is evaluating.
    """
    chip = chip_of(model)
    _check_address(sample, first_layer)
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


def _check_address(sample: int | None, first_layer: int) -> None:
    if sample is not None and not 0 <= whole(sample, "program: a sample") < 2**32:
        raise UserError(f"program: a sample lies in [0, 2^32), not {sample}")
    if whole(first_layer, "program: first_layer") < 0:
        raise UserError(f"program: first_layer must be at least 0, not {first_layer}")


@contextmanager
def programmed(model: nn.Module, sample: int | None, first_layer: int = 0) -> Iterator[nn.Module]:
    """`program` for the length of a block; what was programmed before is restored.

    The model is this thread's for that long: another thread that asks for it waits.
    """
    chip = chip_of(model)
    _check_address(sample, first_layer)
    with chip.lock:
        before = chip.sample, chip.first_layer
        chip.sample, chip.first_layer = sample, first_layer
        try:
            yield model
        finally:
            chip.sample, chip.first_layer = before


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """Draw each layer's weights once a chip, not once a forward pass, for the length of a block.

    For loops over many batches, in which nobody changes the nominal weights.
    """
    chip = chip_of(model)
    before, chip.drawn = chip.drawn, {}
    try:
        yield
    finally:
        chip.drawn = before
