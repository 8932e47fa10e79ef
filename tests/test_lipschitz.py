import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from correctnet.crossbar.convert import convert, program
from correctnet.crossbar.layers import crossbar_layers
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.methods import suppression
from correctnet.networks.blocks import Block
from correctnet.networks.building import build
from correctnet.networks.lenet import lenet5


def test_lambda_of_the_paper_s_setting():
    # (10) with k = 1, sigma = 0.5, worked out by hand: 1 / (1.13315 + 3 x 0.60390) = 0.33958.
    assert suppression.bound(LogNormalVariation(0.5)) == pytest.approx(0.33958, abs=5e-6)
    assert suppression.bound(LogNormalVariation(0.5), k=2) == pytest.approx(2 * 0.33958, abs=1e-5)
    assert suppression.bound(LogNormalVariation(0.0)) == 1.0
    # With the mean preserved the factor's mean is 1 and its standard deviation 0.60390 / 1.13315 = 0.53294.
    assert suppression.bound(LogNormalVariation(0.5, "mean")) == pytest.approx(1 / (1 + 3 * 0.53294), abs=5e-6)


def literal(matrix: np.ndarray, lam: float) -> float:
    """|| w^T w - lambda^2 I ||_F^2 by its definition, entry by entry."""
    rows, columns = matrix.shape
    total = 0.0
    for j in range(columns):
        for k in range(columns):
            entry = sum(matrix[i, j] * matrix[i, k] for i in range(rows)) - (lam**2 if j == k else 0.0)
            total += entry**2
    return total


def applied(weight: np.ndarray) -> np.ndarray:
    """The matrix (outputs, inputs) that a layer applies to its input, or a convolution to a patch of it: w of w x."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=False)
    if weight.ndim == 4:
        layer = nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:], bias=False)
    layer = layer.double()
    layer.weight.data = torch.tensor(weight)
    units = torch.eye(weight[0].size, dtype=torch.float64).view(-1, *weight.shape[1:])
    with torch.no_grad():
        return layer(units).flatten(1).numpy().T


SHAPES = [(4, 7), (7, 4), (5, 5), (6, 1, 5, 5), (16, 6, 5, 5), (64, 3, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_penalty_is_the_printed_formula_in_either_orientation(shape):
    weight, lam = np.random.default_rng(0).normal(size=shape), 0.34
    w = applied(weight)
    outputs, inputs = w.shape
    value = suppression.penalty([torch.tensor(weight)], lam).item()
    assert value == pytest.approx(literal(w.T, lam), rel=1e-5), "x W, W = w^T"
    paper = literal(w, lam)  # w x
    assert value + lam**4 * (inputs - outputs) == pytest.approx(paper, rel=1e-5)
    # The constant shows where the singular values are those that (11) asks for.
    u, _, v = np.linalg.svd(w, full_matrices=False)
    best = torch.tensor((lam * u @ v).reshape(shape))
    assert suppression.penalty([best], lam).item() == pytest.approx(lam**4 * max(0, outputs - inputs), abs=1e-5)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (6, 2, 3, 3)])
def test_gradient_is_that_of_the_printed_formula_in_either_orientation(shape):
    generator = np.random.default_rng(1)
    weight, direction = generator.normal(size=shape), generator.normal(size=shape)
    tensor = torch.tensor(weight, requires_grad=True)
    suppression.penalty([tensor], 0.34).backward()
    step = 1e-5
    for turn in (lambda w: w, lambda w: w.T):
        up, down = (literal(turn(applied(weight + sign * step * direction)), 0.34) for sign in (1, -1))
        assert (tensor.grad.numpy() * direction).sum() == pytest.approx((up - down) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("form", ["orthogonal", "one-sided"])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(6, 6, 6), (6, 12, 6), (8, 4, 2), (4, 16, 2)])
def test_a_grouped_convolution_is_as_many_layers_as_it_has_groups(channels, outputs, groups, form):
    torch.manual_seed(0)
    grouped = nn.Conv2d(channels, outputs, 3, groups=groups, bias=False)
    parts = [nn.Conv2d(channels // groups, outputs // groups, 3, bias=False) for _ in range(groups)]
    for part, weight in zip(parts, grouped.weight.detach().chunk(groups), strict=True):
        part.weight.data = weight.clone()
    x = torch.randn(2, channels, 5, 5)
    apart = torch.cat([part(piece) for part, piece in zip(parts, x.chunk(groups, 1), strict=True)], 1)
    torch.testing.assert_close(grouped(x), apart)
    whole, split = nn.Sequential(nn.ReLU(), grouped), nn.Sequential(*parts)
    values = [suppression.penalty(suppression.analog_weights(m), 0.34, form) for m in (whole, split)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    sum(values).backward()
    torch.testing.assert_close(grouped.weight.grad, torch.cat([part.weight.grad for part in parts]))
    norms = suppression.spectral_norms(split).values()
    assert suppression.spectral_norms(whole) == {"1": pytest.approx(max(norms), rel=1e-6)}


def test_depthwise_filters_of_norm_one_are_at_the_minimum():
    conv = nn.Conv2d(64, 64, 3, groups=64, bias=False)
    conv.weight.data.fill_(1 / 3)
    model = nn.Sequential(conv)
    assert suppression.spectral_norms(model) == {"0": pytest.approx(1)}
    assert suppression.penalty(suppression.analog_weights(model), 1.0).item() == pytest.approx(0, abs=1e-5)


def test_one_sided_penalty_counts_only_singular_values_above_lambda():
    singular = [0.1, 0.3, 0.5, 2.0]
    left, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
    right, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 4)))
    weight = torch.tensor(left @ np.diag(singular) @ right.T)
    wanted = sum(max(0, s**2 - 0.34**2) ** 2 for s in singular)
    assert suppression.penalty([weight], 0.34, "one-sided").item() == pytest.approx(wanted, rel=1e-4)


def test_penalty_sums_over_layers_and_vanishes_at_its_minimum():
    weights = [torch.randn(3, 4), torch.randn(5, 6)]
    parts = sum(suppression.penalty([w], 0.5).item() for w in weights)
    assert suppression.penalty(weights, 0.5).item() == pytest.approx(parts, rel=1e-6)
    orthogonal = 0.5 * torch.eye(4)
    assert suppression.penalty([orthogonal], 0.5).item() == pytest.approx(0, abs=1e-6)


def test_minimising_it_brings_spectral_norms_to_lambda():
    network = build("lenet5", 10, 1, seed=0)
    weights = suppression.analog_weights(network)
    optimizer = torch.optim.Adam(weights, lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        suppression.penalty(weights, 0.34).backward()
        optimizer.step()
    norms = suppression.spectral_norms(network)
    assert len(norms) == 5
    assert all(norm == pytest.approx(0.34, abs=0.03) for norm in norms.values()), norms


def test_spectral_norm_of_a_convolution_is_that_of_its_matrix():
    network = build("lenet5", 10, 1, seed=0)
    kernel = network.conv2.layer.weight.detach().numpy().reshape(16, -1).astype(np.float64)
    assert suppression.spectral_norms(network)["conv2.layer"] == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-5)


@pytest.mark.parametrize("batchnorm", ["before", "after"])
def test_folded_weights_are_the_matrices_that_the_layers_apply(batchnorm):
    model = build("vgg16", classes=10, channels=3, seed=0, batchnorm=batchnorm).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    folded = dict(zip(dict(crossbar_layers(model)), suppression.analog_weights(model, True), strict=True))
    plain = dict(zip(folded, suppression.analog_weights(model), strict=True))
    assert folded["linear2.layer"] is plain["linear2.layer"]  # without BatchNorm
    for name, shape in {"conv2": (1, 64, 5, 5), "linear1": (1, 512)}.items():
        x = torch.randn(shape, generator=generator)
        block = model.get_submodule(name)
        linear = torch.nn.functional.conv2d(x, folded[f"{name}.layer"], padding=1) if x.dim() == 4 else None
        if linear is None:
            linear = x @ folded[f"{name}.layer"].T
        # A slope through the layer and its BatchNorm, by a difference that their shifts drop out of.
        whole = lambda z, b=block: b.norm(b.layer(z))  # noqa: E731
        torch.testing.assert_close(whole(x) - whole(torch.zeros_like(x)), linear, atol=1e-4, rtol=1e-4)
    total = suppression.penalty(suppression.analog_weights(model, True), 0.34)
    total.backward()
    assert model.conv2.norm.weight.grad.abs().sum() > 0


class Residual(nn.Module):
    """A block of a ResNet: every BatchNorm comes directly after a convolution."""

    def __init__(self, conv_of_shortcut=True):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if conv_of_shortcut else nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + self.downsample(x)).mean((2, 3)))


class Untraceable(Residual):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class ReadTwice(nn.Module):
    """The convolution's own output goes on beside the BatchNorm's."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Shared(nn.Module):
    """One convolution, two BatchNorms; one BatchNorm, two convolutions."""

    def __init__(self, norms, convs):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(convs))

    def forward(self, x):
        for i in range(2):
            x = self.norms[i % len(self.norms)](self.convs[i % len(self.convs)](x))
        return x


def chain(*modules):
    return nn.Sequential(*modules)


C, B = lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.BatchNorm2d(4)


def varied(model):
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and "running_mean" not in name and value.dim() == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (lambda: chain(C(), B()), {"0": "1"}),
        (lambda: chain(C(), B(), nn.ReLU(), C()), {"0": "1"}),
        (lambda: chain(nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8, affine=False)), {"1": "2"}),
        (lambda: chain(chain(C()), B()), {"0.0": "1"}),
        (lambda: chain(Block(C(), B()), C(), B()), {"0.layer": "0.norm", "1": "2"}),
        (lambda: chain(Block(C(), B(), norm_first=False)), {"0.layer": "0.norm"}),
        (Residual, {"conv1": "bn1", "conv2": "bn2", "downsample.0": "downsample.1"}),
        (lambda: Residual(conv_of_shortcut=False), {"conv1": "bn1", "conv2": "bn2"}),
        (Untraceable, {"downsample.0": "downsample.1"}),
        (lambda: Shared(2, 2), {"convs.0": "norms.0", "convs.1": "norms.1"}),
    ],
)
def test_batchnorm_directly_behind_a_layer_is_found_in_any_network(make, folded):
    model = varied(make())
    assert {k: id(v) for k, v in suppression.batchnorms(model).items()} == {
        k: id(model.get_submodule(v)) for k, v in folded.items()
    }
    layers = dict(crossbar_layers(model))
    weights = dict(zip(layers, suppression.analog_weights(model, True), strict=True))
    for name, weight in weights.items():
        weight = weight.flatten(0, 1) if weight.dim() == 5 else weight
        if name not in folded:
            assert torch.equal(weight, layers[name].weight)
            continue
        layer, norm = layers[name], model.get_submodule(folded[name])
        x = torch.randn(2, 256) if weight.dim() == 2 else torch.randn(2, 4, 8, 8)
        wanted = norm(layer(x)) - norm(layer(torch.zeros_like(x)))
        found = (
            F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, None, 1, layer.padding, 1, layer.groups)
        )
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not any("Proxy" in type(v).__name__ for m in model.modules() for v in vars(m).values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: chain(C(), nn.ReLU(), B()),
        lambda: chain(C(), nn.MaxPool2d(2), B(), C()),
        lambda: chain(B(), C()),
        lambda: chain(C(), nn.BatchNorm2d(4, track_running_stats=False)),
        lambda: chain(C(), nn.InstanceNorm2d(4)),
        ReadTwice,
        lambda: Shared(2, 1),
        lambda: Shared(1, 2),
        lambda: build("lenet5", 10, 1),
    ],
)
def test_a_network_without_batchnorm_directly_behind_a_layer_is_refused(make):
    model = make()
    with pytest.raises(UserError, match="no conv or linear layer of the network has a BatchNorm directly after it"):
        suppression.analog_weights(model, True)
    layers = dict(crossbar_layers(model)).values()
    assert all(w is layer.weight for w, layer in zip(suppression.analog_weights(model), layers, strict=True))


@pytest.mark.parametrize("network", [lenet5, lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))])
def test_a_programmed_chip_changes_nothing(network):
    model = network()
    analog = convert(model, LogNormalVariation(0.5))
    program(analog, 3)
    assert suppression.spectral_norms(analog) == suppression.spectral_norms(model)
    for given in (analog, model):
        suppression.penalty(suppression.analog_weights(given), 0.3).backward()
    for (_, a), (_, b) in zip(crossbar_layers(analog), crossbar_layers(model), strict=True):
        torch.testing.assert_close(a.nominal.grad, b.weight.grad)


def test_penalties_that_are_none():
    with pytest.raises(UserError, match="form must be 'orthogonal' or 'one-sided', not 'both'"):
        suppression.penalty([torch.ones(2, 2)], 1.0, form="both")
    with pytest.raises(UserError, match="no conv or linear layer"):
        suppression.penalty(suppression.analog_weights(nn.ReLU()), 1.0)
