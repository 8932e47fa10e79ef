"""Multiplications, against loops over every position and the numbers of known networks."""

import itertools

import pytest
import torch
from torch import nn

from correctnet.crossbar.convert import convert
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.methods.compensation import compensate
from correctnet.methods.costs import digital_multiplications, multiplications
from correctnet.methods.selection import protected_weights
from correctnet.networks.building import build

# Of the fixture `tiny` on images of 8 x 8.
CONV, LINEAR, LAST = 64 * 4 * 9, 64 * 8, 8 * 3


def test_the_tiny_network(tiny):
    x = torch.zeros(5, 1, 8, 8)
    expected = {"0.layer": CONV, "3.layer": LINEAR, "4": LAST}
    assert multiplications(tiny, x) == expected
    assert multiplications(convert(tiny, LogNormalVariation(0.5)), x) == expected
    assert multiplications(tiny, x[:1]) == expected, "for one image, however many are run"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2), (4, 9, 8)),
        (nn.Conv1d(3, 5, 4, stride=3), (3, 20)),
        (nn.Conv3d(2, 3, 2), (2, 4, 5, 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 4)),
        (nn.Linear(7, 5), (6, 7)),
    ],
)
def test_every_weight_is_used_as_often_as_its_gradient_has_terms(layer, shape):
    """With inputs and gradients of 1, the gradient of a weight is the number of its uses (without padding)."""
    layer = layer.double()
    x = torch.ones(1, *shape, dtype=torch.float64)
    padded = getattr(layer, "padding", 0) not in (0, (0,), (0, 0), (0, 0, 0))
    y = layer(x)
    (uses,) = torch.autograd.grad(y.sum(), [layer.weight])
    found = multiplications(nn.Sequential(layer), x)["0"]
    if padded:  # zeros beyond the border are multiplied with, too
        assert found == y[0].numel() * layer.weight[0].numel() > uses.sum()
    else:
        assert found == uses.sum()


def test_lenet_for_cifar10():
    """The numbers of a count by hand: conv1 has 14.7 % of the multiplications and 0.3 % of the weights."""
    network = build("lenet5", classes=10, channels=3, widths=(64, 128, 384, 192), seed=0).eval()
    x = torch.zeros(1, 3, 32, 32)
    conv1, conv2 = 28 * 28 * 64 * 75, 10 * 10 * 128 * 64 * 25
    linear = 128 * 25 * 384 + 384 * 192 + 192 * 10
    assert sum(multiplications(network, x).values()) == conv1 + conv2 + linear
    assert (
        digital_multiplications(network, x, "conv1")
        == conv1 / (conv1 + conv2 + linear)
        == pytest.approx(0.1474, abs=1e-4)
    )
    found = digital_multiplications(network, x, ["conv1", "conv2"])
    assert found == pytest.approx(0.949, abs=1e-3)


def test_compensation_counts(tiny):
    x, total = torch.zeros(2, 1, 8, 8), CONV + LINEAR + LAST
    one = compensate(tiny, {"0.layer": 2})
    own = 64 * (2 * (1 + 4) + 4 * (4 + 2))
    assert digital_multiplications(one, x) == own / total
    both = digital_multiplications(convert(one, LogNormalVariation(0.5)), x, "4")
    assert both == pytest.approx((own + LAST) / total)
    alone = nn.Sequential(nn.Linear(5, 3))
    assert digital_multiplications(compensate(alone[0], {"": 1}), torch.zeros(2, 5)) == (8 + 3 * 4) / 15


def test_protected_weights_count_as_often_as_they_are_used(tiny):
    x, total = torch.zeros(2, 1, 8, 8), CONV + LINEAR + LAST
    masks = protected_weights(tiny, 0.25, "random")
    assert digital_multiplications(tiny, x, masks=masks) == pytest.approx(0.25)
    first = {name: mask & (name == "0.layer") for name, mask in masks.items()}
    assert digital_multiplications(tiny, x, masks=first) == pytest.approx(9 * 64 / total)
    assert digital_multiplications(tiny, x, "0", masks=first) == CONV / total, "no weight counts twice"


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert multiplications(Twice(), torch.zeros(3, 4)) == {"layer": 32}


def test_what_is_not_counted(tiny):
    for module, x in ((nn.LSTM(3, 4), torch.zeros(2, 5, 3)), (nn.GRUCell(3, 4), torch.zeros(2, 3))):
        with pytest.raises(UserError, match=r"those of .* are not counted, only those of convolutions"):
            multiplications(module, x)
    with pytest.raises(UserError, match="the network calls no layer 'x'"):
        digital_multiplications(tiny, torch.zeros(1, 1, 8, 8), masks={"x": torch.ones(1, dtype=torch.bool)})


def test_all_weights_protected_are_all_multiplications(tiny):
    parts = [digital_multiplications(tiny, torch.zeros(1, 1, 8, 8), name) for name in ("0", "3", "4")]
    assert sum(parts) == pytest.approx(1.0)
    assert all(a != b for a, b in itertools.combinations(parts, 2))
