"""Calibration of each chip: its least squares against other solvers, and what it recovers."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import correctnet
from correctnet import LogNormalVariation, convert, evaluate, program
from correctnet.errors import UserError
from correctnet.methods.calibration import add_calibration, calibrate, calibration_share, least_gain, low_rank
from correctnet.networks.building import build
from correctnet.pipeline import stages
from correctnet.pipeline.runtime import Runtime
from correctnet.settings import Calibrate, Settings

F64 = torch.float64


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_gains_are_the_least_squares_of_each_output():
    y, wanted = numbers(50, 3), numbers(50, 3, seed=1)
    found = least_gain(y, wanted)
    for k in range(3):
        exact, *_ = np.linalg.lstsq(y[:, k : k + 1].numpy(), wanted[:, k].numpy(), rcond=None)
        assert found[k].item() == pytest.approx(exact[0], rel=1e-12)
    assert least_gain(torch.zeros(4, 2, dtype=F64), wanted[:4, :2]).tolist() == [1, 1]


@pytest.mark.parametrize(("rows", "inputs"), [(60, 7), (5, 9)])
def test_of_full_rank_it_is_the_least_squares_solution_of_least_norm(rows, inputs):
    x, wanted = numbers(rows, inputs), numbers(rows, 4, seed=1)
    a, b = low_rank(x, wanted, 4)
    exact, *_ = np.linalg.lstsq(x.numpy(), wanted.numpy(), rcond=None)
    np.testing.assert_allclose((b @ a).T.numpy(), exact, atol=1e-10)


def test_with_a_ridge_it_solves_the_normal_equations():
    x, wanted, ridge = numbers(30, 6), numbers(30, 4, seed=1), 0.02
    a, b = low_rank(x, wanted, 4, ridge)
    penalty = ridge * x.square().sum() * torch.eye(6, dtype=F64)
    exact = torch.linalg.solve(x.T @ x + penalty, x.T @ wanted)
    torch.testing.assert_close((b @ a).T, exact, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("rank", [1, 2])
def test_no_other_matrices_of_the_rank_are_better(rank, ridge):
    """Against an optimiser on the factors, from several starts."""
    x, wanted = numbers(25, 4) * torch.tensor([3.0, 1.0, 0.3, 1.0], dtype=F64), numbers(25, 3, seed=1)

    def objective(a, b):
        product = b @ a
        return float((wanted - x @ product.T).square().sum() + ridge * x.square().sum() * product.square().sum())

    def flat(values):
        own = torch.from_numpy(values)
        a = own[: 4 * rank].view(rank, 4).requires_grad_()
        b = own[4 * rank :].view(3, rank).requires_grad_()
        product = b @ a
        value = (wanted - x @ product.T).square().sum() + ridge * x.square().sum() * product.square().sum()
        slopes = torch.autograd.grad(value, (a, b))
        return float(value.detach()), torch.cat([s.flatten() for s in slopes]).numpy()

    best = min(minimize(flat, numbers(7 * rank, seed=s).numpy(), jac=True, tol=1e-14).fun for s in range(8))
    assert objective(*low_rank(x, wanted, rank, ridge)) == pytest.approx(best, rel=1e-8)


def test_ranks_beyond_those_there_can_be_are_zeros():
    a, b = low_rank(numbers(20, 3), numbers(20, 2, seed=1), 5)
    assert (a.shape, b.shape) == ((5, 3), (2, 5))
    assert not a[2:].any()
    assert not b[:, 2:].any()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


def pictures(n, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_not_calibrated_it_is_the_network_on_the_same_chips():
    net, x = network(), pictures(6)
    own = add_calibration(net, 2)
    assert torch.equal(own(x), net(x))
    analog, with_it = (convert(m, LogNormalVariation(0.5), 3) for m in (net, own))
    for each in (analog, with_it):
        program(each.eval(), 5)
    assert torch.equal(with_it(x), analog(x))


def test_of_full_rank_every_chip_computes_what_the_clean_network_does():
    """W + (W0 - W) = W0: with as many images as inputs, without a ridge, nothing is left of the variation."""
    net = network().double()
    analog = convert(add_calibration(net, 64), LogNormalVariation(0.5), 3)
    program(analog.eval(), 5)
    x = pictures(200).double()
    assert (analog(x) - net(x)).abs().max() > 0.05
    calibrate(analog, x, ridge=0.0)
    other = pictures(50, seed=1).double()
    torch.testing.assert_close(analog(other), net(other), atol=1e-8, rtol=1e-6)


def test_the_first_layer_solves_its_own_least_squares():
    """Rank 0 and then 1 of a convolution, from numpy's solution with the columns that torch unfolds."""
    net, x = network().double(), pictures(10).double()
    analog = convert(add_calibration(net, 1), LogNormalVariation(0.5), 3)
    program(analog.eval(), 5)
    bias = net[0].bias.detach().numpy()
    y = analog[0].original(x).movedim(1, -1).reshape(-1, 4).detach().numpy() - bias
    wanted = net[0](x).movedim(1, -1).reshape(-1, 4).detach().numpy() - bias
    calibrate(analog, x, ridge=0.0)
    gain = (y * wanted).sum(0) / (y * y).sum(0)
    np.testing.assert_allclose(analog[0].gain.flatten().numpy(), gain, rtol=1e-9)
    columns = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 9).numpy()
    residual = wanted - gain * y
    fitted = columns @ np.linalg.lstsq(columns, residual, rcond=None)[0]
    u, s, vt = np.linalg.svd(fitted, full_matrices=False)
    found = analog[0].path(x).movedim(1, -1).reshape(-1, 4).detach().numpy()
    np.testing.assert_allclose(found, s[0] * np.outer(u[:, 0], vt[0]), atol=1e-9)


def test_each_chip_is_calibrated_anew_and_recovers():
    net = network()
    x = pictures(300, seed=2)
    labels = net(x).argmax(1)  # the clean network is always right
    analog = convert(add_calibration(net, 2), LogNormalVariation(0.6), 3)
    before = {name: value.clone() for name, value in analog.state_dict().items()}

    def prepare(chip):
        calibrate(chip, pictures(10, seed=4))

    plain = evaluate(analog, (x, labels), chips=12, engine="torch", progress=False)
    found = evaluate(analog, (x, labels), chips=12, engine="torch", prepare=prepare, progress=False)
    assert found.mean > plain.mean + 0.02
    assert all(torch.equal(value, before[name]) for name, value in analog.state_dict().items())
    last = evaluate(analog, (x, labels), chips=1, start=11, engine="torch", prepare=prepare, progress=False)
    assert last.table["correct"].iloc[0] == found.table["correct"].iloc[11], "whatever chips came before"


def test_overhead():
    """Of LeNet-5 with the widths of the CIFAR-10 pair, 6,229 weights a rank and a gain for each of 778 outputs."""
    net = build("lenet5", classes=10, channels=3, widths=(64, 128, 384, 192))
    total = sum(p.numel() for p in net.parameters())
    assert calibration_share(add_calibration(net, 0)) == pytest.approx(778 / total)
    assert calibration_share(add_calibration(net, 2)) == pytest.approx((778 + 2 * 6229) / total)


def test_mistakes():
    net, x = network(), pictures(4)
    analog = convert(add_calibration(net, 1), LogNormalVariation(0.5))
    with pytest.raises(UserError, match="one chip is calibrated"):
        calibrate(analog, x)
    program(analog, 1)
    with pytest.raises(UserError, match="ridge is at least 0"):
        calibrate(analog, x, ridge=-1.0)
    plain = convert(net, LogNormalVariation(0.5))
    program(plain, 1)
    with pytest.raises(UserError, match="no layer can be calibrated"):
        calibrate(plain, x)
    with pytest.raises(UserError, match="at least 0, not -1"):
        add_calibration(net, -1)
    with pytest.raises(UserError, match="none of the layers"):
        add_calibration(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)))
    shared = nn.Linear(4, 4)
    twice = convert(add_calibration(nn.Sequential(shared, nn.ReLU(), shared)), LogNormalVariation(0.5))
    program(twice, 1)
    with pytest.raises(UserError, match="2 times; once is expected"):
        calibrate(twice, torch.randn(3, 4))
    assert correctnet.side_share(add_calibration(net, 0)) == calibration_share(add_calibration(net, 0))


def test_a_row_that_is_calibrated(tmp_path):
    settings = Settings.model_validate(
        {"pretrain": {"epochs": 2, "batch": 32}, "evaluate": {"images": 100}, "calibrate": {"images": 10, "rank": 1}}
    )
    runtime = Runtime(quiet=True)
    stages.pretrain(settings, tmp_path / "p", runtime)
    found = stages.evaluate_chips(settings, tmp_path / "p", tmp_path / "c.csv", runtime, chips=6).table
    off = settings.model_copy(update={"calibrate": Calibrate()})
    plain = stages.evaluate_chips(off, tmp_path / "p", tmp_path / "p.csv", runtime, chips=6).table
    assert found["accuracy"].mean() > plain["accuracy"].mean()
    assert set(found["calibrate_images"]) == {10}
    # LeNet-5: 236 outputs, and 1,015 weights of rank 1.
    assert found["overhead"].iloc[0] == pytest.approx((236 + 1015) / 61_706)
    assert found["digital_macs"].iloc[0] > 0
    clean = settings.model_copy(update={"variation": settings.variation.at(0.0)})
    nominal = stages.evaluate_chips(clean, tmp_path / "p", tmp_path / "n.csv", runtime, chips=1).table
    off = off.model_copy(update={"variation": settings.variation.at(0.0)})
    same = stages.evaluate_chips(off, tmp_path / "p", tmp_path / "s.csv", runtime, chips=1).table
    assert nominal["correct"].tolist() == same["correct"].tolist()
