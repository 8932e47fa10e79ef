"""Remapping of rows: its objective against every assignment, and that chips keep their factors."""

import itertools

import pytest
import torch
from torch import nn

from correctnet import LogNormalVariation, convert, program
from correctnet.crossbar.layers import analog_layers
from correctnet.devices.gaussian import GaussianVariation
from correctnet.devices.remapped import Remapped, assignment
from correctnet.errors import UserError
from correctnet.pipeline import stages
from correctnet.pipeline.runtime import Runtime
from correctnet.settings import Settings

DEVICE = LogNormalVariation(0.7)


def objective(weight, factors, order):
    """The harm of an assignment, written out: row p of the weights at the physical row order[p]."""
    w, f = weight.flatten(1), factors.flatten(1)
    return sum(float(w[c, p].abs() * (f[c, q] - 1).abs()) for p, q in enumerate(order) for c in range(len(w)))


@pytest.mark.parametrize("shape", [(3, 6), (2, 2, 1, 3), (1, 5)])
def test_no_assignment_is_better(shape):
    torch.manual_seed(0)
    for chip in range(5):
        weight = torch.randn(shape)
        factors = DEVICE.sample(torch.ones(shape), 1, 0, chip)
        rows = weight.flatten(1).shape[1]
        found = objective(weight, factors, assignment(weight, factors).tolist())
        every = [objective(weight, factors, order) for order in itertools.permutations(range(rows))]
        assert found == pytest.approx(min(every), rel=1e-6)
        assert found <= objective(weight, factors, range(rows)) + 1e-6, "never worse than the identity"


def test_a_chip_keeps_its_factors_in_other_rows():
    torch.manual_seed(1)
    weight = torch.randn(4, 3, 2, 2) + 0.1
    plain = (DEVICE.sample(weight, 3, 2, 9) / weight).flatten(1)
    placed = (Remapped(DEVICE).sample(weight, 3, 2, 9) / weight).flatten(1)
    order = assignment(weight, DEVICE.sample(torch.ones_like(weight), 3, 2, 9))
    assert sorted(order.tolist()) == list(range(12))
    torch.testing.assert_close(placed, plain[:, order])
    assert not torch.allclose(placed, plain)


def test_the_gradient_is_the_factor():
    weight = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    drawn = Remapped(DEVICE).sample(weight, 0, 0, 1)
    drawn.sum().backward()
    torch.testing.assert_close(weight.grad, (drawn / weight).detach())


def test_a_mean_of_the_factors_that_is_1_is_kept_in_mind():
    """Factors of mean 1 are near it; those of the median 1 are not, and rows are placed by what is programmed."""
    centred = LogNormalVariation(0.7, centre="mean")
    factors = centred.sample(torch.ones(2, 5), 0, 0, 1)
    weight = torch.randn(2, 5)
    order = assignment(weight, factors)
    torch.testing.assert_close(Remapped(centred).sample(weight, 0, 0, 1), weight * factors[:, order])


def test_layers_are_closer_to_what_they_were():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(64, 8))
    errors = {}
    for device in (DEVICE, Remapped(DEVICE)):
        analog = convert(net, device, seed=4)
        (own,) = analog_layers(analog)
        total = 0.0
        for chip in range(20):
            program(analog, chip)
            total += float((own.chip_weight() - own.nominal).detach().abs().sum())
        errors[type(device).__name__] = total
    assert errors["Remapped"] < 0.95 * errors["LogNormalVariation"]


def test_other_levels_and_devices():
    assert Remapped(DEVICE).at(0.2) == Remapped(LogNormalVariation(0.2))
    assert Remapped(DEVICE).describe()["mapping"] == "rows"

    class Additive(GaussianVariation):
        def moments(self, weight):
            return weight, torch.ones_like(weight)

        def describe(self):
            return {}

    with pytest.raises(UserError, match="it is for the lognormal"):
        Remapped(Additive())


def test_a_row_that_is_remapped(tmp_path):
    settings = Settings.model_validate({"pretrain": {"epochs": 2, "batch": 32}, "evaluate": {"images": 100}})
    runtime = Runtime(quiet=True)
    stages.pretrain(settings, tmp_path / "p", runtime)
    plain = stages.evaluate_chips(settings, tmp_path / "p", tmp_path / "a.csv", runtime, chips=6).table
    mapped = settings.model_copy(update={"mapping": settings.mapping.model_copy(update={"rows": "assigned"})})
    found = stages.evaluate_chips(mapped, tmp_path / "p", tmp_path / "b.csv", runtime, chips=6).table
    assert found["accuracy"].mean() > plain["accuracy"].mean()
    assert set(found["mapping"]) == {"rows"}
    assert found["overhead"].iloc[0] == 0
