import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from correctnet import devices
from correctnet.devices.base import Variation, kernel_noise
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.noise import specification
from correctnet.settings import VariationSettings


def test_moments_of_the_paper_s_setting():
    # exp(0.125) = 1.13315 and sqrt(exp(0.25) - 1) = 0.53294, the lognormal's mean and coefficient of variation.
    paper = LogNormalVariation(0.5)
    assert paper.mean == pytest.approx(1.13315, abs=5e-6)
    assert paper.cv == pytest.approx(0.53294, abs=5e-6)
    assert LogNormalVariation(0.5, "mean").mean == pytest.approx(1.0)
    assert paper.describe() | {"mean": 0, "cv": 0} == {
        "model": "lognormal",
        "on": "weight",
        "sigma": 0.5,
        "centre": "median",
        "resample": "chip",
        "mean": 0,
        "cv": 0,
    }


@pytest.mark.parametrize("centre", ["median", "mean"])
def test_sampled_weights_have_those_moments(centre):
    model = LogNormalVariation(0.5, centre)
    weight = torch.full((1000, 1000), 2.0)
    ratio = model.sample(weight, seed=1, layer=0, sample=0).double() / 2
    error = 5 * model.cv / 1000  # five standard errors of a mean over 10^6
    assert ratio.mean().item() == pytest.approx(model.mean, abs=error)
    assert (ratio.std() / ratio.mean()).item() == pytest.approx(model.cv, abs=0.01)
    theta = ratio.log() - model.shift
    assert theta.mean().item() == pytest.approx(0, abs=5 * 0.5 / 1000)
    assert theta.std().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2e6))


def test_elements_count_out_kh_kw_in():
    model = LogNormalVariation(0.7)
    weight = torch.randn(3, 5, 2, 4)
    varied = model.sample(weight, seed=9, layer=2, sample=11)
    draws = specification.lognormal(9, 2, 11, weight.numel(), 0.7)
    for out, inp, row, column in np.ndindex(3, 5, 2, 4):
        element = ((out * 2 + row) * 4 + column) * 5 + inp
        assert varied[out, inp, row, column] == weight[out, inp, row, column] * draws[element]


def test_a_linear_layer_is_a_convolution_of_one_pixel():
    model = LogNormalVariation(0.5)
    weight = torch.randn(6, 7)
    as_conv = model.sample(weight[:, :, None, None], 1, 2, 3)[:, :, 0, 0]
    assert torch.equal(model.sample(weight, 1, 2, 3), as_conv)


def test_the_sign_of_a_weight_survives_and_zero_stays_zero():
    weight = torch.tensor([[-1.0, 0.0, 2.0]])
    varied = LogNormalVariation(1.0).sample(weight, 0, 0, 0)
    assert torch.equal(varied.sign(), weight.sign())


def test_sigma_zero_is_nominal():
    weight = torch.randn(4, 4)
    assert LogNormalVariation(0.0).sample(weight, 0, 0, 0) is weight


def test_gradient_is_the_factor():
    model = LogNormalVariation(0.5)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    model.sample(weight, 1, 2, 3).sum().backward()
    assert torch.equal(weight.grad, model.sample(torch.ones_like(weight), 1, 2, 3))


def test_bfloat16_weights_see_the_same_chip():
    weight = torch.randn(8, 8).bfloat16()
    model = LogNormalVariation(0.5)
    assert torch.equal(model.sample(weight, 0, 0, 1), model.sample(weight.float(), 0, 0, 1).bfloat16())


@given(st.integers(0, 2**64 - 1), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_an_address_is_a_chip(seed, layer, sample):
    weight = torch.ones(4, 8)
    model = LogNormalVariation(0.5)
    here = model.sample(weight, seed, layer, sample)
    assert torch.equal(here, model.sample(weight, seed, layer, sample))
    for other in ((seed ^ 1, layer, sample), (seed, layer + 1, sample), (seed, layer, sample ^ 1)):
        assert not torch.equal(here, model.sample(weight, *other))


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf, 14.0, 1000, True, "0.5", None])
def test_bad_sigma(sigma):
    with pytest.raises(ValueError, match="sigma"):
        LogNormalVariation(sigma)


def test_bad_centre():
    with pytest.raises(ValueError, match="centre"):
        LogNormalVariation(0.5, "mode")


@pytest.mark.parametrize("centre", ["median", "mean"])
def test_moments_of_the_factor(centre):
    model = LogNormalVariation(0.5, centre)
    mean, deviation = model.factor_moments()
    assert mean == model.mean
    assert deviation == pytest.approx(model.mean * model.cv)


class Gain(Variation):
    """Scales the weights of chip n by 1 + sigma n."""

    def __init__(self, sigma):
        self.sigma = sigma

    @classmethod
    def from_settings(cls, settings):
        return cls(settings.sigma)

    def sample(self, weight, seed, layer, sample):
        return weight * (1 + self.sigma * sample)

    def describe(self):
        return {"model": "gain", "sigma": self.sigma}


def test_devices_are_made_from_settings():
    made = devices.make(VariationSettings(sigma=0.25, centre="mean"))
    assert made == LogNormalVariation(0.25, "mean")
    with pytest.raises(ValidationError, match="memristor"):
        VariationSettings(model="memristor")


def test_a_device_is_one_module_and_one_line(monkeypatch):
    module = ModuleType("correctnet.devices.gain")
    module.Gain = Gain
    monkeypatch.setitem(sys.modules, "correctnet.devices.gain", module)
    monkeypatch.setitem(devices.DEVICES, "gain", "gain:Gain")
    made = devices.make(SimpleNamespace(model="gain", sigma=0.25))
    assert made.sample(torch.ones(1), 0, 0, 3) == 1.75


class Doubled(LogNormalVariation):
    def sample(self, weight, seed, layer, sample):
        return 2 * super().sample(weight, seed, layer, sample)


class Named(LogNormalVariation):
    pass


def test_the_kernels_draw_what_the_device_draws():
    """A subclass that draws in another way must not be drawn by the kernels."""
    assert kernel_noise(LogNormalVariation(0.5, "mean")) == (0.5, -0.125)
    assert kernel_noise(Named(0.5)) == (0.5, 0.0)
    assert kernel_noise(Doubled(0.5)) is None
    assert kernel_noise(object()) is None
    with pytest.raises(NotImplementedError, match="Own"):
        type("Own", (Variation,), {"sample": None, "describe": None})().factor_moments()
