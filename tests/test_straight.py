"""Straight-through gradients: the chips of another device, and the gradient of the identity."""

import pytest
import torch
from by_hand import succeed
from torch import nn

from correctnet.crossbar.convert import convert, program
from correctnet.crossbar.protection import protect
from correctnet.devices.device import Device
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.devices.straight import Straight, with_gradient
from correctnet.files import storage
from correctnet.methods.distillation import distil

DEVICE = LogNormalVariation(0.5)


@pytest.mark.parametrize("device", [DEVICE, Device.preset("pcm-hermes-1")])
def test_the_same_chips_and_the_gradient_of_the_identity(device):
    torch.manual_seed(0)
    weight = torch.randn(5, 7, requires_grad=True)
    drawn, straight = device.sample(weight, 3, 1, 9), Straight(device).sample(weight, 3, 1, 9)
    assert torch.equal(straight, drawn)
    factor = torch.randn(5, 7)
    (found,) = torch.autograd.grad((factor * straight).sum(), weight)
    assert torch.equal(found, factor)
    assert with_gradient(device, "through") is device
    assert with_gradient(device, "straight").describe() == {**device.describe(), "gradient": "straight"}


def test_the_gradient_through_the_variation_has_its_factor():
    """For w e^theta the two gradients differ by e^theta, element by element."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4, bias=False), torch.randn(3, 6)
    gradients = {}
    for gradient in ("through", "straight"):
        analog = convert(nn.Sequential(layer), with_gradient(DEVICE, gradient))
        program(analog, 2)
        out = analog(x)
        (gradients[gradient],) = torch.autograd.grad(out.square().sum(), list(analog.parameters()))
        factor = analog[0].chip_weight().detach() / layer.weight.detach()
    torch.testing.assert_close(gradients["through"], factor * gradients["straight"])
    assert (factor - 1).abs().max() > 0.3


def test_protected_weights_with_it():
    analog = convert(nn.Sequential(nn.Linear(4, 3)), Straight(DEVICE))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0] = True
    protect(analog, {"0": mask})
    program(analog, 1)
    weight = analog[0].chip_weight()
    assert torch.equal(weight == analog[0].nominal, mask)
    (gradient,) = torch.autograd.grad(weight.sum(), [analog[0].nominal])
    assert torch.equal(gradient, torch.ones(3, 4))


def test_trainings_with_it(tiny, blobs, tmp_path):
    how = {"epochs": 1, "batch": 50, "progress": False}
    found = [distil(tiny, blobs, DEVICE, gradient=gradient, **how)[4].weight for gradient in ("through", "straight")]
    assert not torch.equal(*found)
    train = ["--quiet", "--threads", 1, "--epochs", 1, "--batch", 64]
    succeed("pretrain", *train, "--out", tmp_path / "p")
    weights = []
    for gradient in ("through", "straight"):
        out = tmp_path / gradient
        succeed("inject", *train, "--gradient", gradient, "--pretrained", tmp_path / "p", "--out", out)
        tensors, description = storage.read_model(out)
        weights.append(tensors["conv1.layer.weight"])
        settings = description["history"][-1]["settings"]["inject"]
        assert settings.get("gradient") == ("straight" if gradient == "straight" else None), "as before by default"
    assert not torch.equal(*weights)
