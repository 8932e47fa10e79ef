import pytest
import torch
from torch import nn

from correctnet import settings as config
from correctnet.crossbar.layers import crossbar_layers
from correctnet.errors import UserError
from correctnet.methods import compensation
from correctnet.networks import NETWORKS
from correctnet.networks.blocks import parameter_count
from correctnet.networks.building import build
from correctnet.networks.lenet import lenet5
from correctnet.networks.vgg import vgg16


def test_lenet5_has_the_published_number_of_parameters():
    # LeCun's layer sizes with full connections: 61,706 (conv 156 + 2,416, linear 48,120 + 10,164 + 850).
    assert parameter_count(lenet5()) == 156 + 2416 + 48120 + 10164 + 850 == 61706


def test_lenet5_widths_are_parameters():
    network = lenet5(classes=10, channels=3, widths=(32, 64, 256, 128))
    shapes = [tuple(layer.weight.shape) for _, layer in crossbar_layers(network)]
    assert shapes == [(32, 3, 5, 5), (64, 32, 5, 5), (256, 1600), (128, 256), (10, 128)]


@pytest.mark.parametrize(("batchnorm", "norms"), [("before", 14), ("after", 14), ("none", 0)])
def test_vgg16_layers(batchnorm, norms):
    network = vgg16(100, batchnorm=batchnorm)
    layers = [layer for _, layer in crossbar_layers(network)]
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 13 + [nn.Linear] * 2
    found = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(found) == norms
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_vgg16_widths_are_parameters():
    widths = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    shapes = [tuple(layer.weight.shape) for _, layer in crossbar_layers(vgg16(7, widths=widths))]
    assert shapes == [*((o, i, 3, 3) for i, o in zip((3, *widths), widths[:13], strict=False)), (15, 14), (7, 15)]
    section = config.Network(name="vgg16", widths=widths, batchnorm="none", dropout=0.1)
    network = build("vgg16", 7, 3, **NETWORKS["vgg16"].options(section.widths, section.batchnorm, section.dropout))
    assert network.linear1.layer.weight.shape == (15, 14)
    assert [name for name, _ in network.linear1.named_children()] == ["layer", "relu", "dropout"]


@pytest.mark.parametrize("side", [16, 20, 24, 31, 32])
def test_vgg16_takes_smaller_images(side):
    assert vgg16(10).eval()(torch.zeros(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize(("batchnorm", "order"), [("before", ["norm", "relu"]), ("after", ["relu", "norm"])])
def test_vgg16_batchnorm_order(batchnorm, order):
    block = vgg16(10, batchnorm=batchnorm).conv1
    assert [name for name, _ in block.named_children()] == ["layer", *order]


@pytest.mark.parametrize("classes", [10, 100])
def test_vgg16_starts_with_small_logits(classes):
    # Normalised, rectified features have a mean square of 1/2, and the last weights a variance of 1/512.
    network = build("vgg16", classes, 3)
    logits = network(torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert logits.square().mean().sqrt().item() == pytest.approx(0.5**0.5, rel=0.15)


def test_the_paper_s_overhead_of_compensating_vgg16_s_first_six_convolutions():
    # 4.29 % is the paper's figure (Section IV); 645,056 parameters follow from Fig. 5 with S = 1.
    network = vgg16(100)
    filters = compensation.filters_of(network, [1.0] * 6)
    added = sum(p.numel() for p in compensation.compensation_parameters(compensation.compensate(network, filters)))
    assert added == 645056
    assert round(100 * compensation.overhead(network, filters), 2) == 4.29


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = build("lenet5", 10, 1, seed=3)
    before = torch.rand(1)
    torch.manual_seed(5)
    second = build("lenet5", 10, 1, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(before, torch.rand(1)), "building a network must not move torch's global generator"
    third = build("lenet5", 10, 1, seed=4)
    assert not torch.equal(first.conv1.layer.weight, third.conv1.layer.weight)


def test_unknown_network():
    with pytest.raises(UserError, match="unknown network 'resnet'"):
        build("resnet", 10, 3)
