"""Kinds of modules whose weights crossbars hold, and the crossbars of a network with their addresses.

A new kind of layer is one line of `KINDS`, and one in docs/layers.md. A parameter of any other module is on
a crossbar where the attribute `analog_parameters` of the module names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# The layers that were analog first: the addresses of their noise do not depend on other kinds.
FIRST = (nn.Linear, nn.Conv2d)


class Kind(NamedTuple):
    """Modules with weights on crossbars.

    Attributes:
        module: their class; subclasses belong to the kind.
        parameters: names of the parameters, of a module; each is on a crossbar of its own.
        matrices: the linear maps of a parameter, (outputs, inputs) or (maps, outputs, inputs), of (module, name,
            weight). Error suppression bounds the norm of each.
    """

    module: type[nn.Module]
    parameters: Callable[[nn.Module], tuple[str, ...]]
    matrices: Callable[[nn.Module, str, Tensor], Tensor]


def _weight(module: nn.Module) -> tuple[str, ...]:
    return ("weight",)


def _rows(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """(out, ...) as one map to `out` outputs; a bilinear layer's from the products of both inputs' elements."""
    return weight.flatten(1)


def _convolution(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A map from a window to a pixel, for each group."""
    return weight.flatten(1) if module.groups == 1 else weight.unflatten(0, (module.groups, -1)).flatten(2)


def _transposed(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A map from a pixel to a window of outputs, which are then added up, for each group; weight (in, out, ...)."""
    return weight.flatten(1).mT if module.groups == 1 else weight.unflatten(0, (module.groups, -1)).flatten(2).mT


def _gates(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A map for each gate; a projection of the hidden state (`weight_hr`) is one."""
    gates = 1 if "weight_hr" in name else weight.shape[0] // module.hidden_size
    return weight if gates == 1 else weight.unflatten(0, (gates, -1))


def _projections(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Maps to queries, keys and values, where one parameter holds all three."""
    return weight.unflatten(0, (3, -1)) if name == "in_proj_weight" else weight


def _of_attention(module: nn.Module) -> tuple[str, ...]:
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return tuple(name for name in names if _has(module, name))


def _of_recurrent(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in module._flat_weights_names if name.startswith("weight"))


def _of_cell(module: nn.Module) -> tuple[str, ...]:
    return ("weight_ih", "weight_hh")


KINDS = (
    Kind(nn.Linear, _weight, _rows),
    *(Kind(module, _weight, _convolution) for module in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    *(Kind(module, _weight, _transposed) for module in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    Kind(nn.Bilinear, _weight, _rows),
    Kind(nn.MultiheadAttention, _of_attention, _projections),  # its output projection is a linear layer
    Kind(nn.RNNBase, _of_recurrent, _gates),
    Kind(nn.RNNCellBase, _of_cell, _gates),
)


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module, analog or not; None where it has no weights that belong on a crossbar."""
    return next((kind for kind in KINDS if isinstance(module, kind.module)), None)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module before its conversion."""
    return getattr(type(module), "plain", type(module))


class Crossbar(NamedTuple):
    """A parameter of a network that is, or can be, on a crossbar.

    Attributes:
        name: that of the module, where its weight alone is on a crossbar; of the parameter elsewhere.
        module: the module that holds the parameter, analog or not.
        parameter: name of the parameter within the module.
        index: layer index of the noise.
    """

    name: str
    module: nn.Module
    parameter: str
    index: int

    @property
    def weight(self) -> Tensor:
        """The trained weights, also those that a parametrization derives, whichever chip is programmed."""
        if (anew := derived(self.module, self.parameter)) is not None:
            return anew
        read = getattr(self.module, "nominal_of", None)
        return getattr(self.module, self.parameter) if read is None else read(self.parameter)

    def matrices(self, weight: Tensor) -> Tensor:
        """The linear maps of weights in the shape of the parameter, see `Kind`; of other modules' parameters, one."""
        kind = kind_of(self.module)
        known = kind is not None and self.parameter in kind.parameters(self.module)
        return (kind.matrices if known else _rows)(self.module, self.parameter, weight)


def derived(module: nn.Module, name: str) -> Tensor | None:
    """Derive a weight anew as torch's old functions do before each pass, whose weight belongs to the pass; or None."""
    for hook in module._forward_pre_hooks.values():
        if not derives(module, hook, name):
            continue
        if isinstance(hook, prune.BasePruningMethod):
            return hook.apply_mask(module)
        if isinstance(hook, WeightNorm):
            return hook.compute_weight(module)
        return hook.compute_weight(module, do_power_iteration=False)
    return None


def derives(module: nn.Module, hook: Any, name: str = "weight") -> bool:
    """Return whether a hook does nothing but derive a weight of a module, as those of torch's old functions do."""
    if isinstance(hook, prune.BasePruningMethod):
        return hook._tensor_name == name
    return isinstance(hook, WeightNorm | SpectralNorm) and hook.name == name


def crossbars(model: nn.Module) -> list[Crossbar]:
    """Return every crossbar of the original network, by layer index, the address of its noise.

    Exact `nn.Conv2d` and `nn.Linear` come first, in order of registration, then the other kinds of `KINDS`. The index
    of a parameter that `analog_parameters` names is, from there on, its position among all parameters of the network.
    So a crossbar keeps its index whatever is excluded, named, or added in digital hardware (generators, compensators).
    """
    first: list[tuple[str, nn.Module, str]] = []
    others: list[tuple[str, nn.Module, str]] = []
    named: list[tuple[str, nn.Module, str, int]] = []
    position = 0
    for prefix, module in _modules(model):
        kind = kind_of(module)
        own = kind.parameters(module) if kind else ()
        if kind and own == ("weight",):
            exact = plain_type(module) in FIRST
            if exact or _weighted(module):
                (first if exact else others).append((prefix, module, "weight"))
        else:
            others += [(_join(prefix, name), module, name) for name in own]
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if name in getattr(module, "analog_parameters", ()) and name not in own:
                named.append((_join(prefix, name), module, name, position))
            position += 1
    found = [Crossbar(*each, i) for i, each in enumerate([*first, *others])]
    return found + [Crossbar(name, module, own, len(found) + i) for name, module, own, i in named]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _has(module: nn.Module, name: str) -> bool:
    """Return whether a module has a parameter, or one that others are derived to, without deriving it."""
    if name in module._parameters:
        return module._parameters[name] is not None
    return name in vars(module) or name in getattr(module, "parametrizations", ())


def _weighted(module: nn.Module) -> bool:
    """Return whether a subclass of a kind has a floating-point `weight`, unlike one that quantises it."""
    weight = module._parameters.get("weight")
    return _has(module, "weight") if weight is None else weight.is_floating_point()


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the original network in order of registration, each module once."""
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:  # a layer used twice is one layer on one crossbar
            return
        seen.add(id(module))
        yield prefix, module
        if plain_type(module) in FIRST:
            return
        digital = getattr(module, "digital_children", ())
        for name, child in module.named_children():
            if name not in digital:
                yield from walk(child, _join(prefix, name))

    yield from walk(model, "")


def check_parameter(model: nn.Module, name: str) -> str | None:
    """Explain in one line why a parameter cannot be on a crossbar; None where it can."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        if name in dict(model.named_buffers(remove_duplicate=False)):
            return f"{name} is a buffer; a crossbar holds trained parameters"
        return f"the model has no parameter {name!r}"
    parameter = parameters[name]
    if not parameter.is_floating_point():
        return f"{name} is {str(parameter.dtype).removeprefix('torch.')}; a crossbar holds floating-point weights"
    if parameter.dim() < 2:
        return f"{name} has {parameter.dim()} dimensions; a crossbar holds matrices, (out, in, ...)"
    return None


def declared(model: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters that `analog_parameters` of modules put on crossbars."""
    for prefix, module in _modules(model):
        yield from (_join(prefix, name) for name in getattr(module, "analog_parameters", ()))


def declare(model: nn.Module, names: tuple[str, ...]) -> None:
    """Put parameters on crossbars, by setting `analog_parameters` of their modules; names as in `check_parameter`."""
    for name in names:
        prefix, _, own = name.rpartition(".")
        module = model.get_submodule(prefix)
        module.analog_parameters = (*(n for n in getattr(module, "analog_parameters", ()) if n != own), own)
