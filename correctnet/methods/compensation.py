"""Error compensation (Fig. 5): a generator and a compensator in digital hardware after an analog layer.

For a layer with l input and n output feature maps, input x and noisy output y:

    g = act( generator( concat( avg_pool(x), y ) ) )        m filters, 1 x 1 x (l + n)
    z = compensator( concat( y, g ) )                       n filters, 1 x 1 x (n + m)

Convolutions in one and three dimensions have generators and compensators of these dimensions, linear layers have linear
ones, applied to each token.

z replaces y. Both are digital, hence free of variation. `correctnet.methods.compensation_training` trains them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from correctnet.crossbar.convert import copy_model
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.layers import crossbar_layers
from correctnet.errors import UserError, whole
from correctnet.networks.blocks import Block, parameter_count
from correctnet.noise import streams


class Compensated(nn.Module):
    """`original`, followed by a generator of `filters` filters and a compensator.

    x (N, l, H, W) -> z (N, n, H', W') for a convolution, grouped or not, transposed or not, in one to three dimensions;
    x (..., l) -> z (..., n) for a linear layer.
    The new layers have the dtype and device of the original layer. `weight` and `bias` are those of the original layer,
    for code that reads a layer's attributes; results that such code computes from them are not compensated.

    Args:
        original: a conv or linear layer, or a `Block` that begins with one.
        filters: m, the generator's filters, >= 1.
        activation: after the generator, "relu" or "none".
        init: "identity": the compensator starts as z = y; "random": torch's default initialisation.
        pool: how x is averaged to the size of y: "adaptive", or "kernel", with the layer's own window, stride, padding
            and dilation, and 1 / (kh kw) as the weight of each pixel, padding included.

    Raises:
        UserError: an unknown option, fewer than 1 filter, a layer of another type, or pool="kernel" for a transposed
            convolution or one with a forward of its own, whose window is not known.
    """

    digital_children = ("generator", "compensator")  # not part of the original network, never analog

    def __init__(
        self,
        original: nn.Module,
        filters: int,
        activation: Literal["none", "relu"] = "relu",
        init: Literal["identity", "random"] = "identity",
        pool: Literal["adaptive", "kernel"] = "adaptive",
    ):
        super().__init__()
        for option, value, known in (
            ("activation", activation, ("none", "relu")),
            ("init", init, ("identity", "random")),
            ("pool", pool, ("adaptive", "kernel")),
        ):
            _check_option(option, value, known)
        filters = whole(filters, "the number of filters of a generator")
        if filters < 1:
            raise UserError(f"a generator needs at least 1 filter, not {filters}")
        layer = layer_of(original)
        inputs, outputs = _features(layer)
        self.original = original
        # Drawn on the CPU in float32: the same numbers for any device and any defaults of torch.
        drawn: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        if isinstance(layer, nn.Linear):
            self.generator: nn.Module = nn.Linear(inputs + outputs, filters, **drawn)
            self.compensator: nn.Module = nn.Linear(outputs + filters, outputs, **drawn)
        else:
            convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layer.kernel_size) - 1]
            self.generator = convolution(inputs + outputs, filters, 1, **drawn)
            self.compensator = convolution(outputs + filters, outputs, 1, **drawn)
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()
        self.pool = "none" if isinstance(layer, nn.Linear) else pool
        if init == "identity":
            self.reset()
        self.register_buffer("window", _window(layer) if self.pool == "kernel" else None, persistent=False)
        for part in (self.generator, self.compensator):
            part.to(layer.weight.device, layer.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The original layer's weight."""
        return layer_of(self.original).weight

    @property
    def bias(self) -> Tensor | None:
        """The original layer's bias."""
        return layer_of(self.original).bias

    @torch.no_grad()
    def reset(self) -> None:
        """Make the compensator the identity, z = y."""
        self.compensator.weight.zero_()
        self.compensator.weight.flatten(1).fill_diagonal_(1.0)
        self.compensator.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x -> z, as defined at the top of the module."""
        y = self.original(x)
        generated = self.activation(self.generator(torch.cat([self._pooled(x, y), y], dim=self.features)))
        return self.compensator(torch.cat([y, generated], dim=self.features))

    @property
    def features(self) -> int:
        """The dimension that holds the features: the last for a linear layer, that before the pixels otherwise."""
        return -1 if isinstance(self.generator, nn.Linear) else -1 - len(self.generator.kernel_size)

    def _pooled(self, x: Tensor, y: Tensor) -> Tensor:
        if self.pool == "none":
            return x
        axes = len(self.generator.kernel_size)
        if self.pool == "adaptive":
            return (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[axes - 1](x, y.shape[-axes:])
        layer = layer_of(self.original)
        if self.window is None:
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
            return pool(x, layer.kernel_size, layer.stride, layer.padding)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        return convolve(x, self.window, None, layer.stride, padding, layer.dilation, layer.in_channels)


def _check_option(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"compensate: {option} must be one of {', '.join(map(repr, known))}, not {value!r}")


def _window(layer: nn.Module) -> Tensor | None:
    """(l, 1, kh, kw): the kernel of a convolution that averages over the layer's window; None if torch can pool so.

    `F.avg_pool2d` supports neither dilation, nor padding by more than half a window, by name, or with non-zero values.
    """
    if type(layer).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        raise UserError(f"compensate: pool 'kernel': the window of {type(layer).__name__} is not known; use 'adaptive'")
    if not isinstance(layer.padding, str):
        small = all(2 * p <= k for p, k in zip(layer.padding, layer.kernel_size, strict=True))
        if small and layer.padding_mode == "zeros" and set(layer.dilation) == {1}:
            return None
    size = tuple(layer.kernel_size)
    return layer.weight.new_full((layer.in_channels, 1, *size), 1 / math.prod(size)).detach()


def layer_of(module: nn.Module) -> nn.Module:
    """The conv or linear layer of a module that can be compensated: itself, or the first layer of a Block."""
    layer = module.layer if isinstance(module, Block) else module
    return layer.original if isinstance(layer, Compensated) else layer


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, _ConvNd):
        return layer.in_channels, layer.out_channels
    raise UserError(f"only convolutions and linear layers can be compensated, not {type(layer).__name__}")


def compensable(model: nn.Module) -> list[str]:
    """Names of the layers that can be compensated: convolutions and linear layers that the network calls.

    The output projection of `nn.MultiheadAttention` is none of them: attention multiplies with its weight itself.
    """
    inside = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return [
        each.name
        for each in crossbars(model)
        if each.parameter == "weight"
        and isinstance(each.module, (nn.Linear, _ConvNd))
        and id(each.module) not in inside
    ]


def outputs_of(model: nn.Module) -> dict[str, int]:
    """n of each layer that can be compensated, by name."""
    layers = dict(crossbar_layers(model))
    return {name: _features(layers[name])[1] for name in compensable(model)}


def cost(layer: nn.Module, filters: int) -> int:
    """Number of parameters, biases included, that compensation of `layer` with m = `filters` adds.

    m (l + n) + m for the generator and n (n + m) + n for the compensator; 0 for 0 filters.
    """
    inputs, outputs = _features(layer)
    if filters == 0:
        return 0
    return filters * (inputs + outputs + 1) + outputs * (outputs + filters + 1)


def filters_of(model: nn.Module, ratios: Sequence[float]) -> dict[str, int]:
    """Generator filters by layer name, for ratios S_1..S_n of the first n layers: m_i = round(S_i n_i), >= 1.

    Layers with S_i <= 0 are left out. Raises UserError for too many ratios, or one that is not finite.
    """
    layers = list(crossbar_layers(model))
    if len(ratios) > len(layers):
        raise UserError(f"{len(ratios)} ratios for a network of {len(layers)} layers")
    for ratio in ratios:
        if not math.isfinite(ratio):
            raise UserError(f"a ratio of filters must be a finite number, not {ratio!r}")
    counts = {
        name: max(1, round(s * _features(layer)[1])) for (name, layer), s in zip(layers, ratios, strict=False) if s > 0
    }
    return counts


def overhead(model: nn.Module, filters: Mapping[str, int]) -> float:
    """Compensation parameters / parameters of the original network, biases counted in both.

    Args:
        model: the original network.
        filters: generator filters by layer name.

    Raises:
        UserError: a layer that the network does not have.
    """
    check_filters(filters, "overhead")
    layers = dict(crossbar_layers(model))
    _check_names(model, filters)
    return sum(cost(layers[name], m) for name, m in filters.items()) / parameter_count(model)


def check_filters(filters: Any, what: str) -> None:
    """Raise a UserError, which begins with `what`, unless `filters` is a mapping."""
    if not isinstance(filters, Mapping):
        raise UserError(f"{what}: filters map names of layers to numbers of filters, not {filters!r}")


def _check_names(model: nn.Module, filters: Mapping[str, int]) -> None:
    layers, known = compensable(model), {name: type(layer).__name__ for name, layer in crossbar_layers(model)}
    for name in filters:
        if name not in known:
            raise UserError(f"the network has no conv or linear layer {name!r} (layers: {', '.join(layers)})")
        if name not in layers:
            raise UserError(
                f"compensate: {name or 'the network'} ({known[name]}) cannot be compensated: only convolutions and "
                "linear layers that the network calls can"
            )


def compensate(
    model: nn.Module,
    filters: Mapping[str, int],
    place: Literal["layer", "block"] = "layer",
    seed: int = 0,
    stage: str = "compensate",
    **options: Any,
) -> nn.Module:
    """A copy of `model` with compensation at the named layers, wherever the network uses them.

    Args:
        model: the original (digital) network.
        filters: generator filters m by layer name, as in `compensable`.
        place: "layer": directly after the analog layer; "block": after the BatchNorm and ReLU of its
            `correctnet.networks.blocks.Block`.
        seed: of the initial weights.
        stage: the purpose of these weights; each stage draws others, see `correctnet.noise.streams`.
        options: `activation`, `init` and `pool` of `Compensated`.

    Raises:
        UserError: an unknown layer or option, a layer that is already compensated, fewer than 1 filter, or, with
            place="block", a layer outside a Block or one that is also used elsewhere.
    """
    _check_option("place", place, ("layer", "block"))
    check_filters(filters, "compensate")
    seed = whole(seed, "compensate: the seed")
    for option in options:
        _check_option("an option", option, ("activation", "init", "pool"))
    _check_names(model, filters)
    compensated = copy_model(model, "compensate")
    replaced: dict[int, Compensated] = {}
    for name, m in filters.items():
        original = compensated.get_submodule(name)
        if any(layer_of(c.original) is original for c in compensation_modules(compensated).values()):
            raise UserError(f"compensate: {name} is already compensated")
        if place == "block":
            original = _block_of(compensated, name)
        with streams.global_generators(seed, "compensators", stage, name):
            replaced[id(original)] = Compensated(original, m, **options)
    if id(compensated) in replaced:  # the model itself is a layer or a Block
        return replaced[id(compensated)]
    for module in list(compensated.modules()):
        for name, child in module._modules.items():
            if id(child) in replaced:  # a layer may have several names
                module._modules[name] = replaced[id(child)]
                _take_own_path(module)
    return compensated


def _take_own_path(module: nn.Module) -> None:
    """Let torch's transformer layer call its layers: its fused kernel reads the weights of those instead."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0  # the kernel is for those activations alone


def _block_of(model: nn.Module, name: str) -> Block:
    """The Block whose first layer is the named one, which must not be used elsewhere in the model."""
    layer = model.get_submodule(name)
    places = [m for m in model.modules() for child in m._modules.values() if child is layer]
    parent = name.rpartition(".")[0]
    if not places or not isinstance(model.get_submodule(parent), Block):
        raise UserError(f"place 'block': layer {name or '(top)'!r} is not in a Block; use place 'layer'")
    if len(places) > 1:
        raise UserError(f"place 'block': layer {name!r} is also used outside of its Block; use place 'layer'")
    return model.get_submodule(parent)


def compensation_modules(model: nn.Module) -> dict[str, Compensated]:
    """The compensated layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Compensated)}


def compensation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all generators and compensators."""
    return [
        p
        for m in compensation_modules(model).values()
        for part in (m.generator, m.compensator)
        for p in part.parameters()
    ]
