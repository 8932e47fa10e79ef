"""The engine against float64 networks whose weights the specification made, and its choice of what runs where."""

import copy
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profile import examples
from torch import nn

from correctnet import LogNormalVariation, convert, evaluate
from correctnet.crossbar.convert import programmed
from correctnet.crossbar.layers import analog_layers
from correctnet.devices.base import Variation
from correctnet.engine.engine import Engine, describe
from correctnet.engine.trace import Unsupported
from correctnet.errors import UserError
from correctnet.evaluation import counting
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.methods.compensation import compensate
from correctnet.networks.lenet import lenet5
from correctnet.networks.vgg import vgg16
from correctnet.noise import core, draw, specification

pytestmark = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")

SEED = 11
VARIATION = LogNormalVariation(0.5)


def randomised(model: nn.Module) -> nn.Module:
    """The model with BatchNorms that do something, negative scales included."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def exact(model: nn.Module, analog: nn.Module, x: torch.Tensor, sample: int, first_layer: int = 0) -> torch.Tensor:
    """The digital `model` in float64, each layer's weights multiplied by the factors of the specification."""
    twin = copy.deepcopy(model)
    names = {id(m): n for n, m in analog.named_modules()}
    for layer in analog_layers(analog):
        if layer.layer_index < first_layer:
            continue
        weight = twin.get_submodule(names[id(layer)]).weight
        factor = specification.lognormal(SEED, layer.layer_index, sample, weight.numel(), 0.5, 0.0)
        out, channels, *kernel = weight.shape
        factor = torch.from_numpy(factor).view(out, *kernel, channels).movedim(-1, 1)
        weight.data = weight.data * factor
    with torch.no_grad():
        return twin.double()(x.double())


def check(model: nn.Module, x: torch.Tensor, first_layer: int = 0, samples: tuple[int, ...] = (0, 137)) -> Engine:
    """The engine's error against float64 is at most twice torch's and what sums that long lose by themselves.

    Each product costs up to half a unit in the last place of its sum, in a random direction: n of them, over all layers
    in a row, up to sqrt(n) half units. The engine adds the up to 4608 products of an output of VGG16 one by one; torch
    adds them in blocks, and loses a third of what the engine does.
    """
    model = randomised(model)
    analog = convert(model, VARIATION, SEED)
    products = sum(layer.weight[0].numel() for layer in analog_layers(analog))
    rounding = torch.finfo(torch.float32).eps / 2 * products**0.5
    engine = Engine(analog, x, first_layer)
    found = engine.outputs(x, samples)
    for i, sample in enumerate(samples):
        wanted = exact(model, analog, x, sample, first_layer)
        with torch.no_grad(), programmed(analog, sample, first_layer):
            plain = (analog(x).double() - wanted).abs().max().item()
        error = (found[i].double() - wanted).abs().max().item()
        assert error <= 2 * plain + (rounding + 1e-6) * wanted.abs().max().item()
        assert wanted.abs().max() > 0
    return engine


PAPER = {
    "lenet5": (lambda: lenet5(), (40, 1, 32, 32)),
    "lenet5, compensated": (
        lambda: compensate(lenet5(), {"conv1.layer": 6, "conv2.layer": 8}, init="random"),
        (33, 1, 32, 32),
    ),
    "lenet5, behind ReLU": (
        lambda: compensate(lenet5(), {"conv1.layer": 5}, place="block", pool="kernel", activation="none"),
        (17, 1, 32, 32),
    ),
    "lenet5, linear compensated": (
        lambda: compensate(lenet5(), {"linear1.layer": 3}, init="random"),
        (9, 1, 32, 32),
    ),
    "vgg16": (lambda: vgg16(), (3, 3, 32, 32)),
    "vgg16, BatchNorm behind ReLU": (lambda: vgg16(100, batchnorm="after"), (3, 3, 32, 32)),
    "vgg16 without BatchNorm": (lambda: vgg16(batchnorm="none"), (3, 3, 32, 32)),
    "vgg16, compensated": (
        lambda: compensate(vgg16(), {"conv1.layer": 16, "conv3.layer": 9}, init="random"),
        (3, 3, 32, 32),
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("vgg16, ")) for name in PAPER]
)
def test_networks_of_the_paper_are_fused_whole(name: str) -> None:
    build, shape = PAPER[name]
    torch.manual_seed(0)
    engine = check(build(), inputs(*shape))
    report = engine.report
    assert report.unfused == report.torch == ()
    assert report.plans == 1
    assert len(report.fused) == (5 if "lenet5" in name else 15)


@pytest.mark.parametrize("first_layer", [1, 3, 4, 5])
def test_layers_in_front_of_the_first_varied_one(first_layer: int) -> None:
    engine = check(lenet5(), inputs(70, 1, 32, 32), first_layer)
    shared, sampled, weights = engine.cost
    assert shared > 0
    counts = [150, 2400, 48000, 10080, 840]
    assert weights == sum(counts[first_layer:])
    assert (sampled > 0) == (first_layer < 5)


class Residual(nn.Module):
    """Functions, methods, an in-place addition and a shortcut, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.a = nn.Conv2d(7, 14, (3, 5), padding=(1, 2), groups=7)
        self.b = nn.Conv2d(14, 7, 3, padding="same", dilation=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(7 + 14, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        wide = F.relu(self.a(x))
        out = self.b(wide)
        out += x
        out = self.relu(out)
        both = torch.cat([F.adaptive_avg_pool2d(out, 1), F.avg_pool2d(wide, wide.shape[-1])], dim=1)
        return self.head(both.view(both.size(0), -1))


def test_a_network_of_functions_and_shortcuts_is_fused_whole() -> None:
    engine = check(Residual(), inputs(19, 3, 13, 13))
    assert str(engine.report) == "4 of 4 analog layers fused, in 1 piece"


@pytest.mark.parametrize(
    ("side", "pool", "in_core"),
    [
        (10, nn.MaxPool2d(2, ceil_mode=True), True),
        (11, nn.MaxPool2d(2, ceil_mode=True), True),
        (11, nn.MaxPool2d(3, 2, ceil_mode=True), True),
        (12, nn.MaxPool2d(2, 3, 1, ceil_mode=True), True),  # a fifth window would begin in the padding
        (11, nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), True),
        (11, nn.AvgPool2d(3, 1, 1, count_include_pad=False), True),
        (11, nn.AvgPool2d(2, ceil_mode=True), False),  # torch divides by what is left of the window
        (10, nn.AvgPool2d(2, ceil_mode=True), True),
    ],
)
def test_pools_whose_last_windows_are_cut(side: int, pool: nn.Module, in_core: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pool, nn.Conv2d(4, 4, 3), nn.Flatten())
    engine = check(network, inputs(9, 3, side, side))
    assert engine.report.torch == (() if in_core else ("_1 (AvgPool2d)",))


# As modules, functions and methods, in place and with arguments.
ACTIVATIONS = {
    "ReLU6": nn.ReLU6(inplace=True),
    "Hardtanh": nn.Hardtanh(-0.5, 2.0),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "LeakyReLU that falls": nn.LeakyReLU(-0.5),
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
    "SiLU": nn.SiLU(inplace=True),
    "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU(approximate="tanh"),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Hardswish": nn.Hardswish(),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, max_val=0.75),
    "clamp": lambda x: torch.clamp(x, -0.25, max=1.5),
    "clamp from below": lambda x: x.clamp(min=0.1),
    "clip in place": lambda x: x.clip_(max=0.3),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3, inplace=True),
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": torch.tanh,
    "silu": F.silu,
    "x sigmoid(x)": lambda x: x * torch.sigmoid(1.5 * x),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "numbers": lambda x: 1 - F.relu(2 * x - 0.5) / 3,
}


class Activated(nn.Module):
    """An activation behind a convolution, between BatchNorms, in front of a pool, behind a sum and a linear layer."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.one, self.norm, self.two = nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 9, 3, padding=1)
        self.three, self.four = nn.Linear(81, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.function(self.norm(self.one(x)))
        x = F.max_pool2d(self.function(x + self.two(self.norm(x))), 2)
        return self.four(self.function(self.three(x.flatten(1))))


@pytest.mark.parametrize("isa", core.status().available)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_fused(name: str, isa: str, on_isa) -> None:
    on_isa(isa)
    torch.manual_seed(0)
    engine = check(Activated(ACTIVATIONS[name]), inputs(18, 3, 8, 8))
    assert str(engine.report) == "4 of 4 analog layers fused, in 1 piece"


@pytest.mark.parametrize("isa", core.status().available)
@pytest.mark.parametrize("name", ["ReLU6", "LeakyReLU", "SiLU", "GELU by tanh", "Sigmoid", "Hardswish"])
def test_activations_pass_nan_and_infinity_on_as_torch_does(name: str, isa: str, on_isa) -> None:
    on_isa(isa)
    analog = convert(nn.Sequential(nn.Linear(1, 3, bias=False), ACTIVATIONS[name]), LogNormalVariation(0.0))
    nn.init.ones_(next(analog.parameters()))
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 200.0, -200.0, 0.0, 1e-30, -1e30])[:, None]
    engine = Engine(analog, torch.ones(2, 1))
    with torch.no_grad():
        torch.testing.assert_close(engine.outputs(x, [0])[0], analog(x), equal_nan=True, atol=1e-37, rtol=1e-6)


class Excited(nn.Module):
    """Squeeze-and-excitation with convolutions and with linear layers, as torchvision and as timm write it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.squeeze, self.excite = nn.Conv2d(5, 3, 1), nn.Conv2d(3, 5, 1)
        self.down, self.up = nn.Linear(5, 2), nn.Linear(2, 5)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.stem(x))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(self.pool(x)))))
        x = scale * x
        n, c, _, _ = x.shape
        x = x * F.hardsigmoid(self.up(F.relu(self.down(self.pool(x).view(n, c))))).view(n, c, 1, 1)
        x = x * F.hardsigmoid(self.up(self.down(x.mean((2, 3)))))[:, :, None, None]
        return self.head(self.pool(x).flatten(1))


class Shuffled(nn.Module):
    """Parts of the channels, and channel shuffles by hand and as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 18, 3), nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.Conv2d(5, 9, 1)
        self.shuffle, self.head = nn.ChannelShuffle(3), nn.Linear(18, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.stem(x).chunk(2, dim=1)
        x = torch.cat([a, F.relu(self.one(b))], dim=1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w)
        x = torch.transpose(x, 1, 2).contiguous()
        x = x.view(n, c, h, w)
        left, _, right = torch.split(x, [5, 4, 9], dim=1)
        x = self.shuffle(torch.cat((self.two(left), right), 1))
        x = torch.cat([x[:, 9:], x[:, :9]], 1)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("isa", core.status().available)
@pytest.mark.parametrize(("kind", "layers"), [(Excited, 8), (Shuffled, 4)])
def test_products_and_channels_are_fused(kind: type[nn.Module], layers: int, isa: str, on_isa) -> None:
    on_isa(isa)
    torch.manual_seed(0)
    engine = check(kind(), inputs(21, 3, 9, 7))
    assert len(engine.report.fused) == len(analog_layers(engine._model))
    assert (engine.report.plans, engine.report.torch) == (1, ())


class Tokens(nn.Module):
    """A block of ConvNeXt, then a transformer's layer without attention, and a mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 10, 2, stride=2), nn.Conv2d(10, 10, 7, padding=3, groups=10)
        self.norm, self.one, self.two = nn.LayerNorm(10, eps=1e-6), nn.Linear(10, 13), nn.Linear(13, 10)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 10)[:, None, None])
        self.last_scale = nn.Parameter(torch.linspace(-1, 1, 10))
        self.plain, self.three, self.four = (
            nn.LayerNorm(10, elementwise_affine=False),
            nn.Linear(10, 7),
            nn.Linear(7, 10),
        )
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.two(F.gelu(self.one(y))).permute([0, 3, 1, 2])
        x = x + self.scale * y
        x = F.layer_norm(x.permute(0, 2, 3, 1), (10,), self.norm.weight, self.norm.bias) * self.last_scale
        x = x + self.four(F.gelu(self.three(self.plain(x)), approximate="tanh"))
        return self.head(x.mean((1, 2)))


class OfTokens(nn.Module):
    """The same layers on (N, T, C), from which attention that torch computes returns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return x + self.two(F.gelu(self.one(self.norm(x))))


@pytest.mark.parametrize("isa", core.status().available)
def test_norms_of_groups_are_fused(isa: str, on_isa) -> None:
    on_isa(isa)
    torch.manual_seed(0)
    norms = nn.GroupNorm(3, 9), nn.GroupNorm(1, 9, affine=False), nn.InstanceNorm2d(9, affine=True)
    parts = [part for norm in norms for part in (nn.Conv2d(9, 9, 3, padding=1), norm, nn.ReLU())]
    for norm in norms[::2]:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    engine = check(nn.Sequential(nn.Conv2d(3, 9, 3), *parts, nn.Flatten(), nn.Linear(9 * 48, 4)), inputs(19, 3, 10, 8))
    assert str(engine.report) == "5 of 5 analog layers fused, in 1 piece"


@pytest.mark.filterwarnings("ignore::correctnet.crossbar.layers.CoverageWarning")
@pytest.mark.parametrize("isa", core.status().available)
def test_layers_on_tokens_are_fused(isa: str, on_isa) -> None:
    on_isa(isa)
    torch.manual_seed(0)
    engine = check(Tokens(), inputs(19, 3, 18, 14))
    assert str(engine.report) == "7 of 7 analog layers fused, in 1 piece"
    engine = check(OfTokens(), inputs(19, 5, 6))
    assert (len(engine.report.fused), engine.report.plans) == (2, 1)
    assert engine.outputs(inputs(3, 5, 6), [1]).is_contiguous()


class Asking(nn.Module):
    """Optional arguments, and decisions on shapes and types."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, *more, scale: float = 2.0, **named):
        assert x.shape[1] == 3, "RGB"
        assert x.dtype != torch.int64
        if x.dim() == 3 or len(x.shape) != 4 or x.size(2) % 2:
            x = x[None]
        x = self.one(x)
        if mask is not None:
            x = x * mask
        for _ in range(int(x.shape[2] / 2)):
            x = F.relu(x)
        return self.two(x.mean((2, 3))) * scale


def test_decisions_on_shapes_and_optional_arguments() -> None:
    assert str(check(Asking(), inputs(7, 3, 8, 8)).report) == "2 of 2 analog layers fused, in 1 piece"


class OfTheBatch(nn.Module):
    def __init__(self, ask) -> None:
        super().__init__()
        self.ask, self.layer = ask, nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x if self.ask(x) else -x)


@pytest.mark.parametrize("ask", [lambda x: len(x) == 2, lambda x: x.shape[0] > 2, lambda x: x.max() > 0])
def test_decisions_on_the_number_of_images_or_on_data_are_left_to_torch(ask) -> None:
    with pytest.raises(Unsupported, match=r"torch\.fx cannot trace it"):
        Engine(convert(OfTheBatch(ask), VARIATION), inputs(6, 4))


class OwnConv(nn.Conv2d):
    """A convolution whose forward could be another."""


class Mixed(nn.Module):
    """What no plan can express (Softplus, a subclass, softmax) between what it can."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Softplus(), nn.MaxPool2d(2))
        self.two = OwnConv(8, 8, 3, padding=1)
        self.three = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x))
        y = self.three(x)
        y = y * torch.softmax(y, dim=1)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("first_layer", [0, 1, 2, 4])
def test_what_no_plan_can_express_runs_through_torch(first_layer: int) -> None:
    engine = check(Mixed(), inputs(21, 3, 14, 14), first_layer)
    report = engine.report
    assert report.fused == ("one.0", "three.0", "three.2", "head")
    assert report.unfused == ("two",)
    assert report.plans == 3
    assert {"one_2 (Softplus)", "two (AnalogOwnConv)", "softmax (softmax)", "mul (mul)"} <= set(report.torch)
    assert "unfused: two" in str(report)
    assert str(replace(report, torch=("a (GELU)", "b (mul)", "c (GELU)", "d (GELU)"))).endswith("torch: GELU (3), mul")
    assert str(replace(report, torch=("a (GELU)", "b (mul)"))).endswith("torch: a (GELU), b (mul)")


def test_in_place_functions_do_not_leak_into_the_next_chip() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sin(self.one(x))
            y.mul_(self.two(x))
            z = self.one(y)
            return z + z.relu_()

    check(InPlace(), inputs(9, 6), samples=(0, 1, 2))
    check(InPlace(), inputs(9, 6), first_layer=1, samples=(0, 1, 2))


def test_hooks_are_run() -> None:
    model = lenet5().eval()
    analog = convert(model, VARIATION, SEED)
    analog.conv2.layer.register_forward_hook(lambda module, args, output: output * 2)
    x = inputs(5, 1, 32, 32)
    engine = Engine(analog, x)
    assert engine.report.unfused == ("conv2.layer",)
    with torch.no_grad(), programmed(analog, 4):
        torch.testing.assert_close(engine.outputs(x, [4])[0], analog(x), rtol=1e-4, atol=1e-5)


def test_other_device_models_run_through_torch() -> None:
    class Doubling(Variation):
        def sample(self, weight, seed, layer, sample):
            return weight * (2 if sample else 1)

        def describe(self):
            return {}

    analog = convert(lenet5().eval(), Doubling(), SEED)
    x = inputs(5, 1, 32, 32)
    engine = Engine(analog, x)
    assert len(engine.report.unfused) == 5
    with torch.no_grad(), programmed(analog, 3):
        torch.testing.assert_close(engine.outputs(x, [3])[0], analog(x))


def test_a_network_that_is_one_layer() -> None:
    for layer, x in ((nn.Linear(9, 4), inputs(7, 9)), (nn.Conv2d(3, 5, 3), inputs(7, 3, 8, 8))):
        analog = convert(layer, VARIATION, SEED)
        out = Engine(analog, x).outputs(x, [2])[0]
        with torch.no_grad(), programmed(analog, 2):
            torch.testing.assert_close(out, analog(x))


@pytest.mark.parametrize("isa", core.status().available)
def test_every_instruction_set(isa: str, on_isa) -> None:
    on_isa(isa)
    check(lenet5(), inputs(35, 1, 32, 32))
    check(Residual(), inputs(18, 3, 9, 9))
    for network, x in ((lenet5(), inputs(20, 1, 32, 32)), (Activated(nn.SiLU()), inputs(20, 3, 8, 8))):
        analog = convert(network.eval(), VARIATION, SEED)
        low = Engine(analog, x, precision="bfloat16").outputs(x, [5])[0]
        full = Engine(analog, x).outputs(x, [5])[0]
        assert (low - full).abs().max() <= 0.02 * full.abs().max()
        assert not torch.equal(low, full)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_chip_is_the_same_in_any_company(precision: str, threads) -> None:
    analog = convert(randomised(Residual()), VARIATION, SEED)
    x = inputs(150, 3, 11, 11)
    engine = Engine(analog, x, precision=precision)
    many = engine.outputs(x, range(130, 145))
    assert torch.equal(engine.outputs(x, [137])[0], many[7])
    assert not torch.equal(many[6], many[7])
    for number in (1, 2, 3):
        threads(number)
        assert torch.equal(engine.outputs(x, range(130, 145)), many)
        assert torch.equal(engine.outputs(x, [144, 137]), many[[14, 7]])
    small = Engine(analog, x, precision=precision, memory=engine._whole.plan.bytes(32, 15, threads=3))
    assert small.block(150, 15) < 150
    assert torch.equal(small.outputs(x, range(130, 145)), many)


def test_as_many_weights_are_drawn_as_there_are() -> None:
    x = inputs(64, 1, 32, 32)
    plan = Engine(convert(lenet5(), VARIATION, SEED), x)._whole.plan
    labels = np.zeros(64, np.int64)
    for samples in ([3], list(range(7))):
        _, drawn, _ = plan.count_correct(x.numpy(), labels, seed=1, samples=samples, threads=1)
        assert drawn == len(samples) * 61470
    _, drawn, _ = plan.count_correct(x.numpy(), labels, seed=1, samples=list(range(8)), threads=2)
    assert drawn == 8 * 61470
    vgg = Engine(convert(vgg16(), VARIATION, SEED), inputs(2, 3, 32, 32))._whole.plan
    _, drawn, _ = vgg.count_correct(
        inputs(40, 3, 32, 32).numpy(), labels[:40], seed=1, samples=[0, 1], keep_bytes=64 << 20
    )
    assert drawn == 2 * 14_977_728


def test_memory_is_bounded() -> None:
    x = inputs(2, 3, 32, 32)
    engine = Engine(convert(vgg16(), VARIATION, SEED), x)
    plan = engine._whole.plan
    size = engine.block(10_000, 250)
    assert 16 <= size <= 1024
    assert plan.bytes(size, 250, threads=torch.get_num_threads()) <= 2 << 30
    # Few images take what they need, so that large networks fit.
    few, many = (plan.bytes(n, 1, threads=1, keep_bytes=0) for n in (16, 64))
    assert few < 0.6 * many
    with pytest.raises(UserError, match="more than the 1 MiB allowed"):
        Engine(convert(vgg16(), VARIATION, SEED), x, memory=1 << 20)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_what_cannot_run_at_all_says_why() -> None:
    x = inputs(6, 4)
    analog = convert(Untraceable(), VARIATION, SEED)
    with pytest.raises(Unsupported, match=r"torch\.fx cannot trace it"):
        Engine(analog, x)
    report = describe(analog, x)
    assert report.unfused == ("layer",)
    assert "everything runs through torch" in str(report)
    assert "float32" in describe(convert(nn.Linear(4, 3).double(), VARIATION), x.double()).reason
    with pytest.warns(EngineWarning, match=r"torch\.fx cannot trace it"):
        result = evaluate(analog, (x, torch.zeros(6, dtype=torch.long)), chips=2, progress=False)
    assert len(result.accuracies) == 2


def test_a_misread_network_gives_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    from correctnet.engine import lowering

    monkeypatch.setattr(lowering, "_bias", lambda layer: 1.0)
    with pytest.raises(Unsupported, match="outputs differ from torch's"):
        Engine(convert(lenet5(), VARIATION), inputs(4, 1, 32, 32))


@pytest.mark.parametrize("generation", ["old", "new", "all"])
@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_off_where_float32_is_promised_and_then_as_it_was(generation: str, on: bool) -> None:
    """The switches are there without a GPU, too. In a process of its own: what is set here cannot be taken back."""
    code = f"""
import torch
from correctnet.precision import full_float32
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
if {generation == "old"}:
    matmul.allow_tf32 = cudnn.allow_tf32 = {on}
    now = lambda: (matmul.allow_tf32, cudnn.allow_tf32)
    off, before = (False, False), ({on}, {on})
elif hasattr(cudnn, "conv"):
    if {generation == "new"}:
        matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32" if {on} else "ieee"
    else:
        torch.backends.fp32_precision = "tf32" if {on} else "ieee"
    now = lambda: (matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32")
    off, before = (False, False), ({on}, {on})
else:
    raise SystemExit
assert now() == before, now()
for _ in range(2):
    with full_float32(torch.device("cuda")):
        assert now() == off, now()
    assert now() == before, now()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- through evaluate -----------------------------------------------------------------------------------------------


def labelled(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs(images, 1, 32, 32), torch.arange(images) % 10


class _Residual(nn.Module):
    """Blocks on tokens whose sums are read by the next block's norm, by its attention and by its own sum."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(blocks))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            z = norm(x)
            x = x + (z @ z.transpose(1, 2)).tanh() @ z
            x = x + mlp(x)
        return x


def test_no_layer_is_computed_twice_where_its_value_is_read_twice() -> None:
    torch.manual_seed(0)
    analog, x = convert(_Residual(3).eval(), LogNormalVariation(0.3)), torch.randn(5, 7, 16)
    engine = Engine(analog, x)
    assert engine.report.plans == 3
    shared, sampled, weights = engine.cost
    assert (shared, sampled, weights) == (0, 3 * 7 * 2 * 2 * 16 * 24, 3 * 2 * 16 * 24)
    with programmed(analog, 4), torch.no_grad():
        wanted = analog(x)
    torch.testing.assert_close(engine.outputs(x, [4])[0], wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


class _Called(nn.Module):
    """A convolution before and after a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.before, self.after, self.function = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3), function

    def forward(self, x):
        return self.after(self.function(self.before(x)))


MOVING = {
    **{f"conv {mode}": lambda mode=mode: nn.Conv2d(5, 5, 3, padding=(2, 1), padding_mode=mode)
       for mode in ("reflect", "replicate", "circular")},
    "conv same, even kernel": lambda: nn.Conv2d(5, 5, (4, 2), padding="same"),
    "conv same, reflect": lambda: nn.Conv2d(5, 5, (2, 5), padding="same", padding_mode="reflect"),
    "ZeroPad2d": lambda: nn.ZeroPad2d((1, 0, 2, 3)),
    "ZeroPad2d that cuts": lambda: nn.ZeroPad2d((-1, 2, 0, -2)),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d((2, 1, 0, 3)),
    "ReplicationPad2d": lambda: nn.ReplicationPad2d(2),
    "CircularPad2d": lambda: nn.CircularPad2d((0, 1, 2, 0)),
    "ConstantPad2d": lambda: nn.ConstantPad2d(1, 0.0),
    "Upsample": lambda: nn.Upsample(scale_factor=2),
    "Upsample to a size": lambda: nn.Upsample(size=(13, 9), mode="nearest-exact"),
    "F.pad": lambda: lambda x: F.pad(x, (1, 2, 3, 0)),
    "F.pad reflect": lambda: lambda x: F.pad(x, [1] * 4, mode="reflect"),
    "F.interpolate": lambda: lambda x: F.interpolate(x, size=(x.shape[2] + 3, 11)),
}  # fmt: skip
STILL = {
    "a constant": lambda: nn.ConstantPad2d(1, 0.5),
    "averages": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "F.interpolate bicubic": lambda: lambda x: F.interpolate(x, size=(9, 9), mode="bicubic"),
}


@pytest.mark.parametrize("name", [*MOVING, *STILL])
def test_what_moves_pixels_is_part_of_the_plan(name) -> None:
    torch.manual_seed(0)
    analog = convert(_Called({**MOVING, **STILL}[name]()).eval(), LogNormalVariation(0.3))
    x = torch.randn(19, 3, 8, 7)
    engine = Engine(analog, x)
    assert engine.report.plans == (1 if name in MOVING else 2), engine.report
    for precision, bound in (("float32", 1e-5), ("bfloat16", 0.03)):
        found = Engine(analog, x, precision=precision).outputs(x, [6])[0]
        with programmed(analog, 6), torch.no_grad():
            wanted = analog(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound * wanted.abs().max().item())


@pytest.mark.parametrize("slow", ["engine", "torch"])
def test_the_faster_of_engine_and_torch_is_taken_where_there_are_several_pieces(monkeypatch, slow) -> None:
    torch.manual_seed(0)
    analog = convert(nn.Sequential(_Residual(2), nn.Flatten(), nn.Linear(7 * 16, 3)).eval(), LogNormalVariation(0.3))
    data = torch.randn(40, 7, 16), torch.arange(40) % 3
    chips = round(2 * counting.TURNS / counting.SHARE)  # with fewer, measuring would be a large part of the work
    expected = evaluate(analog, data, chips, progress=False, engine="torch")
    owner, name = {"engine": (Engine, "count"), "torch": (counting, "count")}[slow]
    function, calls = getattr(owner, name), []

    def delayed(*args):
        calls.append(1)
        time.sleep(2 * counting.WORTH if slow == "engine" else 0)
        return function(*args)

    monkeypatch.setattr(owner, name, delayed)
    with pytest.warns(EngineWarning) as caught:
        found = evaluate(analog, data, chips, progress=False)
    (text,) = (str(warning.message) for warning in caught)
    if slow == "engine":
        assert re.fullmatch(
            r"everything runs through torch: torch is faster \([\d.e-]+ s, the core 0\.\d+ s for 40 images on a chip\)",
            text,
        )
        assert len(calls) == 3
        assert found.table.equals(expected.table)
        with pytest.warns(EngineWarning, match="not all of the network runs in the C\\+\\+ core"):
            evaluate(analog, data, chips - 1, progress=False)
    else:
        assert text.startswith("not all of the network runs in the C++ core: 5 of 5 analog layers fused")
        assert not calls, "not worth measuring"


def test_evaluate_counts_what_torch_counts() -> None:
    analog = convert(randomised(lenet5()), VARIATION, SEED)
    data = labelled(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = evaluate(analog, data, chips=12, start=5, progress=False, chunk=5)
    slow = evaluate(analog, data, chips=12, start=5, progress=False, engine="torch")
    # Two classes whose logits agree to the last bits may change places.
    assert (fast.table["correct"] - slow.table["correct"]).abs().max() <= 1
    assert (fast.table["sample"] == slow.table["sample"]).all()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=37)
    again = evaluate(analog, loader, chips=12, start=5, progress=False)
    assert (again.table["correct"] == fast.table["correct"]).all()


def test_an_interrupted_evaluation_loses_at_most_a_chunk(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    analog = convert(randomised(lenet5()), VARIATION, SEED)
    data, save = labelled(50), tmp_path / "chips.csv"
    whole = evaluate(analog, data, chips=20, progress=False)
    evaluated, original = [], Engine.count

    def count(self, images, labels, samples):
        if len(evaluated) + len(samples) > 12:
            raise KeyboardInterrupt
        evaluated.extend(samples)
        return original(self, images, labels, samples)

    monkeypatch.setattr(Engine, "count", count)
    with pytest.raises(KeyboardInterrupt):
        evaluate(analog, data, chips=20, chunk=4, save=save, progress=False)
    monkeypatch.undo()
    assert evaluated == list(range(12))

    def rest(self, images, labels, samples):
        assert min(samples) >= 12, "a chip that was done is done again"
        return original(self, images, labels, samples)

    monkeypatch.setattr(Engine, "count_correct", rest)
    resumed = evaluate(analog, data, chips=20, chunk=4, save=save, progress=False)
    assert resumed.table.equals(whole.table)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e, x: e.outputs(x, []), "no chip samples"),
        (lambda e, x: e.outputs(x, [2**32]), r"\[0, 2\^32\)"),
        (lambda e, x: e.outputs(x, [-1]), r"\[0, 2\^32\)"),
        (lambda e, x: e.outputs(x[:0], [0]), "no images"),
        (lambda e, x: e.count_correct(x, torch.zeros(3), [0]), "4 images and 3 labels"),
        (lambda e, x: e.outputs(x[:, :, :30], [0]), "images"),
        (lambda e, x: Engine(e._model, x, precision="float16"), "precision"),
    ],
)
def test_bad_arguments_are_named(call, words: str) -> None:
    x = inputs(4, 1, 32, 32)
    engine = Engine(convert(lenet5(), VARIATION), x)
    with pytest.raises((UserError, ValueError), match=words):
        call(engine, x)


def test_where_the_system_has_no_more_threads_fewer_do_the_work() -> None:
    code = """
import resource
import numpy as np
from correctnet import _native
plan = _native.Plan("float32", 4, 1, 1)
plan.finish(plan.conv(0, np.ones((3, 1, 1, 4), np.float32), noise=_native.Noise(0, 0.5, 0.0)))
x = np.ones((4, 4, 1, 1), np.float32)
few, _ = plan.outputs(x, seed=0, samples=list(range(1000)), threads=1)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))  # the stacks of 1,000 threads take 8 GiB
many, _ = plan.outputs(x, seed=0, samples=list(range(1000)), threads=1000)
noise = _native.Noise(2, 0.5, 0.0)
factors = np.zeros(1 << 26, np.float32)
_native.lognormal(noise, 1, 3, 0, 1 << 26, factors.ctypes.data, 1000)
print(np.array_equal(few, many), (factors > 0).all())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


numbers = st.integers(-2, 5) | st.sampled_from([2**30, 2**31 - 1, -(2**31)])


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": (2**31 - 1, 1)},
        {"dilation": (2**30, 1), "padding": (2**30, 0)},
        {"padding": (2**31 - 1, 0), "stride": (2**31 - 1, 1)},
    ],
)
def test_no_size_overflows(options: dict[str, tuple[int, int]]) -> None:
    from correctnet import _native

    with pytest.raises(ValueError, match=r"too large|larger than its padded input"):
        _native.Plan("float32", 3, 5, 5).conv(0, np.ones((2, 3, 3, 3), np.float32), **options)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    """The arguments of a convolution, of one group or several, that can be run."""
    groups, channels, outputs, count = (draw(st.integers(1, most)) for most in (3, 2, 3, 20))
    kernel, dilation, spare = draw(pairs), draw(pairs), draw(pairs)
    size = [d * (k - 1) + s for d, k, s in zip(dilation, kernel, spare, strict=True)]
    return {
        "shape": (groups * channels, *size),
        "weight": [groups * outputs, *kernel, channels],
        "stride": draw(pairs),
        "padding": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "dilation": dilation,
        "groups": groups,
        "sigma": draw(st.floats(0, 2)),
        "images": [count, groups * channels, *size],
        "samples": draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3)),
        "threads": draw(st.integers(1, 3)),
    }


# Values of which hardly any fits the others.
ANYTHING = {
    "shape": st.tuples(numbers, numbers, numbers),
    "weight": st.lists(st.integers(0, 4), min_size=1, max_size=5),
    "stride": st.tuples(numbers, numbers),
    "padding": st.tuples(numbers, numbers),
    "dilation": st.tuples(numbers, numbers),
    "groups": numbers,
    "sigma": st.floats(0, 20) | st.floats(allow_nan=True),
    "images": st.lists(st.integers(0, 4), max_size=5),
    "samples": st.lists(st.integers(-1, 3), max_size=3),
    "threads": st.integers(-1, 3),
}
one_change = st.sampled_from(sorted(ANYTHING)).flatmap(lambda name: ANYTHING[name].map(lambda value: {name: value}))


def can_be_run(shape, weight, stride, padding, dilation, groups, sigma, images, samples, threads) -> bool:
    if min(shape) < 1 or len(weight) != 4 or min(weight) < 1 or min(stride + dilation) < 1 or min(padding) < 0:
        return False
    for size, kernel, step, border, gap in zip(shape[1:], weight[1:3], stride, padding, dilation, strict=True):
        padded = size + 2 * border
        if gap * (kernel - 1) + 1 > padded or max(padded + step, kernel * gap) > 2**30:
            return False
    grouped = groups >= 1 and weight[0] % groups == 0 and weight[3] * groups == shape[0]
    in_range = 0 <= sigma * 6.34 * np.log2(np.e) <= 126  # the factors of +-6.34 standard deviations are floats
    count = images[:1] > [0] and images[1:] == list(shape) and len(samples) > 0 and min(samples) >= 0
    return grouped and in_range and count and threads >= 1


@examples(400)
@given(convolutions(), st.just({}) | one_change | st.fixed_dictionaries({}, optional=ANYTHING))
def test_a_plan_runs_what_fits_and_refuses_anything_else(
    fitting: dict[str, object], changes: dict[str, object]
) -> None:
    """None, one or several arguments are replaced; what does not fit raises, and never ends the process."""
    from correctnet import _native

    call = fitting | changes
    weight, images = (np.random.default_rng(0).normal(size=call[name]).astype("f") for name in ("weight", "images"))

    def run() -> np.ndarray:
        plan = _native.Plan("float32", *call["shape"])
        noise = _native.Noise(0, call["sigma"], 0.0)
        geometry = {name: call[name] for name in ("stride", "padding", "dilation", "groups")}
        plan.finish(plan.conv(0, weight, noise=noise, **geometry))
        return plan.outputs(images, seed=9, samples=call["samples"], threads=call["threads"])[0]

    if not can_be_run(**call):
        with pytest.raises((ValueError, TypeError)):
            run()
        return
    for found, chip in zip(run(), call["samples"], strict=True):
        kernel = torch.from_numpy(weight).permute(0, 3, 1, 2)
        factors = draw.noisy_weight(kernel, 9, 0, chip, call["sigma"]).double()
        x = torch.from_numpy(images).double()
        wanted = F.conv2d(x, factors, None, call["stride"], call["padding"], call["dilation"], call["groups"])
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))


@examples(200)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=pairs,
    groups=st.integers(1, 3),
    channels=st.integers(1, 3),
    outputs=st.integers(1, 5),
    count=st.integers(1, 40),
    samples=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    threads=st.integers(1, 3),
    change=st.sampled_from([None, None, None, "channels", "groups", "images", "threads", "samples", "stride"]),
)
def test_a_plan_runs_what_torch_runs_and_refuses_the_rest(
    size, kernel, stride, padding, dilation, groups, channels, outputs, count, samples, threads, change
) -> None:
    """A convolution of sizes that fit but, maybe, for one, and for a kernel that is larger than the image."""
    from correctnet import _native

    weight = torch.randn(groups * outputs, channels, *kernel, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, groups * channels, *size, generator=torch.Generator().manual_seed(1))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    fits = change is None
    given_to_core = dict(geometry)
    if change == "groups":
        given_to_core["groups"] = groups * channels * outputs + 1
    if change == "stride":
        given_to_core["stride"] = (0, 1)
    fits &= all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True))

    def run() -> tuple[np.ndarray, int]:
        plan = _native.Plan("float32", groups * channels + (change == "channels"), *size)
        layer = np.ascontiguousarray(weight.permute(0, 2, 3, 1).numpy())
        plan.finish(plan.conv(0, layer, noise=_native.Noise(3, 0.5, 0.0), **given_to_core))
        images = x.numpy()[:, :, :0] if change == "images" else x.numpy()
        chips = [] if change == "samples" else samples
        return plan.outputs(images, seed=9, samples=chips, threads=0 if change == "threads" else threads)[:2]

    if not fits:
        refusals = "instead of|do not divide|is expected|at least 1|larger than its padded input"
        with pytest.raises(ValueError, match=refusals):
            run()
        return
    out, drawn = run()
    assert drawn >= len(samples) * weight.numel()
    for found, chip in zip(out, samples, strict=True):
        noisy = draw.noisy_weight(weight, 9, 3, chip, 0.5)
        wanted = F.conv2d(x.double(), noisy.double(), **geometry)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))
