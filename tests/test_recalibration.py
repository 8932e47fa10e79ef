import numpy as np
import pytest
import torch
from torch import nn

from correctnet import precision as arithmetic
from correctnet.crossbar.convert import convert, program, programmed
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.methods.recalibration import recalibrate


def channel_moments(y):
    flat = y.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1)


def test_statistics_are_those_of_the_chip(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    program(analog, 3)
    recalibrate(analog, blobs.images)
    mean, variance = channel_moments(analog[0].layer(blobs.images))
    torch.testing.assert_close(analog[0].norm.running_mean, mean)
    torch.testing.assert_close(analog[0].norm.running_var, variance)
    assert not analog[0].norm.training
    assert analog[0].norm.momentum == tiny[0].norm.momentum


def test_simulated_statistics_are_those_of_all_chips_together(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    recalibrate(analog, blobs.images, samples=[4, 9])
    outputs = []
    for sample in (4, 9):
        program(analog, sample)
        outputs.append(analog[0].layer(blobs.images))
    mean, variance = channel_moments(torch.cat(outputs))
    torch.testing.assert_close(analog[0].norm.running_mean, mean)
    torch.testing.assert_close(analog[0].norm.running_var, variance)
    within = (channel_moments(outputs[0])[1] + channel_moments(outputs[1])[1]) / 2
    assert not torch.allclose(variance, within, rtol=1e-5, atol=0), "chips differ in their means, too"


def deep():
    """Three BatchNorms, the one that is registered first called last."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.BatchNorm1d(5)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.5)
            self.middle = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6))
            self.linear = nn.Linear(6, 5)
            self.unused = nn.BatchNorm1d(7)

        def forward(self, x):
            return self.last(self.linear(self.middle(self.drop(self.norm(self.conv(x)))).mean((2, 3))))

    torch.manual_seed(0)
    return convert(Deep(), LogNormalVariation(0.7))


def test_every_batchnorm_normalises_what_it_is_given_in_use(blobs):
    """Also a deep one, whose input has passed those before it as they are when the network is used."""
    analog = deep().eval()
    recalibrate(analog, blobs.images, samples=[3, 8, 11])
    inputs = {analog.norm: [], analog.middle[2]: [], analog.last: []}
    for norm, seen in inputs.items():
        norm.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
    with torch.no_grad():
        for sample in (3, 8, 11):
            with programmed(analog, sample):
                analog(blobs.images)
    for norm, seen in inputs.items():
        mean, variance = channel_moments(torch.cat(seen))
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=2e-5, rtol=0)
        torch.testing.assert_close(variance, norm.running_var / (norm.running_var + norm.eps), atol=2e-5, rtol=0)
    assert torch.equal(analog.unused.running_var, torch.ones(7)), "what is never called keeps what it has"


@pytest.mark.parametrize("samples", [None, [3, 8]])
def test_recalibration_leaves_modes_generators_and_images(blobs, samples):
    analog, images = deep().train(), blobs.images.clone()
    analog.norm.eval()
    modes, momenta = [m.training for m in analog.modules()], [0.1, 0.1, 0.1, 0.1]
    program(analog, 3)
    before = torch.get_rng_state()
    recalibrate(analog, images, samples)
    assert torch.equal(torch.get_rng_state(), before), "layers of dropout do not drop"
    assert torch.equal(images, blobs.images)
    assert [m.training for m in analog.modules()] == modes
    assert [m.momentum for m in analog.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == momenta
    assert not any(len(m._forward_pre_hooks) for m in analog.modules())
    with pytest.raises(UserError, match="cannot run on images of shape"):
        recalibrate(analog, torch.zeros(2, 7), samples)
    assert [m.training for m in analog.modules()] == modes


def test_a_batchnorm_in_two_places_has_no_statistics_of_all_chips(blobs):
    norm = nn.BatchNorm2d(4)
    analog = convert(nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Conv2d(4, 4, 3), norm), LogNormalVariation(0.5))
    with pytest.raises(UserError, match="BatchNorm 1 is called more than once"):
        recalibrate(analog, blobs.images, samples=[1])
    with pytest.raises(UserError, match="no chip samples"):
        recalibrate(analog, blobs.images, samples=[])


def test_bfloat16_products_and_float32_statistics(tiny, blobs, monkeypatch):
    monkeypatch.setattr(arithmetic, "_has_bfloat16", lambda kind: True)  # emulated where it is not
    exact, rounded = (convert(tiny, LogNormalVariation(0.5)) for _ in range(2))
    for analog, precision in ((exact, "float32"), (rounded, "bfloat16")):
        program(analog, 3)
        recalibrate(analog, blobs.images, precision=precision)
    a, b = exact[0].norm.running_var, rounded[0].norm.running_var
    assert b.dtype == torch.float32
    assert 0 < ((a - b).abs() / a).max() < 2**-6


def test_a_network_without_batchnorm(lenet):
    with pytest.raises(UserError, match="no BatchNorm"):
        recalibrate(convert(lenet, LogNormalVariation(0.5)), torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize(
    ("images", "samples", "message"),
    [
        (lambda x: x[:0], None, "a tensor of images is expected, at least one"),
        (lambda x: (x, x), None, "a tensor of images is expected"),
        (lambda x: x.repeat(1, 2, 1, 1), None, "cannot run on images of shape"),
        (lambda x: x.repeat(1, 2, 1, 1), [0], "cannot run on images of shape"),
        (lambda x: x, 3, "samples are numbers of chips"),
        (lambda x: x, [], "no chip samples"),
        (lambda x: x, [0, -1], "a sample lies in"),
    ],
)
def test_what_cannot_be_recalibrated_is_left_as_it_was(tiny, blobs, images, samples, message):
    analog = convert(tiny, LogNormalVariation(0.5)).train()
    before = {name: value.clone() for name, value in analog.state_dict().items()}
    with pytest.raises(UserError, match=message):
        recalibrate(analog, images(blobs.images), samples)
    assert all(torch.equal(value, before[name]) for name, value in analog.state_dict().items())
    assert all(m.training for m in analog.modules())


def test_chips_as_an_array(tiny, blobs):
    found = convert(tiny, LogNormalVariation(0.5)), convert(tiny, LogNormalVariation(0.5))
    for analog, samples in zip(found, (range(3), np.arange(3)), strict=True):
        recalibrate(analog, blobs.images, samples)
    for a, b in zip(*(m.state_dict().values() for m in found), strict=True):
        assert torch.equal(a, b)
