import numpy as np
import pytest
import torch

from correctnet import lipschitz, models
from correctnet.analog import crossbar_layers


def test_lambda_of_the_paper_s_setting():
    # (10) with k = 1, sigma = 0.5, worked out by hand: 1 / (1.13315 + 3 x 0.60390) = 0.33958.
    assert lipschitz.bound(0.5) == pytest.approx(0.33958, abs=5e-6)
    assert lipschitz.bound(0.5, k=2) == pytest.approx(2 * 0.33958, abs=1e-5)
    assert lipschitz.bound(0.0) == 1.0
    # With the mean preserved the factor's mean is 1 and its standard deviation 0.60390 / 1.13315 = 0.53294.
    assert lipschitz.bound(0.5, shift=-0.125) == pytest.approx(1 / (1 + 3 * 0.53294), abs=5e-6)


def literal(weight: np.ndarray, lam: float) -> float:
    """|| W^T W - lambda^2 I ||_F^2 as it is printed, W = (inputs, outputs)."""
    matrix = weight.reshape(weight.shape[0], -1).T
    return float(np.square(matrix.T @ matrix - lam**2 * np.eye(matrix.shape[1])).sum())


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (6, 1, 5, 5), (16, 6, 5, 5), (64, 3, 3, 3)])
def test_penalty_is_the_printed_formula(shape):
    weight = np.random.default_rng(0).normal(size=shape)
    value = lipschitz.penalty([torch.tensor(weight)], 0.34).item()
    assert value == pytest.approx(literal(weight, 0.34), rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (6, 2, 3, 3)])
def test_gradient_is_that_of_the_printed_formula(shape):
    generator = np.random.default_rng(1)
    weight, direction = generator.normal(size=shape), generator.normal(size=shape)
    tensor = torch.tensor(weight, requires_grad=True)
    lipschitz.penalty([tensor], 0.34).backward()
    step = 1e-5
    slope = (literal(weight + step * direction, 0.34) - literal(weight - step * direction, 0.34)) / (2 * step)
    assert (tensor.grad.numpy() * direction).sum() == pytest.approx(slope, rel=1e-4)


def test_one_sided_penalty_counts_only_singular_values_above_lambda():
    singular = [0.1, 0.3, 0.5, 2.0]
    left, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
    right, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 4)))
    weight = torch.tensor(left @ np.diag(singular) @ right.T)
    wanted = sum(max(0, s**2 - 0.34**2) ** 2 for s in singular)
    assert lipschitz.penalty([weight], 0.34, "one-sided").item() == pytest.approx(wanted, rel=1e-4)


def test_penalty_sums_over_layers_and_vanishes_at_its_minimum():
    weights = [torch.randn(3, 4), torch.randn(5, 6)]
    parts = sum(lipschitz.penalty([w], 0.5).item() for w in weights)
    assert lipschitz.penalty(weights, 0.5).item() == pytest.approx(parts, rel=1e-6)
    orthogonal = 0.5 * torch.eye(4)
    assert lipschitz.penalty([orthogonal], 0.5).item() == pytest.approx(0, abs=1e-6)


def test_minimising_it_brings_spectral_norms_to_lambda():
    network = models.build("lenet5", 10, 1, seed=0)
    weights = lipschitz.analog_weights(network)
    optimizer = torch.optim.Adam(weights, lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        lipschitz.penalty(weights, 0.34).backward()
        optimizer.step()
    norms = lipschitz.spectral_norms(network)
    assert len(norms) == 5
    assert all(norm == pytest.approx(0.34, abs=0.03) for norm in norms.values()), norms


def test_spectral_norm_of_a_convolution_is_that_of_its_matrix():
    network = models.build("lenet5", 10, 1, seed=0)
    kernel = network.conv2.layer.weight.detach().numpy().reshape(16, -1).astype(np.float64)
    assert lipschitz.spectral_norms(network)["conv2.layer"] == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-5)


@pytest.mark.parametrize("batchnorm", ["before", "after"])
def test_folded_weights_are_the_matrices_that_the_layers_apply(batchnorm):
    model = models.build("vgg16", classes=10, channels=3, seed=0, batchnorm=batchnorm).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    folded = dict(zip(dict(crossbar_layers(model)), lipschitz.analog_weights(model, True), strict=True))
    plain = dict(zip(folded, lipschitz.analog_weights(model), strict=True))
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
    total = lipschitz.penalty(lipschitz.analog_weights(model, True), 0.34)
    total.backward()
    assert model.conv2.norm.weight.grad.abs().sum() > 0
