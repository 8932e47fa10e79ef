"""`correctnet.chip`: a chip as a plain network, against networks with weights from `LogNormalVariation.sample`."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from correctnet import LogNormalVariation, UserError, chip, compensate, convert, program, programmed
from correctnet.crossbar.layers import AnalogLayer, crossbar_layers
from correctnet.networks.blocks import Block

HALF = LogNormalVariation(0.5)


def images(count=6):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def by_hand(network, sample, seed):
    """A copy of the network with each layer's weight drawn from the device model."""
    copied = copy.deepcopy(network)
    for index, (_, layer) in enumerate(crossbar_layers(copied)):
        layer.weight.copy_(HALF.sample(layer.weight.detach(), seed, index, sample))
    return copied


def test_it_is_the_network_with_the_weights_of_the_device_model(tiny):
    analog = convert(tiny, HALF, seed=11)
    plain = chip(analog, 137)
    assert not any(isinstance(m, AnalogLayer) for m in plain.modules())
    assert [type(m) for m in plain.modules()] == [type(m) for m in tiny.modules()]
    expected = by_hand(tiny, 137, 11)
    assert plain.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in expected.state_dict().items())
    with torch.no_grad():
        assert torch.equal(plain(images()), expected(images()))
        with programmed(analog, 137):
            assert torch.equal(plain(images()), analog(images()))
        assert not torch.equal(plain(images()), tiny(images()))
        assert torch.equal(chip(analog, None)(images()), tiny(images()))


def test_the_converted_network_is_left_as_it_was(tiny):
    analog = convert(tiny, HALF, seed=11)
    program(analog, 5)
    before = copy.deepcopy(analog.state_dict())
    plain = chip(analog, 6)
    with torch.no_grad():
        on_five = analog(images())
        assert torch.equal(on_five, by_hand(tiny, 5, 11)(images()))
        for p in plain.parameters():
            p.zero_()
        assert torch.equal(analog(images()), on_five)
    assert all(torch.equal(value, analog.state_dict()[name]) for name, value in before.items())
    assert plain.training == analog.training


def test_layers_that_stay_digital_and_compensators_keep_their_weights(tiny):
    network = compensate(tiny, {"0.layer": 2, "4": 1}, init="random")
    plain = chip(convert(network, HALF, exclude=["3"]), 2)
    state, nominal = plain.state_dict(), network.state_dict()
    changed = {name for name in nominal if not torch.equal(state[name], nominal[name])}
    assert changed == {"0.layer.original.weight", "4.original.weight"}
    assert isinstance(plain[3], Block)


def test_a_parameter_in_two_layers_is_on_two_crossbars():
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    network[1].weight = network[0].weight
    plain = chip(convert(network, HALF), 3)
    for index in (0, 1):
        assert torch.equal(plain[index].weight, HALF.sample(network[0].weight.detach(), 0, index, 3))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "derive",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_derived_weights_become_parameters(derive):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    derive(network[0])
    x = images().flatten(1)
    with torch.no_grad():
        network(x)
        for p in network[0].parameters():
            p += 0.1  # the weight of the pass before is out of date
        analog = convert(network, HALF)
        plain = chip(analog, 4)
        with programmed(analog, 4):
            expected = analog(x)
        assert torch.equal(plain(x), expected)
    assert {name for name, _ in plain.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    fresh = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    fresh.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), expected)


def test_it_can_be_exported(tiny, tmp_path):
    plain = chip(convert(tiny, HALF), 7)
    exported = torch.export.export(plain, (images(),)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images()), plain(images()))
    torch.save(plain.state_dict(), tmp_path / "chip.pt")
    tiny.load_state_dict(torch.load(tmp_path / "chip.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(tiny(images()), plain(images()))


def test_frozen_weights_stay_frozen_and_others_can_be_trained(tiny):
    tiny[4].weight.requires_grad_(False)
    plain = chip(convert(tiny, HALF), 1)
    assert not plain[4].weight.requires_grad
    plain(images()).sum().backward()
    assert plain[0].layer.weight.grad is not None


@pytest.mark.parametrize(
    ("make", "sample", "line"),
    [
        (lambda m: m, 0, "the model carries no variation: pass it through convert() first"),
        (lambda m: convert(m, HALF), [1, 2], "chip: one chip is expected, not 2"),
        (lambda m: convert(m, HALF), -1, "program: a sample lies in [0, 2^32), not -1"),
        (lambda m: convert(m, HALF), 0.5, "program: a sample must be a whole number, not 0.5"),
    ],
)
def test_bad_chips(tiny, make, sample, line):
    with pytest.raises(UserError) as error:
        chip(make(tiny), sample)
    assert str(error.value) == line
