"""Moments of features under variation, against chips that are drawn and closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import succeed
from scipy import integrate, stats
from torch import nn

from correctnet import LogNormalVariation, convert, program
from correctnet.devices.gaussian import GaussianVariation
from correctnet.errors import UserError
from correctnet.methods.moments import (
    KINDS,
    MomentsNetwork,
    linear_moments,
    margin_loss,
    moments_hooks,
    rectified_moments,
)
from correctnet.pipeline.models import read_network
from correctnet.settings import Training
from correctnet.training.loop import fit

DEVICE = LogNormalVariation(0.5)
FACTOR = DEVICE.factor_moments()


def chips(network, x, count=4000):
    analog = convert(network, DEVICE, seed=1).eval()
    outputs = []
    with torch.no_grad():
        for chip in range(count):
            program(analog, chip)
            outputs.append(analog(x).double())
    return torch.stack(outputs)


def test_the_factor_has_the_moments_of_a_lognormal():
    assert pytest.approx((np.exp(0.125), np.sqrt(np.exp(0.5) - np.exp(0.25)))) == FACTOR


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_layer_against_chips(kind):
    torch.manual_seed(0)
    layer = nn.Linear(12, 5) if kind == "linear" else nn.Conv2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(4, 12) if kind == "linear" else torch.randn(4, 2, 5, 5)
    mean, variance = (t.detach().double() for t in linear_moments(layer, (x, torch.zeros_like(x)), FACTOR))
    drawn = chips(nn.Sequential(layer), x)
    error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - mean).abs() < 5 * error + 1e-6).all()
    assert torch.allclose(drawn.var(0), variance, rtol=0.25)
    assert (drawn.var(0) / variance).mean() == pytest.approx(1, abs=0.03)


def test_noisy_inputs_of_a_layer_against_draws():
    """Inputs that vary and weights that vary, both independent."""
    torch.manual_seed(1)
    layer, mean, variance = nn.Linear(6, 3).double(), torch.randn(6).double(), torch.rand(6).double()
    found = linear_moments(layer, (mean, variance), FACTOR)
    generator = torch.Generator().manual_seed(2)
    x = mean + variance.sqrt() * torch.randn(200_000, 6, generator=generator, dtype=torch.float64)
    factors = torch.exp(0.5 * torch.randn(200_000, 3, 6, generator=generator, dtype=torch.float64))
    y = ((layer.weight * factors) * x[:, None]).sum(-1) + layer.bias
    torch.testing.assert_close(found[0], y.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[1], y.var(0), rtol=0.03, atol=0.0)


def test_rectified_gaussians_against_quadrature():
    for mean, sd in ((0.0, 1.0), (1.5, 0.4), (-1.0, 2.0), (-3.0, 1.0), (2.0, 1e-4)):
        at = stats.norm(mean, sd).pdf
        ends = max(0, mean - 12 * sd), max(0, mean) + 12 * sd
        first, second = (integrate.quad(lambda x, k=k, at=at: x**k * at(x), *ends, limit=200)[0] for k in (1, 2))
        found = rectified_moments((torch.tensor(mean, dtype=torch.float64), torch.tensor(sd**2, dtype=torch.float64)))
        assert found[0].item() == pytest.approx(first, abs=1e-7)
        assert found[1].item() == pytest.approx(second - first**2, abs=1e-7)


def test_a_network_of_one_hidden_layer_against_chips():
    """Linear layers have independent weights for each output, so that independence holds up to the last sum."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 3))
    x = torch.randn(2, 10)
    mean, variance = (t.detach().double() for t in MomentsNetwork(net, DEVICE).moments(x))
    drawn = chips(net, x)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0.0, atol=0.02)
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.1, atol=0.0)


def lenet_like():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 4)
    )


def test_without_variation_it_is_the_network():
    net = lenet_like()
    for _ in range(3):
        net.train()(torch.randn(16, 1, 8, 8))
    net.eval()
    x = torch.randn(5, 1, 8, 8)
    mean, variance = MomentsNetwork(net, LogNormalVariation(1e-6)).moments(x)
    torch.testing.assert_close(mean, net(x), rtol=1e-4, atol=1e-4)
    assert variance.max() < 1e-6
    assert torch.equal(MomentsNetwork(net, DEVICE).eval()(x), net(x)), "in evaluation it is the network itself"


def test_max_pooling_takes_the_variance_of_the_largest_mean():
    net = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 1, bias=False))
    own = MomentsNetwork(net, DEVICE)
    mean = torch.tensor([[[[1.0, 4.0], [2.0, 3.0]]]])
    pooled = KINDS[nn.MaxPool2d](net[0], (mean, 10 * mean))
    assert [t.item() for t in pooled] == [4.0, 40.0]
    assert own.varied == {"2"}


def test_digital_layers_do_not_vary():
    net = lenet_like().eval()
    x = torch.randn(3, 1, 8, 8)
    assert MomentsNetwork(net, DEVICE, exclude=["0"]).varied == {"5"}
    _, variance = MomentsNetwork(net, DEVICE, exclude=["0"]).moments(x)
    features = net[:5](x)
    torch.testing.assert_close(variance, FACTOR[1] ** 2 * features.square() @ net[5].weight.square().T)


def test_the_margin_is_that_of_the_last_layer():
    net = lenet_like().eval()
    own = MomentsNetwork(net, DEVICE, "last").train()
    net.eval()
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    mean, deviation = own(x)
    features = net[:5](x)
    torch.testing.assert_close(mean, net(x))
    wanted = (FACTOR[1] ** 2 * (features[:, None] * net[5].weight).square().sum(2)).sqrt()
    torch.testing.assert_close(deviation, wanted)
    rows = []
    for n in range(6):
        moved = [mean[n, c] + (-2.0 if c == y[n] else 2.0) * deviation[n, c] for c in range(4)]
        rows.append(-torch.stack(moved).log_softmax(0)[y[n]])
    torch.testing.assert_close(margin_loss(2.0)((mean, deviation), y), torch.stack(rows).mean())
    torch.testing.assert_close(margin_loss(0.0)((mean, deviation), y), F.cross_entropy(net(x), y))


@pytest.mark.parametrize("layers", ["all", "last"])
def test_a_training_makes_the_loss_on_chips_smaller(layers):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 1.5]) > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    fit(net, (x, y), Training(epochs=20, batch=32, learning_rate=1e-2), 0, quiet=True)

    def loss():
        logits = chips(net, x, 60).float()
        return float(torch.stack([F.cross_entropy(z, y) for z in logits]).mean())

    before = loss()
    own = MomentsNetwork(net, LogNormalVariation(0.5), layers)
    section = Training(epochs=20, batch=32, learning_rate=5e-3)
    fit(own, (x, y), section, 0, hooks=moments_hooks(layers, 1.0), quiet=True)
    assert loss() < before


def test_mistakes():
    class Other(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(UserError, match=r"those of 1 \(Other\) are not known"):
        MomentsNetwork(nn.Sequential(nn.Linear(2, 2), Other()), DEVICE)
    with pytest.raises(UserError, match="no layer varies"):
        MomentsNetwork(nn.Sequential(nn.Linear(2, 2)), DEVICE, exclude=["0"])

    class Additive(GaussianVariation):
        def moments(self, weight):
            return weight, torch.ones_like(weight)

        def describe(self):
            return {}

    with pytest.raises(UserError, match="a device of factors is expected"):
        MomentsNetwork(nn.Sequential(nn.Linear(2, 2)), Additive())


@pytest.mark.parametrize("layers", ["all", "last"])
def test_the_stage_writes_the_network_alone(layers, tmp_path):
    fast = ["--quiet", "--threads", 1, "--batch", 256, "--epochs", 1]
    succeed("pretrain", *fast, "--out", tmp_path / "p")
    for name in ("m", "again"):
        succeed("moments", *fast, "--layers", layers, "--pretrained", tmp_path / "p", "--out", tmp_path / name)
    before, after, again = (read_network(tmp_path / name)[0].state_dict() for name in ("p", "m", "again"))
    assert set(before) == set(after)
    assert all(not torch.equal(before[name], value) for name, value in after.items() if name.endswith("weight"))
    assert all(torch.equal(again[name], value) for name, value in after.items()), "draws follow from the seed"
    _, description = read_network(tmp_path / "m")
    assert [step["stage"] for step in description["history"]] == ["pretrain", "moments"]
