import pytest
import torch

from correctnet import arithmetic
from correctnet.analog import convert, program
from correctnet.errors import UserError
from correctnet.recalibration import recalibrate
from correctnet.variation import LogNormalVariation


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


def test_simulated_statistics_are_the_average_over_chips(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    recalibrate(analog, blobs.images, samples=[4, 9])
    moments = []
    for sample in (4, 9):
        program(analog, sample)
        moments.append(channel_moments(analog[0].layer(blobs.images)))
    torch.testing.assert_close(analog[0].norm.running_mean, (moments[0][0] + moments[1][0]) / 2)
    torch.testing.assert_close(analog[0].norm.running_var, (moments[0][1] + moments[1][1]) / 2)


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
