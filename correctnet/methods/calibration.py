"""Calibration of each chip by least squares on a few images (the idea of DoRA calibration).

Behind each analog layer with input x and noisy output y (without the bias, which is digital) there are, in digital
hardware, a gain for each output and a path of low rank beside the layer:

    z = g * y + B A x + bias

Layer after layer, in the order in which the network runs them, g and then B A are those that bring z closest to what
the clean network has there, over the images:

    g    = argmin  sum |y0 - g * y|^2                                for each output
    B A  = argmin  sum |y0 - g * y - B A x|^2 + ridge |x|^2 |B A|^2    over matrices of the rank

y0 is the output in the clean network; x and y are those on the chip, with all layers before calibrated, and |x|^2 is
the sum of all squares, so that `ridge` has no unit. Both have closed forms. It takes the outputs of every layer of the
chip on the images: no labels, and no back-propagation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.crossbar.convert import chip_of, copy_model, programmed
from correctnet.crossbar.kinds import plain_type
from correctnet.crossbar.probe import left_alone, run
from correctnet.errors import UserError, whole
from correctnet.methods.compensation import compensation_modules
from correctnet.methods.lora import factors
from correctnet.methods.sidepaths import Beside, side_layers, side_paths
from correctnet.networks.blocks import original_parameters


class Correction(nn.Sequential):
    """B A x; without modules, for rank 0, it is 0."""

    density = 1.0

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__(*(factors(layer, rank) if rank else ()))
        self.outputs = len(layer.weight)
        self.to(layer.weight.device, layer.weight.dtype).requires_grad_(False)

    @property
    def stored(self) -> int:
        """Weights in digital memory: rank (inputs + outputs), and a gain for each output."""
        return sum(part.weight.numel() for part in self) + self.outputs


class Calibrated(Beside):
    """z = gain * y + path(x) + bias for a layer of y + bias; gains of 1 and a path of 0 to begin with."""

    def __init__(self, original: nn.Module, rank: int):
        super().__init__(original, Correction(original, rank))
        axes = () if isinstance(original, nn.Linear) else (1,) * len(original.kernel_size)
        self.register_buffer("gain", torch.ones(len(original.weight), *axes).to(original.weight))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make it the original layer."""
        self.gain.fill_(1.0)
        for part in self.path:
            part.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x -> z, as defined at the top of the module."""
        y = self.gain * self.original(x)
        if self.bias is not None:
            y = y + self.bias.view(self.gain.shape) * (1 - self.gain)
        return y + self.path(x) if len(self.path) else y

    def columns(self, x: Tensor) -> Tensor:
        """(rows, inputs of the kernel): what the layer's unrolled weight is multiplied with, a row for each output."""
        layer = self.original
        if isinstance(layer, nn.Linear):
            return x.reshape(-1, x.shape[-1])
        unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])

    def rows(self, y: Tensor) -> Tensor:
        """(rows, outputs) of an output of the layer without its bias, in the order of `columns`."""
        linear = isinstance(self.original, nn.Linear)
        rows = y.reshape(-1, y.shape[-1]) if linear else y.movedim(1, -1).flatten(0, -2)
        return rows.double() if self.bias is None else rows.double() - self.bias.double()

    @torch.no_grad()
    def solve(self, x: Tensor, y: Tensor, wanted: Tensor, ridge: float) -> None:
        """Set gain and path to the solutions for inputs x, outputs y on the chip, and outputs of the clean network."""
        rows, target = self.rows(y), self.rows(wanted)
        gain = least_gain(rows, target)
        self.gain.copy_(gain.view(self.gain.shape))
        if len(self.path):
            rank = len(self.path[0].weight)
            a, b = low_rank(self.columns(x).double(), target - gain * rows, rank, ridge)
            self.path[0].weight.copy_(a.view(self.path[0].weight.shape))
            self.path[1].weight.copy_(b.view(self.path[1].weight.shape))


def least_gain(y: Tensor, wanted: Tensor) -> Tensor:
    """(outputs,) gains g that minimise the sum over rows of |wanted - g * y|^2; 1 where y is 0 everywhere."""
    square = y.square().sum(0)
    return torch.where(square > 0, (y * wanted).sum(0) / square.clamp_min(torch.finfo(y.dtype).tiny), 1.0)


def low_rank(x: Tensor, wanted: Tensor, rank: int, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """A (rank, inputs) and B (outputs, rank) that minimise |wanted - x (B A)^T|^2 + ridge |x|^2 |B A|^2.

    It is the regression of reduced rank: with x = U S V^T and l = ridge |x|^2 the solution of full rank is
    V S / (S^2 + l) U^T wanted, and its rank is reduced by the leading right singular vectors of
    S / sqrt(S^2 + l) U^T wanted. Of several solutions it is the one of least norm.

    Args:
        x: (rows, inputs).
        wanted: (rows, outputs).
        rank: of the product, at least 1; A and B have rows and columns of zeros beyond the rank that it can have.
        ridge: at least 0.
    """
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = torch.where(s > s.max() * max(x.shape) * torch.finfo(s.dtype).eps, s, 0.0) if len(s) else s
    square = s.square() + ridge * s.square().sum()
    inverse = torch.where(s > 0, 1 / square.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
    projected = u.T @ wanted
    _, _, right = torch.linalg.svd((s * inverse.sqrt())[:, None] * projected, full_matrices=False)
    b = right[:rank].T
    a = b.T @ projected.T * (s * inverse) @ vt
    missing = rank - b.shape[1]
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))


def add_calibration(network: nn.Module, rank: int = 2, exclude: Iterable[str] | str = ()) -> nn.Module:
    """Return a copy of a network whose layers can be calibrated on each chip; it computes what the network does.

    Args:
        network: the original network, neither converted nor compensated.
        rank: of the paths; 0: gains alone.
        exclude: names of layers that are digital, as for `correctnet.convert`; they are not calibrated.

    Raises:
        UserError: a rank below 0, a network with paths or compensation, or a layer that is no linear layer nor a
            convolution in two dimensions without groups that pads with zeros.
    """
    rank = whole(rank, "add_calibration: the rank")
    if rank < 0:
        raise UserError(f"add_calibration: the rank is at least 0, not {rank}")
    if side_paths(network) or compensation_modules(network):
        raise UserError("add_calibration: the network has digital paths or compensation already")
    copied, made = copy_model(network, "add_calibration"), {}
    for name, layer in side_layers(copied, (exclude,) if isinstance(exclude, str) else exclude).items():
        simple = plain_type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
        if plain_type(layer) is not nn.Linear and (not simple or isinstance(layer.padding, str)):
            raise UserError(
                f"add_calibration: {name} is none of the layers that can be calibrated: linear ones, and convolutions "
                "in two dimensions without groups that pad with zeros by numbers"
            )
        made[id(layer)] = Calibrated(layer, rank)
    if id(copied) in made:
        return made[id(copied)]
    for parent in [m for m in copied.modules() if not isinstance(m, Beside)]:
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return copied


def calibration_share(network: nn.Module) -> float:
    """Overhead of calibration: gains and weights of paths / parameters of the original network."""
    return sum(m.path.stored for m in _calibrated(network).values()) / original_parameters(network)


@torch.no_grad()
def calibrate(model: nn.Module, images: Any, ridge: float = 1e-3) -> None:
    """Calibrate a converted network on the chip that it carries, in place, as at the top of the module.

    As `prepare` of `correctnet.evaluate` it calibrates every chip anew:

        analog = convert(add_calibration(network, 2), variation)
        result = evaluate(analog, test, chips=20, prepare=lambda chip: calibrate(chip, images))

    Args:
        model: from `correctnet.convert` of what `add_calibration` returned, with one chip programmed.
        images: (N, ...), a few training images; no labels.
        ridge: weight of the squared norm of the paths.

    Raises:
        UserError: no chip or several, no layer that can be calibrated, one that is called more than once or not at all,
            or a ridge below 0.
    """
    sample = chip_of(model).sample
    if not isinstance(sample, int):
        raise UserError("calibrate: one chip is calibrated; program one, or give calibrate to evaluate as prepare")
    if not ridge >= 0:
        raise UserError(f"calibrate: the ridge is at least 0, not {ridge}")
    found = _calibrated(model)
    if not found:
        raise UserError("calibrate: no layer can be calibrated; convert what add_calibration returns")
    for own in found.values():
        own.reset()
    with left_alone(model):
        with programmed(model, None):
            clean = _seen(model, images, found)
        for name in clean:  # in the order in which the network runs them
            x, y, _ = _seen(model, images, {name: found[name]})[name]
            found[name].solve(x, y, clean[name][2], ridge)


def _calibrated(model: nn.Module) -> dict[str, Calibrated]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Calibrated)}


def _seen(model: nn.Module, images: Any, layers: dict[str, Calibrated]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By name: input of each layer, output of the analog layer in it, and its output, in the order of the calls."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    order: list[str] = []

    def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] += [inputs[0], output]
        order.append(name)

    hooks = []
    for name, own in layers.items():
        hooks.append(own.original.register_forward_hook(lambda _, x, y, name=name: keep(name, x, y)))
        hooks.append(own.register_forward_hook(lambda _, x, z, name=name: seen[name].append(z)))
    try:
        run(model, images, "calibrate")
    finally:
        for hook in hooks:
            hook.remove()
    for name, values in seen.items():
        if len(values) != 3:
            raise UserError(f"calibrate: the network calls {name} {len(values) // 3} times; once is expected")
    return {name: tuple(seen[name]) for name in order}
