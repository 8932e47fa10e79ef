"""Lowering of a traced network to plans, the pieces that the C++ core runs.

A plan computes one value from one other. Each convolution or linear layer is fused with what follows it: its ADC, bias,
BatchNorm and an activation in either order, a 2 x 2 max-pool, the DAC of the next layer. Torch computes the values that
no plan can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, fx, nn

from correctnet.crossbar.converters import Periphery, Quantizer
from correctnet.crossbar.layers import OnCrossbar, trained_weight
from correctnet.devices.base import kernel_noise
from correctnet.engine import cuda, pieces
from correctnet.engine.activations import RELU, Activation
from correctnet.engine.op import Op
from correctnet.engine.operations import in_row, layer_of, op_of
from correctnet.engine.steps import PlanStep, TorchStep
from correctnet.engine.trace import Traced, changed_by, read_by, shape_of
from correctnet.noise import core
from correctnet.noise import device as gpu
from correctnet.noise.arrays import in_order
from correctnet.precision import Precision

Method = Literal["auto", "fused", "materialise", "library"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass
class _Function:
    """An activation and affine maps after an operation that a plan fuses with it (`_native.Pointwise`)."""

    channels: int
    scale: np.ndarray | float = 1.0
    shift: np.ndarray | float = 0.0
    activation: Activation | None = None
    after_scale: np.ndarray | None = None
    after_shift: np.ndarray | None = None
    adc: tuple[float, int] | None = None  # a converter before the maps, and one after them, as `_converter` has them
    dac: tuple[float, int] | None = None

    @np.errstate(invalid="ignore", over="ignore")  # infinities and NaN must reach the outputs
    def absorb(self, op: Op) -> bool:
        """Append `op` if it can be fused; return whether it was."""
        if op.kind == "same":
            return True
        if op.kind == "activation":
            again = self.activation == op.detail == RELU
            if self.after_scale is not None or not (self.activation is None or again):
                return False
            self.activation = op.detail
            return True
        if op.kind != "affine":
            return False
        scale, shift = op.detail
        if self.activation is None:
            self.scale, self.shift = self.scale * scale, self.shift * scale + shift
        elif self.after_scale is None:
            self.after_scale, self.after_shift = scale, shift
        else:
            self.after_scale, self.after_shift = self.after_scale * scale, self.after_shift * scale + shift
        return True

    def identity(self, op: Op) -> bool:
        """Return whether `op` with what was appended to it is the identity."""
        return op.kind == "same" and self.activation is None and isinstance(self.scale, float) and self.dac is None

    def convert(self, own: Periphery) -> None:
        """Convert the outputs of a layer, whose inputs a DAC has made whole numbers."""
        unit = 1.0 if own.dac is None else own.dac.step
        if own.adc is not None:
            self.adc = unit / own.adc.step, own.adc.steps
            unit = own.adc.step
        self.scale = self.scale * unit

    @np.errstate(invalid="ignore", over="ignore")
    def pointwise(self) -> Any:
        """Return the maps as the core's `Pointwise`."""

        def array(values: np.ndarray | float | None) -> np.ndarray | None:
            return None if values is None else np.broadcast_to(values, self.channels).astype(np.float32)

        name, low, high = self.activation or ("none", 0.0, 0.0)
        return core.extension.Pointwise(
            scale=array(self.scale),
            shift=array(self.shift),
            activation=name,
            low=low,
            high=high,
            after_scale=array(self.after_scale),
            after_shift=array(self.after_shift),
            adc=self.adc,
            dac=self.dac,
        )

    @property
    def pools(self) -> bool:
        """Whether a pool can be fused behind the maps."""
        return self.activation is None or self.activation[0] in ("relu", "clamp", "leaky")


class Lowering:
    """Decides which values of a traced network are computed by plans, and makes those plans."""

    def __init__(self, traced: Traced):
        self.root, self.input, self.output = traced.root, traced.input, traced.output
        self.unused, self.prefix = traced.unused, traced.prefix
        self.device = next(self.root.parameters()).device
        self.ops: dict[fx.Node, Op] = {}
        self.sources: dict[fx.Node, fx.Node] = {}  # by a plan's value, the one value that the plan reads
        self.last: dict[fx.Node, bool] = {}  # by a plan's value, whether its channels are last
        self.source_last: dict[fx.Node, bool] = {}  # and whether those of the value that the plan reads are
        on_device = gpu.reaches(self.device)
        # By step, the value that it changes in place.
        self.changed = {n: value for n in self.root.graph.nodes if (value := changed_by(self.root, n))}
        for node in self.root.graph.nodes:
            op = op_of(self.root, node)
            if op and on_device and not _has_kernel(op):
                op = None
            if op:
                self._place(node, op)

    def _place(self, node: fx.Node, op: Op) -> None:
        """Let plans compute a node if they can.

        A plan has one input: an operation on two values that torch computes, or changes in place, is torch's.
        """
        planned = [n for n in op.inputs if n in self.ops and n not in self.changed.values()]
        last = op.last
        if last is None:
            found = {self.last[n] for n in planned if len(shape_of(n)) > 1}
            if len(found) > 1:
                return
            last = found.pop() if found else len(shape_of(op.inputs[0])) == 2
        sources = set()
        for n in op.inputs:
            vector = len(shape_of(n)) == 1
            if n in planned and (vector or self.last[n] == last):
                sources.add((self.sources[n], self.source_last[n]))
            else:
                sources.add((n, last and not vector))
        if len(sources) > 1 or not _rank_fits(*(source := sources.pop())):
            return
        self.ops[node] = op
        self.sources[node], self.source_last[node] = source
        self.last[node] = len(shape_of(node)) > 1 and last != op.turns

    def steps(
        self, first_layer: int, precision: Precision, method: cuda.Method | Literal["library"] = "fused"
    ) -> list[TorchStep]:
        """Return the steps that compute the output, in order; method "library" uses no plans."""
        nodes = self.root.graph.nodes
        sources = {n: self.sources[n] for n in nodes if method != "library" and self._layered(n, self.sources)}
        shared: list[fx.Node] = []
        while True:
            needed = self._needed(sources, shared)
            # A plan starts at a value that is needed anyway, so that none is computed twice.
            cuts = {n: c for n in sources.keys() & needed if (c := self._cut(n, sources, needed)) is not sources[n]}
            sources |= cuts
            if cuts:
                sources = {n: source for n, source in sources.items() if self._layered(n, sources)}
            elif (found := self._shared(sources, needed)) is not None:
                shared.append(found)
            else:
                break
        sampled = self._sampled(first_layer)
        return [
            self._plan(node, sources[node], first_layer, precision, node in sampled, method)
            if node in sources
            else TorchStep(node, node in sampled)
            for node in nodes
            if node in needed
        ]

    def _needed(self, sources: dict[fx.Node, fx.Node], shared: list[fx.Node]) -> set[fx.Node]:
        """Return the values that steps compute, where plans compute those in `sources`, and `shared` in any case."""
        needed: set[fx.Node] = set()
        waiting = [self.output, *self.changed, *shared]
        while waiting:
            node = waiting.pop()
            if node not in needed and node is not self.input:
                needed.add(node)
                waiting += [sources[node]] if node in sources else node.all_input_nodes
        return needed

    def _cut(self, target: fx.Node, sources: dict[fx.Node, fx.Node], needed: set[fx.Node]) -> fx.Node:
        """Return the last needed value from which alone a plan's value follows: its source, or one between them."""
        for node in reversed(self._region(target, sources[target])):
            if node is target or node not in needed:
                continue
            if self._follows(target, node):
                return node
        return sources[target]

    def _follows(self, target: fx.Node, node: fx.Node) -> bool:
        """Return whether a plan can compute one value from another alone."""
        region = self._region(target, node)
        return all(n is node or n in region for each in region for n in self.ops[each].inputs)

    def _shared(self, sources: dict[fx.Node, fx.Node], needed: set[fx.Node]) -> fx.Node | None:
        """Return the last value with a layer that several plans compute and can start at; None where there is none."""
        targets = [n for n in sources if n in needed]
        regions = {target: self._region(target, sources[target]) for target in targets}
        for node in reversed(self.root.graph.nodes):
            readers = [target for target in targets if node in regions[target]]
            anew = len(readers) > 1 and node not in needed and self._layered(node, sources)
            if anew and all(self._follows(target, node) for target in readers):
                return node
        return None

    def varied(self, node: fx.Node, first_layer: int) -> dict[str, OnCrossbar]:
        """Return the weights that a step reads and that differ from chip to chip, by name, see `read_by`."""
        return {name: own for name, own in read_by(self.root, node).items() if _varies(own, first_layer)}

    def cost(self, node: fx.Node) -> tuple[float, int]:
        """Return (FLOP an image, weights) of a step that is one convolution or linear layer, otherwise zeros."""
        module = self.root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or not shape_of(node):
            return 0.0, 0
        weight = trained_weight(module)
        pixels = math.prod(shape_of(node)) // weight.shape[0]  # or vectors, for a linear layer
        return 2.0 * weight.numel() * pixels, weight.numel()

    def _layered(self, node: fx.Node, sources: dict[fx.Node, fx.Node]) -> bool:
        """Return whether a plan of the value has a layer; without one torch is as fast."""
        return node in sources and any(
            self.ops[n].kind in ("conv", "linear") for n in self._region(node, sources[node])
        )

    def _sampled(self, first_layer: int) -> set[fx.Node]:
        """Return the nodes whose values differ from chip to chip."""
        sampled: set[fx.Node] = set()
        for node in self.root.graph.nodes:
            if self.varied(node, first_layer) or any(n in sampled for n in node.all_input_nodes):
                sampled |= {node, self.changed.get(node, node)}
        return sampled

    def _plan(
        self,
        target: fx.Node,
        source: fx.Node,
        first_layer: int,
        precision: Precision,
        sampled: bool,
        method: cuda.Method,
    ) -> PlanStep:
        region = self._region(target, source)
        readers = {n: [r for r in region if n in self.ops[r].inputs] for n in (source, *region)}
        first = self.source_last[target] if source is self.sources[target] else self.last[source]
        lasts = first, self.last[target]
        plan = core.extension.Plan(precision, *_as_image(shape_of(source), lasts[0]))
        values, done, layers, converted = {source: 0}, set(), [], set()
        for node in region:
            if node in done:
                continue
            op = self.ops[node]
            chain = _Function(_as_image(shape_of(node), self.last[node])[0])
            pool, last = False, node
            if op.kind in _ABSORBED:
                chain.absorb(op)
            # Fuse what follows, up to a value that has other readers.
            while op.kind in ("conv", "linear", "add", "multiply", *_ABSORBED):
                after = readers[last]
                if last is target or len(after) != 1:
                    break
                following = self.ops[after[0]]
                if op.kind == "conv" and not pool and chain.pools and _halves(following, shape_of(last)):
                    pool = True
                elif (pool and following.kind != "same") or not chain.absorb(following):
                    break
                last = after[0]
                done.add(last)
            if op.kind in ("conv", "linear", "add", "multiply", *_ABSORBED):
                reader = self._converting(last, target, readers, first_layer)
                if reader is not None:
                    chain.dac = _converter(_converters(layer_of(self.ops[reader]), first_layer).dac)
                    converted.add(reader)
            x = [values[n] for n in op.inputs]
            own = _converters(layer_of(op), first_layer)
            if own is not None and own.dac is not None and node not in converted:
                x = [plan.pointwise(x[0], core.extension.Pointwise(dac=_converter(own.dac)))]
            if op.kind in _PIECES:
                first = op.last if op.last is not None else self.last[node]
                values[last] = pieces.emit(plan, op, x[0], shape_of(op.inputs[0]), first)
            else:
                values[last] = x[0] if chain.identity(op) else self._emit(plan, op, x, chain, pool, first_layer)
            if op.kind in ("conv", "linear"):
                layers.append(node.target)
        plan.finish(values[target])
        on_device = cuda.Plan(plan, self.device, method) if gpu.reaches(self.device) else None
        return PlanStep(target, sampled, source, plan, shape_of(target), tuple(layers), on_device, lasts)

    def _converting(
        self, node: fx.Node, target: fx.Node, readers: dict[fx.Node, list[fx.Node]], first_layer: int
    ) -> fx.Node | None:
        """Return the layer with a DAC that is all that reads a value, whose numbers may be moved before; else None."""
        while node is not target and len(readers[node]) == 1:
            (node,) = readers[node]
            own = _converters(layer_of(self.ops[node]), first_layer)
            if own is not None:
                return None if own.dac is None else node
            if self.ops[node].kind not in _MOVING:
                return None
        return None

    def _region(self, target: fx.Node, source: fx.Node) -> list[fx.Node]:
        """Return the nodes between a plan's source and its target, in order."""
        found, waiting = set(), [target]
        while waiting:
            node = waiting.pop()
            if node is not source and node in self.ops and node not in found:
                found.add(node)
                waiting += self.ops[node].inputs
        return [n for n in self.root.graph.nodes if n in found]

    @np.errstate(invalid="ignore", over="ignore")
    def _emit(self, plan: Any, op: Op, x: list[int], chain: _Function, pool: bool, first_layer: int) -> int:
        """Append an operation to a plan; return the number of its value."""
        if op.kind == "conv":
            layer, padding, moved = op.detail
            chain.shift = chain.shift + chain.scale * _bias(layer)
            if own := _converters(layer, first_layer):
                chain.convert(own)
            weights, stride, dilation = _weights(layer, first_layer), layer.stride, layer.dilation
            if len(stride) == 1:  # of one dimension
                stride, dilation = in_row(stride), in_row(dilation)
                weights |= {name: weights[name][:, None] for name in ("weight", "spread") if name in weights}
            return plan.conv(
                plan.pixels(x[0], *moved) if moved else x[0],
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=layer.groups,
                pointwise=chain.pointwise(),
                pool=pool,
                **weights,
            )
        if op.kind == "linear":
            layer = op.detail
            chain.shift = chain.shift + chain.scale * _bias(layer)
            if own := _converters(layer, first_layer):
                chain.convert(own)
            weights = _weights(layer, first_layer)
            if not op.last:
                return plan.linear(x[0], pointwise=chain.pointwise(), **weights)
            for name in {"weight", "spread"} & set(weights):  # on each token
                weights[name] = weights[name][:, None, None]
            return plan.conv(x[0], pointwise=chain.pointwise(), **weights)
        if op.kind == "attention":
            return plan.attention(*x, **op.detail)
        if op.kind in ("layer_norm", "group_norm"):
            *how, chain.scale, chain.shift = op.detail
            return getattr(plan, op.kind)(x[0], *how, chain.pointwise())
        if op.kind in ("max_pool", "average_pool"):
            return getattr(plan, op.kind)(x[0], *op.detail)
        if op.kind == "adaptive":
            return plan.adaptive_average_pool(x[0], *op.detail)
        if op.kind == "flatten":
            return plan.flatten(x[0])
        if op.kind == "concat":
            return plan.concat(x)
        if op.kind == "channels":
            return plan.channels(x[0], op.detail)
        if op.kind == "pixels":
            return plan.pixels(x[0], *op.detail)
        if op.kind in ("add", "multiply"):
            return getattr(plan, op.kind)(x[0], x[1], chain.pointwise())
        return plan.pointwise(x[0], chain.pointwise())


# Operations on single numbers, which are fused with each other and with what is before them.
_ABSORBED = ("affine", "activation", "same")
# Operations after which a DAC gives the same as before them.
_MOVING = ("same", "flatten", "max_pool", "channels", "pixels", "taken", "reshaped")
_PIECES = ("taken", "reshaped", "joined", "shifted")


def _has_kernel(op: Op) -> bool:
    """Return whether the CUDA kernels have the operation."""
    if op.last or op.turns or op.kind in ("multiply", "channels", "group_norm", "pixels", *_PIECES):
        return False
    if op.kind == "conv" and op.detail[2]:
        return False
    return op.kind != "activation" or op.detail == RELU


def _rank_fits(source: fx.Node, last: bool) -> bool:
    shape = shape_of(source)
    return shape is not None and len(shape) <= 3 and (not last or len(shape) > 1)


def _as_image(shape: tuple[int, ...], last: bool) -> tuple[int, int, int]:
    """Return the shape that a value has in a plan, (C, H, W)."""
    if last:
        shape = (shape[-1], *shape[:-1])
    return shape[0], *(1,) * (3 - len(shape)), *shape[1:]


def _halves(op: Op, shape: tuple[int, ...]) -> bool:
    """Return whether `op` is the 2 x 2 max-pool that a convolution can be fused with."""
    return op.kind == "max_pool" and op.detail[:4] == ((2, 2), (2, 2), (0, 0), False) and min(shape[1:]) >= 2


def _bias(layer: nn.Module) -> np.ndarray | float:
    return 0.0 if layer.bias is None else layer.bias.detach().double().cpu().numpy()


def _varies(layer: nn.Module | OnCrossbar, first_layer: int) -> bool:
    """Return whether the layer is another one on a chip: its weights, or its inputs and outputs by converters."""
    if not isinstance(layer, OnCrossbar) or layer.layer_index < first_layer:
        return False
    noise = kernel_noise(layer.variation)
    return noise is None or any(noise) or layer.periphery is not None


def _converters(layer: nn.Module | None, first_layer: int) -> Periphery | None:
    """Return the converters of a layer on the chips."""
    return layer.periphery if isinstance(layer, OnCrossbar) and layer.layer_index >= first_layer else None


def _converter(quantizer: Quantizer) -> tuple[float, int]:
    """Return a converter as the core has it: 1 / step, and the number of steps above 0."""
    return 1 / quantizer.step, quantizer.steps


def _weights(layer: nn.Module, first_layer: int) -> dict[str, Any]:
    """Return the arguments of a plan's layer that say what its weights are, in the order (out, *kernel, in)."""

    def array(tensor: Tensor) -> np.ndarray:
        return in_order(tensor.detach()).cpu().numpy()

    weight = trained_weight(layer)
    if not _varies(layer, first_layer):
        return {"weight": array(weight)}
    index, noise = layer.layer_index, kernel_noise(layer.variation)
    if noise is not None:
        return {"weight": array(weight), "noise": core.layer_noise(index, *noise)}
    arrays = layer.variation.array_noise(weight, index)
    found = {"weight": array(arrays.mean), "noise": core.array_noise(index, arrays), "spread": array(arrays.spread)}
    return found if arrays.reach is None else {**found, "reach": arrays.reach.cpu().numpy()}
