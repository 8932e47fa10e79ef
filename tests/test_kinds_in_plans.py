"""Layers of one dimension, and layers whose weights are derived from others, in plans of the engine."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from correctnet import LogNormalVariation, convert
from correctnet.crossbar.convert import programmed
from correctnet.crossbar.layers import analog_layers
from correctnet.engine.engine import Engine, describe
from correctnet.noise import core

pytestmark = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")

HALF = LogNormalVariation(0.5)


@torch.no_grad()
def check(network: nn.Module, x: torch.Tensor, plans: int = 1) -> None:
    """Hold an engine's outputs against the converted network, on two chips and in both precisions."""
    analog = convert(network.eval(), HALF)
    for precision, bound in (("float32", 1e-5), ("bfloat16", 0.05)):
        engine = Engine(analog, x, precision=precision)
        assert (engine.report.plans, engine.report.unfused) == (plans, ()), engine.report
        assert len(engine.report.fused) == len(analog_layers(analog))
        for found, sample in zip(engine.outputs(x, [0, 7]), (0, 7), strict=True):
            with programmed(analog, sample):
                wanted = analog(x)
            assert (found - wanted).abs().max() <= bound * wanted.abs().max()


class Audio(nn.Module):
    """A network on waveforms: every operation of one dimension, a residual sum, and features of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 12, 9, stride=3, padding=4), nn.BatchNorm1d(12), nn.ReLU())
        self.pools = nn.Sequential(nn.MaxPool1d(3, stride=2, padding=1), nn.Dropout1d(), nn.AvgPool1d(2, stride=1))
        self.body = nn.Sequential(
            nn.Conv1d(12, 12, 3, padding=2, dilation=2, groups=3),
            nn.GroupNorm(2, 12),
            nn.GELU(),
            nn.Conv1d(12, 12, 4, padding="same", padding_mode="circular"),
            nn.InstanceNorm1d(12, affine=True),
        )
        self.depthwise, self.last = nn.Conv1d(12, 12, 5, padding=2, groups=12), nn.Conv1d(24, 6, 1)
        self.some, self.head = nn.AdaptiveAvgPool1d(3), nn.Linear(6 * 3 + 6, 5)

    def forward(self, x):
        x = self.pools(self.first(x))
        x = x + self.body(x)
        x = self.last(torch.cat([self.depthwise(x), x], 1))
        return self.head(torch.cat([self.some(x).flatten(1), x.mean(2)], 1))


def randomised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.InstanceNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("isa", core.status().available)
def test_layers_of_one_dimension(isa, on_isa) -> None:
    on_isa(isa)
    torch.manual_seed(0)
    check(randomised(Audio()), torch.randn(19, 2, 90))


class Twice(nn.Module):
    """A parametrization, as a user may write one."""

    def forward(self, weight):
        return weight + weight.flip(0)


DERIVED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "own, of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", DERIVED)
def test_layers_with_derived_weights(how) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(2), nn.Conv1d(6, 4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 21, 3)
    )
    for place in (0, 3, 6):
        DERIVED[how](network[place])
    x = torch.randn(17, 3, 7, 7)
    network(x)  # a first pass, by which spectral_norm estimates a norm
    check(network, x)
    # The weights of an engine are those of the parameters at that time, not those of the last pass.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    check(network, x)


def test_hooks_that_may_do_anything_are_left_to_torch() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.l1_unstructured(network[0], "bias", amount=0.5)
    prune.l1_unstructured(network[2], "weight", amount=0.5)
    analog, x = convert(network.eval(), HALF), torch.randn(9, 6)
    assert describe(analog, x).unfused == ("0",)
    network[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert describe(convert(network, HALF), x).unfused == ("0", "2")
