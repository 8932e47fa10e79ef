import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from correctnet.crossbar import layers
from correctnet.crossbar.convert import chip_of, convert, program, programmed
from correctnet.crossbar.layers import AnalogConv2d, AnalogLinear, analog_layers, crossbar_layers
from correctnet.devices.base import Variation
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.engine.engine import Engine
from correctnet.errors import UserError
from correctnet.evaluation.coverage import check_coverage
from correctnet.evaluation.montecarlo import evaluate
from correctnet.methods.compensation import compensate

HALF = LogNormalVariation(0.5)


def varied_by_hand(model, seed, sample, first=0, exclude=()):
    """A digital copy of `model` with each weight replaced: what a chip should compute."""
    digital = copy.deepcopy(model)
    for index, (name, layer) in enumerate(crossbar_layers(digital)):
        if index >= first and name not in exclude:
            layer.weight.data = HALF.sample(layer.weight.data, seed, index, sample)
    return digital


def test_clean_output_is_unchanged_and_the_original_untouched(lenet):
    x = torch.randn(3, 1, 32, 32)
    before = copy.deepcopy(lenet.state_dict())
    analog = convert(lenet, HALF, seed=4)
    assert torch.equal(analog(x), lenet(x))
    program(analog, 0)
    assert not torch.equal(analog(x), lenet(x))
    program(analog, None)
    assert torch.equal(analog(x), lenet(x))
    assert all(torch.equal(before[k], v) for k, v in lenet.state_dict().items())
    assert not any(isinstance(m, (AnalogConv2d, AnalogLinear)) for m in lenet.modules())
    assert list(analog.state_dict()) == list(lenet.state_dict())


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_chip_computes_with_its_weights(lenet, first):
    x = torch.randn(2, 1, 32, 32)
    analog = convert(lenet, HALF, seed=4)
    program(analog, 137, first_layer=first)
    assert torch.equal(analog(x), varied_by_hand(lenet, 4, 137, first)(x))


def test_a_chip_is_the_same_in_any_batch_and_after_any_other_chip(lenet):
    x = torch.randn(6, 1, 32, 32)
    analog = convert(lenet, HALF, seed=4)
    outputs = []
    for samples in ([137], [0, 1, 137], [140, 137]):
        for sample in samples:
            program(analog, sample)
            whole = analog(x)
        outputs.append(whole)
    assert all(torch.equal(outputs[0], o) for o in outputs)
    torch.testing.assert_close(torch.cat([analog(x[:1]), analog(x[1:])]), whole)


def test_a_chip_is_the_same_in_another_process_with_other_threads():
    code = (
        "import torch, hashlib; torch.set_num_threads({})\n"
        "from correctnet.devices.lognormal import LogNormalVariation\n"
        "w = LogNormalVariation(0.5).sample(torch.ones(300, 40), 7, 3, 137)\n"
        "print(hashlib.sha256(w.numpy().tobytes()).hexdigest())"
    )
    digests = {subprocess.check_output([sys.executable, "-c", code.format(n)]) for n in (1, 2)}
    assert len(digests) == 1


def test_excluded_layers_stay_digital_but_keep_their_index(lenet):
    analog = convert(lenet, HALF, seed=4, exclude=["conv2"])
    assert [layer.layer_index for layer in analog_layers(analog)] == [0, 2, 3, 4]
    x = torch.randn(2, 1, 32, 32)
    program(analog, 5)
    assert torch.equal(analog(x), varied_by_hand(lenet, 4, 5, exclude=["conv2.layer"])(x))
    assert check_coverage(lenet, analog, x) == ["conv1.layer", "linear1.layer", "linear2.layer", "linear3.layer"]


def test_compensation_is_digital_and_does_not_move_the_addresses(lenet):
    compensated = compensate(lenet, {"conv1.layer": 3}, init="random")
    analog = convert(compensated, HALF, seed=4)
    assert [layer.layer_index for layer in analog_layers(analog)] == [0, 1, 2, 3, 4]
    program(analog, 1)
    plain = convert(lenet, HALF, seed=4)
    program(plain, 1)
    expected = plain.conv1.layer.chip_weight()
    assert torch.equal(analog.conv1.layer.original.chip_weight(), expected)
    names = check_coverage(compensated, analog, torch.randn(2, 1, 32, 32))
    assert names[0] == "conv1.layer.original"
    assert not any("generator" in n or "compensator" in n for n in names)


def test_a_single_layer_and_a_shared_layer():
    layer = nn.Linear(3, 2)
    analog = convert(layer, HALF)
    assert isinstance(analog, AnalogLinear)
    shared = nn.Linear(4, 4)
    twice = convert(nn.Sequential(shared, nn.ReLU(), shared), HALF)
    assert twice[0] is twice[2]
    assert len(analog_layers(twice)) == 1


class BehindItsBack(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(nn.functional.linear(x, self.first.weight))


def test_a_weight_that_is_read_past_its_layer_is_the_chips():
    model = BehindItsBack().eval()
    analog, x = convert(model, HALF), torch.randn(2, 4)
    assert check_coverage(model, analog, x) == ["first", "second"]
    with torch.no_grad(), programmed(analog, 3):
        assert torch.equal(analog(x), varied_by_hand(model, 0, 3)(x))


def test_coverage_finds_variation_that_is_not_applied(lenet, monkeypatch):
    analog = convert(lenet, HALF)
    x = torch.randn(2, 1, 32, 32)
    layer = analog.linear2.layer
    monkeypatch.setattr(layer, "chip_weight", lambda: layer.nominal)
    with pytest.raises(UserError, match=r"linear2\.layer"):
        check_coverage(lenet, analog, x)


def test_coverage_finds_variation_at_a_wrong_address(lenet, monkeypatch):
    analog = convert(lenet, HALF)
    wrong = convert(lenet, HALF)
    layer = wrong.conv2.layer
    monkeypatch.setattr(layer, "_draw", lambda: HALF.sample(layer.nominal, 0, layer.layer_index, 99))
    x = torch.randn(2, 1, 32, 32)
    check_coverage(lenet, analog, x)
    with pytest.raises(UserError, match=r"conv2\.layer does not compute with its chip's weights"):
        check_coverage(lenet, wrong, x)


def test_coverage_takes_a_layer_whose_input_is_zero(lenet):
    """No chip's weights can show there, and the network may have come to that in training."""
    with torch.no_grad():
        lenet.linear1.layer.weight.zero_()
        lenet.linear1.layer.bias.fill_(-1.0)
    assert len(check_coverage(lenet, convert(lenet, HALF), torch.randn(2, 1, 32, 32))) == 5  # zeros have no variation
    with torch.no_grad():
        lenet.linear1.layer.weight.fill_(-1e-6)
    assert "linear2.layer" in check_coverage(lenet, convert(lenet, HALF), torch.randn(2, 1, 32, 32))


def test_coverage_finds_a_digital_layer_that_changes(tiny):
    analog = convert(tiny, HALF)
    norm = analog[0].norm
    norm.register_forward_hook(lambda module, args, y: y * 2 if analog[4].chip.sample is not None else y)
    with pytest.raises(UserError, match=r"0\.norm is digital"):
        check_coverage(tiny, analog, torch.randn(2, 1, 8, 8))


def test_changed_weights_are_seen(lenet):
    analog = convert(lenet, HALF)
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad(), programmed(analog, 3):
        before = analog(x)
        analog.conv1.layer.weight.mul_(2)
        after = analog(x)
    lenet.conv1.layer.weight.data.mul_(2)
    assert not torch.equal(before, after)
    assert torch.equal(after, varied_by_hand(lenet, 0, 3)(x))


def test_converted_models_can_be_copied_and_pickled(lenet):
    analog = convert(lenet, HALF)
    twin = copy.deepcopy(analog)
    program(twin, 3)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(analog(x), lenet(x)), "a copy has a chip of its own"
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": ["conv9"]}, "no module 'conv9'"),
        ({"exclude": ["conv1", "conv2", "linear1", "linear2", "linear3"]}, "left to convert"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "the seed must be a whole number, not 1.5"),
        ({"seed": True}, "the seed must be a whole number, not True"),
        ({"exclude": "conv9"}, "no module 'conv9'"),
        ({"variation": 0.5}, "a device model such as"),
        ({"variation": LogNormalVariation}, "a device model such as"),
        ({"model": torch.relu}, "a torch.nn.Module is expected"),
    ],
)
def test_bad_conversions(lenet, arguments, message):
    with pytest.raises(UserError, match=message):
        convert(**{"model": lenet, "variation": HALF, **arguments})


def test_one_name_is_excluded_as_it_is(lenet):
    names = [name for name, _ in crossbar_layers(lenet)]
    found = analog_layers(convert(lenet, HALF, exclude=names[1]))
    assert [layer.layer_index for layer in found] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    "arguments", [(3.5,), ("3",), (True,), (-1,), (3, 1.5), (3, -1), (3, 0, -1), (3, 0, 2**64), (3, 0, 0.5)]
)
def test_a_chip_that_is_none_is_not_programmed(lenet, arguments):
    analog = convert(lenet, HALF, seed=7)
    with pytest.raises(UserError, match="program: "):
        program(analog, *arguments)
    assert (chip_of(analog).seed, chip_of(analog).sample, chip_of(analog).first_layer) == (7, None, 0)


def test_converting_twice_and_programming_what_was_not_converted(lenet):
    with pytest.raises(UserError, match="already"):
        convert(convert(lenet, HALF), HALF)
    with pytest.raises(UserError, match="convert"):
        program(lenet, 0)
    with pytest.raises(UserError, match="sample"):
        program(convert(lenet, HALF), 2**32)


# ---- several chips in one batch -------------------------------------------------------------------------------------


class Scaled(Variation):
    """A device that the kernels cannot draw."""

    def sample(self, weight, seed, layer, sample):
        return weight * (1 + 0.5 * math.sin(sample + layer))

    def describe(self):
        return {}


class Odd(nn.Module):
    """Layers that the operators cannot compute, and linear layers on (N, T, features)."""

    def __init__(self):
        super().__init__()
        self.reflect = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect", stride=2)
        self.same = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.tokens = nn.Linear(4, 6, bias=False)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.same(self.reflect(x))))
        return self.last(self.tokens(x.flatten(2).mT)).mean(1)


CHIPS = [3, 2**32 - 1, 3]


def gradients(model, chips, x, first_layer, autocast):
    """The outputs and gradients of `model` with each part of x on its chip, one forward pass each."""
    model.zero_grad()
    outputs = []
    for chip, part in zip(chips, x.chunk(len(chips)), strict=True):
        with programmed(model, chip, first_layer), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(model(part).float())
            outputs[-1].square().sum().backward()
    return torch.cat(outputs).detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", [HALF, Scaled()], ids=["lognormal", "own"])
@pytest.mark.parametrize("network", ["lenet", "tiny", "odd"])
def test_several_chips_in_a_batch_are_those_chips(lenet, tiny, network, device, autocast):
    torch.manual_seed(0)
    original = {"lenet": lenet, "tiny": tiny, "odd": Odd()}[network].eval()
    analog = convert(original, device, seed=2**64 - 1)
    x = torch.randn(6, 1, 32, 32) if network == "lenet" else torch.randn(6, 1, 8, 8)
    for first in (0, 1):
        wanted, wanted_gradients = gradients(analog, CHIPS, x, first, autocast)
        analog.zero_grad()
        program(analog, CHIPS, first_layer=first)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = analog(x).float()
            with torch.no_grad():
                inferred = analog(x).float()
        y.square().sum().backward()
        tolerance = 2e-2 if autocast else 1e-5
        assert torch.allclose(y, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
        assert torch.allclose(inferred, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
        for name, p in analog.named_parameters():
            scale = wanted_gradients[name].abs().max().item()
            assert torch.allclose(p.grad, wanted_gradients[name], rtol=0, atol=10 * tolerance * scale), name
        # The third part is on the first part's chip, the second is not.
        program(analog, CHIPS, first_layer=first)
        with torch.no_grad():
            a, b, c = analog(x[:2].repeat(3, 1, 1, 1)).chunk(3)
        assert torch.allclose(a, c, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(a, b, rtol=1e-3, atol=1e-3)
        program(analog, None)


def test_several_chips_are_computed_by_the_operators(lenet, monkeypatch):
    called = []
    for name in ("noisy_linear", "noisy_conv2d"):
        operator = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, op=operator, n=name, **k: called.append(n) or op(*a, **k))
    x = torch.randn(4, 1, 32, 32)
    analog = convert(lenet, HALF, exclude=["linear1"])
    program(analog, [0, 1], first_layer=1)
    analog(x)
    assert called == ["noisy_conv2d", "noisy_linear", "noisy_linear"]
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        analog(x)
    program(analog, 0)
    analog(x)
    assert called == []


def test_several_chips_and_evaluation(lenet):
    """An evaluation programs chips of its own, and puts back those that were programmed."""
    analog = convert(lenet, HALF)
    data = torch.randn(6, 1, 32, 32), torch.arange(6)
    wanted = evaluate(analog, data, 3, progress=False)
    program(analog, range(2))
    for engine in ("auto", "torch"):
        assert (
            evaluate(analog, data, 3, engine=engine, progress=False).accuracies.tolist() == wanted.accuracies.tolist()
        )
    assert chip_of(analog).sample == (0, 1)
    assert copy.deepcopy(analog)(data[0]).equal(analog(data[0]))
    assert Engine(analog, data[0]).outputs(data[0], [0]).isfinite().all()


def test_several_chips_that_cannot_be(lenet):
    analog = convert(lenet, HALF)
    for samples, message in (([], "at least one sample"), ([0, -1], "a sample lies in"), ([0, 1.5], "whole number")):
        with pytest.raises(UserError, match=message):
            program(analog, samples)
    program(analog, [0, 1, 2])
    with pytest.raises(UserError, match=r"3 chips share each batch; .*\(4, 1, 32, 32\) cannot be divided evenly"):
        analog(torch.randn(4, 1, 32, 32))
    with pytest.raises(UserError, match="cannot be divided evenly"):
        analog.conv1.layer(torch.randn(1, 32, 32))
    with pytest.raises(UserError, match="several chips are programmed"):
        _ = analog.conv1.layer.weight
