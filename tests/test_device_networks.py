"""Networks on devices of which moments are known: the engine runs them fused, with the chips of torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from correctnet import LogNormalVariation, convert, evaluate, program, protect
from correctnet.crossbar.layers import analog_layers
from correctnet.devices.base import Variation
from correctnet.devices.device import Device, Gain
from correctnet.devices.presets import PRESETS
from correctnet.engine.engine import Engine, describe
from correctnet.errors import UserError
from correctnet.evaluation.coverage import check_coverage
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.networks.building import build

VARIANTS = {
    "plain": {},
    "faults": {"stuck": (0.02, 0.01)},
    "two-sided": {"cell": "two-sided", "stuck": (0.02, 0.01)},
    "offset": {"cell": "offset", "stuck": (0.02, 0.01)},
    "clipped": {"clip_rms": 2.5, "scale": "output", "levels": 16},
    "centred": {"centre": "mean"},
    "gains": {"gain": Gain(0.05, 0.02)},
}


def device(name: str = "rram-wan-2022", **options: Any) -> Device:
    stuck = options.pop("stuck", (0.0, 0.0))
    return Device.preset(name, **options).stuck(*stuck)


def lenet() -> nn.Module:
    return build("lenet5", classes=10, channels=1, seed=1).eval()


def images(count: int = 20, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(2))


def same_as_torch(analog: nn.Module, x: Tensor, samples: tuple[int, ...] = (0, 137)) -> None:
    """The engine's outputs are those of torch with the same chip, to rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        engine = Engine(analog, x[:2])
    assert engine.whole, engine.report
    assert not engine.report.unfused
    found = engine.outputs(x, samples)
    for outputs, sample in zip(found, samples, strict=True):
        program(analog, sample)
        with torch.no_grad():
            wanted = analog(x)
        program(analog, None)
        assert (outputs - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", PRESETS)
def test_lenet_runs_fused_on_every_preset(name):
    same_as_torch(convert(lenet(), device(name)), images())


@pytest.mark.parametrize("variant", VARIANTS)
def test_lenet_runs_fused_in_every_cell(variant):
    same_as_torch(convert(lenet(), device(**VARIANTS[variant])), images())


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_vgg16_runs_fused_on_every_preset(name):
    model = build("vgg16", classes=10, channels=3, seed=1).eval()
    same_as_torch(convert(model, device(name, stuck=(0.01, 0.002))), images(3, 3), (5,))


def test_evaluate_does_not_warn_and_agrees_with_torch(blobs, tiny):
    analog = convert(tiny, device(stuck=(0.05, 0.01)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = evaluate(analog, blobs, chips=6, progress=False)
        slow = evaluate(analog, blobs, chips=6, engine="torch", progress=False)
    assert (fast.table["correct"] - slow.table["correct"]).abs().max() <= 1
    assert fast.table["device"].str.contains("rram-wan-2022").all()


def test_coverage_reaches_the_weights_of_a_device(tiny):
    found = check_coverage(tiny, convert(tiny, device()), torch.randn(4, 1, 8, 8))
    assert len(found) == 3


@pytest.mark.parametrize("inner", [LogNormalVariation(0.5), device(stuck=(0.1, 0.1))])
def test_protected_weights_in_the_engine(inner):
    """With all weights protected every chip is nominal; with some, chips are those of torch, and differ."""
    model = lenet()
    analog = convert(model, inner)
    weights = {name: m.nominal for name, m in analog.named_modules() if m in analog_layers(analog)}
    protect(analog, {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})
    x = images()
    found = Engine(analog, x[:2]).outputs(x, (0, 1))
    with torch.no_grad():
        wanted = model(x)
    assert torch.equal(found[0], found[1])
    assert (found[0] - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    protect(analog, {name: w.abs() > w.abs().median() for name, w in weights.items()})
    same_as_torch(analog, x)
    protect(analog, {"conv1.layer": weights["conv1.layer"].abs() > 0.1})
    same_as_torch(analog, x)
    protect(analog, {})
    assert all(layer.variation is inner for layer in analog_layers(analog))


def test_protection_in_training():
    """A step on a chip: protected weights have the gradient of nominal ones, with their nominal values in the loss."""
    layer = nn.Linear(6, 4, bias=False)
    analog = convert(nn.Sequential(layer), device())
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, ::2] = True
    protect(analog, {"0": mask})
    program(analog, 3)
    x = torch.zeros(1, 6)
    x[0, ::2] = torch.tensor([1.0, 2.0, 3.0])  # only protected weights are read
    out = analog(x)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    assert torch.equal(analog[0].nominal.grad[:, ::2], x[0, ::2].expand(4, 3))


def test_masks_are_checked_by_name():
    analog = convert(lenet(), device())
    with pytest.raises(UserError, match=r"no analog layer 'conv7'; it has conv1\.layer"):
        protect(analog, {"conv7": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(UserError, match="but the layer's weight"):
        protect(analog, {"conv1.layer": torch.ones(6, 1, 3, 3, dtype=torch.bool)})
    assert all(isinstance(layer.variation, Device) for layer in analog_layers(analog))  # nothing was changed
    with pytest.raises(UserError, match="convert"):
        protect(lenet(), {})


@dataclass(frozen=True)
class Own(Variation):
    """A user's device with `sample` alone: whole chips that are weaker or stronger."""

    deviation: float = 0.1

    def sample(self, weight: Tensor, seed: int, layer: int, sample: int) -> Tensor:
        return weight * (1 + self.deviation * np.random.default_rng((seed, layer, sample)).normal())

    def describe(self) -> dict[str, Any]:
        return {"model": "own", "deviation": self.deviation}


def test_a_device_with_sample_alone_runs_through_torch_and_says_so(blobs, tiny):
    analog = convert(tiny, Own())
    with pytest.warns(EngineWarning, match="torch"):
        result = evaluate(analog, blobs, chips=3, progress=False)
    assert result.table["accuracy"].between(0, 1).all()
    report = describe(analog, torch.randn(2, 1, 8, 8))
    assert (len(report.fused), len(report.unfused)) == (0, 3)


def test_several_chips_share_a_batch(tiny):
    analog, x = convert(tiny, device(stuck=(0.05, 0))), torch.randn(6, 1, 8, 8)
    program(analog, [4, 9])
    with torch.no_grad():
        both = analog(x)
        for part, sample in ((slice(0, 3), 4), (slice(3, 6), 9)):
            program(analog, sample)
            torch.testing.assert_close(both[part], analog(x[part]), rtol=1e-5, atol=1e-6)


def test_training_under_a_device_lowers_the_loss(blobs, tiny):
    analog = convert(tiny, device("pcm-nandakumar-2019", clip_rms=2.5)).train()
    optimizer = torch.optim.Adam(analog.parameters(), lr=0.01)
    losses = []
    for step in range(40):
        program(analog, step)
        loss = nn.functional.cross_entropy(analog(blobs.images), blobs.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
