"""Converters in the engine: fused, with the values of torch.

Where all sums are whole numbers both are equal to the bit. Elsewhere a value near the middle of two steps may be
rounded to either of them.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from correctnet import Converters, LogNormalVariation, add_converters, convert, evaluate, program, protect
from correctnet.crossbar.calibration import ClippingWarning, ranges_of
from correctnet.crossbar.layers import analog_layers, analog_names
from correctnet.devices.device import Device
from correctnet.devices.presets import PRESETS
from correctnet.engine.engine import Engine, Unsupported
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.networks.building import build
from correctnet.noise import core

pytestmark = pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")
EIGHT = Converters(8, 8)


@pytest.fixture(params=core.status().available)
def on_isa(request: pytest.FixtureRequest):
    before = core.extension.isa()
    core.extension.select_isa(request.param)
    yield request.param
    core.extension.select_isa(before)


def lenet() -> nn.Module:
    return build("lenet5", classes=10, channels=1, seed=1).eval()


def images(count: int = 20, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(2))


def outputs_of(analog: nn.Module, x: Tensor, sample: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Outputs of the engine, which runs all of the network fused, and of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        engine = Engine(analog, x[:2], **options)
    assert engine.whole, engine.report
    assert not engine.report.unfused
    program(analog, sample, options.get("first_layer", 0))
    with torch.no_grad():
        wanted = analog(x)
    program(analog, None)
    return engine.outputs(x, [sample])[0], wanted


def whole_numbers(kind: str) -> tuple[nn.Module, Tensor]:
    """A network of small whole numbers that no sum of which leaves the range of exact float32."""
    torch.manual_seed(5)
    layers = {
        "conv": [
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, stride=2), nn.Flatten(), nn.Linear(45, 4),
        ],
        "pool": [nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(7 * 16, 4)],
        "depthwise": [nn.Conv2d(3, 3, 3, groups=3), nn.LeakyReLU(0.5), nn.Conv2d(3, 9, 1), nn.Flatten()],
        "padded": [
            nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
            nn.Linear(54, 4, bias=False),
        ],
    }[kind]  # fmt: skip
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return model, torch.randint(-9, 10, (21, 3, 8, 8)).float()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["conv", "pool", "depthwise", "padded"])
@pytest.mark.parametrize("converters", [Converters(5, 6), Converters(dac_bits=4), Converters(adc_bits=6)])
def test_whole_numbers_are_equal_to_the_bit(kind: str, converters: Converters, precision: str, on_isa: str) -> None:
    model, x = whole_numbers(kind)
    analog = convert(model, LogNormalVariation(0.0))
    names = [analog_names(analog)[id(own)] for own in analog_layers(analog)]
    # Steps of 2 for inputs and of 4 for outputs, so that many are halves, and all that remains is even.
    limits = [
        2.0 * (2 ** ((bits or 2) - 1) - 1) * scale
        for bits, scale in ((converters.dac_bits, 1), (converters.adc_bits, 2))
    ]
    add_converters(analog, converters, ranges={name: tuple(limits) for name in names})
    if precision == "bfloat16" and converters.adc_bits is None:
        pytest.skip("sums without an ADC are rounded to bfloat16")
    found, wanted = outputs_of(analog, x, 0, precision=precision)
    assert torch.equal(found, wanted)
    program(analog, None)
    assert not torch.equal(found, analog(x))


@pytest.mark.parametrize("index", range(5))
def test_a_layer_differs_from_torch_by_one_step_at_most(index: int, on_isa: str) -> None:
    plain = [m for m in lenet().modules() if isinstance(m, nn.Conv2d | nn.Linear)][index]
    shape = (plain.in_channels, 9, 9) if isinstance(plain, nn.Conv2d) else (plain.in_features,)
    x = torch.randn(200, *shape, generator=torch.Generator().manual_seed(7))
    analog = convert(nn.Sequential(copy.deepcopy(plain)), Device.preset("pcm-hermes-1").stuck(0.02, 0.01))
    add_converters(analog, EIGHT, x)
    found, wanted = outputs_of(analog, x, 3)
    step = ranges_of(analog)["0"][1] / 127
    error = (found - wanted).abs()
    assert error.max() <= 1.001 * step
    assert (error > 1e-3 * step).float().mean() <= 1e-3


def with_everything(model: nn.Module, preset: str, x: Tensor, converters: Converters = EIGHT) -> nn.Module:
    """A network on devices of which some are stuck, with protected weights and converters."""
    analog = convert(model, Device.preset(preset).stuck(0.01, 0.002))
    masks = {
        analog_names(analog)[id(own)]: own.nominal.abs() > own.nominal.abs().quantile(0.9)
        if own.nominal.numel() < 1 << 20
        else own.nominal > 0.1
        for own in analog_layers(analog)
    }
    protect(analog, masks)
    add_converters(analog, converters, x)
    return analog


@pytest.mark.parametrize("preset", PRESETS)
def test_lenet_runs_fused_with_faults_protection_and_converters(preset: str) -> None:
    x = images()
    analog = with_everything(lenet(), preset, x)
    found, wanted = outputs_of(analog, x, 5)
    bare = copy.deepcopy(analog)
    add_converters(bare, None)
    program(bare, 5)
    with torch.no_grad():
        effect = (wanted - bare(x)).square().mean().sqrt()
    assert (found - wanted).square().mean().sqrt() < 0.2 * effect
    assert (found == found[0]).all(1).sum() == 1  # images differ


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_vgg16_runs_fused_with_faults_protection_and_converters(preset: str) -> None:
    x = images(3, 3)
    model = build("vgg16", classes=10, channels=3, seed=1)
    model(torch.cat([x, images(5, 3)]))  # statistics of BatchNorm
    found, wanted = outputs_of(with_everything(model.eval(), preset, x), x, 5)
    assert (found - wanted).square().mean().sqrt() < 0.1 * wanted.std()


def test_evaluate_agrees_with_torch(blobs, tiny) -> None:
    analog = convert(tiny, LogNormalVariation(0.3))
    add_converters(analog, Converters(6, 6, 1.0), blobs.images[:64] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        warnings.simplefilter("ignore", ClippingWarning)
        fast = evaluate(analog, blobs, chips=6, progress=False)
        slow = evaluate(analog, blobs, chips=6, engine="torch", progress=False)
    assert (fast.table["correct"] - slow.table["correct"]).abs().max() <= 1
    add_converters(analog, Converters(2, 2, 1.0), blobs.images[:64] * 2)
    coarse = evaluate(analog, blobs, chips=6, progress=False)
    assert not np.array_equal(coarse.values, fast.values)


def test_layers_before_the_first_one_have_none() -> None:
    x = images()
    analog = convert(lenet(), LogNormalVariation(0.4))
    add_converters(analog, Converters(3, 3), x)
    for first in (1, 3, 4):
        found, wanted = outputs_of(analog, x, 2, first_layer=first)
        assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_a_value_with_other_readers_is_converted_for_the_layer_alone(on_isa: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return self.second(y) + self.third(y) + y

    torch.manual_seed(1)
    model = Branches().eval()
    x = torch.randn(300, 6)
    analog = convert(model, LogNormalVariation(0.3))
    ranges = add_converters(analog, EIGHT, x)
    ranges["second"] = (ranges["second"][0] / 2, ranges["second"][1])
    add_converters(analog, EIGHT, ranges=ranges)
    found, wanted = outputs_of(analog, x, 1)
    assert ((found - wanted).abs() > 1e-5).float().mean() < 0.02
    assert (found - wanted).abs().max() <= 2.1 * max(limit for _, limit in ranges.values()) / 127


def test_the_core_refuses_converters_that_are_none() -> None:
    for name, bad in (("adc", (-1.0, 3)), ("dac", (0.5, 0)), ("adc", (0.5, 40000)), ("dac", (0.5, 2.5))):
        plan = core.extension.Plan("float32", 1, 1, 1)
        with pytest.raises(ValueError, match="a converter"):
            plan.pointwise(0, core.extension.Pointwise(**{name: bad}))


def test_a_wrong_converter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine compares with torch, and refuses a network whose converters it would get wrong."""
    from correctnet.engine import lowering

    x = images()
    analog = convert(lenet(), LogNormalVariation(0.3))
    add_converters(analog, Converters(5, 5), x)
    Engine(analog, x[:2])
    monkeypatch.setattr(lowering, "_converter", lambda own: (1 / own.step, max(1, own.steps // 4)))
    with pytest.raises(Unsupported, match="with converters the core's outputs differ"):
        Engine(analog, x[:2])


def test_kinds_without_converters_are_named() -> None:
    analog = convert(nn.Sequential(nn.LSTM(4, 3)), LogNormalVariation(0.3))
    with pytest.raises(UserError, match="is a LSTM; linear layers"):
        add_converters(analog, EIGHT, torch.randn(2, 5, 4))
    assert add_converters(analog, None) == {}
