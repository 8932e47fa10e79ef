"""Training with the moments of what variation does, instead of chips ([10] statistical training, [7] Vortex).

Each feature is a mean and a variance, (mu, v), of which a layer with independent factors of mean m and variance s^2 on
its weights makes

    mu_y = m W mu_x + b
    v_y  = W^2 ( (m^2 + s^2) v_x + s^2 mu_x^2 )

ReLU makes of a Gaussian the moments of the rectified one, and max-pooling takes those of the input with the largest
mean. Features are taken to be independent, which they are not behind a convolution: an error of one weight is common to
all positions.

Two losses, by what varies:

    "all"   every layer, after [10]: the cross entropy of logits drawn once from N(mu, v)
    "last"  the last layer alone, after [7]: the cross entropy of mu, lowered for the true class and raised for the
            others by gamma sqrt(v)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctnet.crossbar.kinds import crossbars
from correctnet.devices.base import Variation, kernel_noise
from correctnet.errors import UserError
from correctnet.metrics import Loss
from correctnet.training.loop import Hooks

Moments = tuple[Tensor, Tensor]


def linear_moments(layer: nn.Module, x: Moments, factor: tuple[float, float]) -> Moments:
    """Mean and variance of the output of a linear layer or a convolution, see the top of the module.

    Args:
        layer: the layer; its bias does not vary.
        x: mean and variance of its input.
        factor: mean and standard deviation of the factors of its weights; (1, 0) for a layer that is digital.
    """
    (mean, variance), (m, s) = x, factor
    if isinstance(layer, nn.Linear):

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.linear(x, weight, bias)

    else:

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return layer._conv_forward(x, weight, bias)

    spread = apply((m**2 + s**2) * variance + s**2 * mean.square(), layer.weight.square())
    return apply(m * mean, layer.weight, layer.bias), spread


def rectified_moments(x: Moments) -> Moments:
    """Mean and variance of max(x, 0) for a Gaussian x.

    With a = mu / sd, the mean is mu Phi(a) + sd phi(a), and that of the square (mu^2 + v) Phi(a) + mu sd phi(a).
    """
    mean, variance = x
    sd = variance.clamp_min(1e-12).sqrt()
    a = mean / sd
    below = 0.5 * torch.erfc(-a / math.sqrt(2))
    density = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    first = mean * below + sd * density
    second = (mean.square() + variance) * below + mean * sd * density
    return first, (second - first.square()).clamp_min(0)


def _max_pool(module: nn.MaxPool2d, x: Moments) -> Moments:
    mean, variance = x
    window = {"kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding}
    pooled, where = F.max_pool2d(
        mean, **window, dilation=module.dilation, ceil_mode=module.ceil_mode, return_indices=True
    )
    return pooled, variance.flatten(2).gather(2, where.flatten(2)).view(pooled.shape)


def _norm(module: nn.modules.batchnorm._BatchNorm, x: Moments) -> Moments:
    """BatchNorm with its stored statistics is linear."""
    mean, variance = x
    scale = (module.running_var + module.eps).rsqrt()
    shift = -module.running_mean * scale
    if module.affine:
        scale, shift = scale * module.weight, shift * module.weight + module.bias
    shape = (-1, *[1] * (mean.dim() - 2))
    return mean * scale.view(shape) + shift.view(shape), variance * scale.square().view(shape)


# What each kind of module makes of moments; layers are `linear_moments`.
KINDS: dict[type[nn.Module], Callable[[Any, Moments], Moments]] = {
    nn.ReLU: lambda _, x: rectified_moments(x),
    nn.MaxPool2d: _max_pool,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.Flatten: lambda module, x: (module(x[0]), module(x[1])),
    nn.Identity: lambda _, x: x,
    nn.Dropout: lambda _, x: x,  # off
}


def sequence(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a network that is a sequence, in order, with their names, those of sequences within it."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}.{name}" if prefix else name)
        else:
            yield prefix, module

    yield from walk(network, "")


class MomentsNetwork(nn.Module):
    """A network that is trained with moments: in training it returns what the loss reads, else its own outputs.

    Args:
        network: a sequence of linear layers, convolutions, and modules of `KINDS`; its parameters are trained.
        variation: a device that multiplies weights by factors that do not depend on them.
        layers: see the top of the module.
        exclude: names of layers that are digital, as for `correctnet.convert`.

    Raises:
        UserError: another network or device, or no layer that varies.
    """

    def __init__(
        self,
        network: nn.Module,
        variation: Variation,
        layers: Literal["all", "last"] = "all",
        exclude: Iterable[str] = (),
    ):
        super().__init__()
        if kernel_noise(variation) is None:
            raise UserError(f"moments: a device of factors is expected, as the lognormal, not {variation}")
        skipped, own = tuple(exclude), [each.name for each in crossbars(network)]
        varied = [n for n in own if not any(n == name or n.startswith(f"{name}.") for name in skipped)]
        for name, module in sequence(network):
            if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d, *KINDS):
                raise UserError(
                    f"moments: those of {name or 'the network'} ({type(module).__name__}) are not known; a sequence of "
                    f"linear layers, convolutions, {', '.join(kind.__name__ for kind in KINDS)} is expected"
                )
        if not varied:
            raise UserError("moments: no layer varies")
        self.network, self.layers = network, layers
        self.varied = set(varied if layers == "all" else varied[-1:])
        self.factor = variation.factor_moments()

    def moments(self, x: Tensor) -> Moments:
        """Mean and variance of the logits, (N, classes) each."""
        state = x, torch.zeros_like(x)
        for name, module in sequence(self.network):
            if type(module) in KINDS:
                state = KINDS[type(module)](module, state)
            elif self.layers == "last" and name in self.varied:
                # The penalty is of what deviates from the network as it is.
                _, spread = linear_moments(module, state, self.factor)
                state = module(state[0]), spread
            else:
                state = linear_moments(module, state, self.factor if name in self.varied else (1.0, 0.0))
        return state

    def forward(self, x: Tensor) -> Any:
        """x -> logits; in training logits that are drawn ("all"), or their means and standard deviations ("last")."""
        if not self.training:
            return self.network(x)
        mean, variance = self.moments(x)
        deviation = variance.clamp_min(1e-12).sqrt()
        return (mean, deviation) if self.layers == "last" else mean + deviation * torch.randn_like(mean)


def margin_loss(gamma: float) -> Loss:
    """Cross entropy of logits after the worst that gamma standard deviations do: the true class lowered, others raised.

    The penalty of [7] for the worst deviation, in a cross entropy in the place of its hinge loss.
    """

    def loss(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        mean, deviation = outputs
        sign = 1.0 - 2.0 * F.one_hot(labels, mean.shape[1]).to(mean)
        return F.cross_entropy(mean + gamma * sign * deviation, labels)

    return loss


def moments_hooks(layers: Literal["all", "last"], gamma: float) -> Hooks:
    """Hooks of a training of a `MomentsNetwork`: BatchNorm frozen, and the loss of what varies."""
    return Hooks(update_batchnorm=False, loss=margin_loss(gamma) if layers == "last" else None)
