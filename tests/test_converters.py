"""Converters of analog layers: against float64 formulas, and their ranges against sorted magnitudes."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from correctnet import (
    Converters,
    LogNormalVariation,
    add_converters,
    chip,
    clipped,
    convert,
    evaluate,
    load,
    program,
    save,
)
from correctnet.crossbar.calibration import ClippingWarning, most_clipped, ranges_of
from correctnet.crossbar.converters import Quantizer
from correctnet.crossbar.layers import analog_layers, analog_names
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import state_digest

EIGHT = Converters(dac_bits=8, adc_bits=8)


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 16, 7), nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    ).eval()  # fmt: skip


def images(count: int = 30, seed: int = 4) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def analog(converters: Converters = EIGHT, sigma: float = 0.3) -> nn.Module:
    model = convert(network(), LogNormalVariation(sigma), seed=1)
    add_converters(model, converters, images())
    return model


def quantized(x: np.ndarray, bits: int | None, limit: float) -> np.ndarray:
    """The formula in float64, value by value."""
    if bits is None:
        return x
    steps = 2 ** (bits - 1) - 1
    return np.array([max(-steps, min(steps, round(v * steps / limit))) * limit / steps for v in x.ravel()]).reshape(
        x.shape
    )


@pytest.mark.parametrize("bits", [2, 3, 8, 12, 16])
def test_a_converter_rounds_to_its_steps_and_clips(bits: int) -> None:
    own = Quantizer(bits, 1.7)
    x = 5 * torch.rand(4001, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 2.5
    found = own(x).numpy()
    assert np.abs(found - quantized(x.numpy(), bits, 1.7)).max() < 1e-12
    assert bits > 8 or len(np.unique(found.round(9))) == 2**bits - 1
    assert own(torch.zeros(1)).item() == 0
    assert found.max() == pytest.approx(1.7)
    assert torch.equal(own(own(x.float())), own(x.float()))  # values of the converter are kept


def test_a_converter_keeps_types_and_what_is_not_a_number() -> None:
    own = Quantizer(8, 1.0)
    assert own(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    special = own(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert special[0].isnan()
    assert special[1:].tolist() == [1.0, -1.0]


def test_gradients_pass_straight_through_within_the_range() -> None:
    x = torch.tensor([-3.0, -1.0, -0.4, 0.0, 0.9, 1.0, 1.01], requires_grad=True)
    (Quantizer(4, 1.0)(x) * torch.arange(1.0, 8.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


@pytest.mark.parametrize("converters", [EIGHT, Converters(dac_bits=4), Converters(adc_bits=5, quantile=1.0)])
def test_a_network_computes_with_its_converters(converters: Converters) -> None:
    model, x = analog(converters), images(12, seed=9)
    program(model, 17)
    ranges = ranges_of(model)
    conv, first, last = (model[i] for i in (0, 4, 6))
    own = {name: layer for layer in analog_layers(model) for name in [analog_names(model)[id(layer)]]}
    weights = {name: layer.chip_weight().detach().double().numpy() for name, layer in own.items()}

    def layer(name: str, values: np.ndarray, bias: Tensor | None) -> np.ndarray:
        values = quantized(values, converters.dac_bits, ranges[name][0])
        if values.ndim == 4:
            product = torch.nn.functional.conv2d(
                torch.from_numpy(values), torch.from_numpy(weights[name]), padding=1
            ).numpy()
        else:
            product = values @ weights[name].T
        product = quantized(product, converters.adc_bits, ranges[name][1])
        bias = 0.0 if bias is None else bias.detach().double().numpy()
        return product + (bias[:, None, None] if product.ndim == 4 else bias)

    with torch.no_grad():
        found = [conv(x), model[:5](x), model(x)]
        inputs = [x, model[:4](x), model[:6](x)]  # each layer by itself: a value at half a step may go either way
    for got, before, (name, bias) in zip(
        found, inputs, [("0", conv.bias), ("4", first.bias), ("6", last.bias)], strict=True
    ):
        wanted = layer(name, before.double().numpy(), bias)
        step = ranges[name][1] / (2 ** (converters.adc_bits - 1) - 1) if converters.adc_bits else 0.0
        error = np.abs(got.numpy() - wanted)
        assert (error > 1e-5).mean() <= 1e-3
        assert error.max() <= step + 1e-5


def test_ranges_cover_the_quantile_of_what_layers_see() -> None:
    model = convert(network(), LogNormalVariation(0.5), seed=1)
    with torch.no_grad():
        seen = {"4": (model[:4](images()), model[:5](images()) - model[4].bias)}
    for quantile in (0.9, 0.999, 1.0):
        found = add_converters(model, Converters(8, 8, quantile), images())
        for values, limit in zip(seen["4"], found["4"], strict=True):
            ordered = np.sort(values.abs().numpy().ravel())
            wanted = ordered[int(np.ceil(quantile * len(ordered))) - 1]
            assert wanted <= limit * (1 + 1e-6)
            assert limit <= wanted + ordered[-1] / 4096 + 1e-6
    assert found == ranges_of(model)


def test_nominal_networks_are_digital() -> None:
    model, plain = analog(Converters(2, 2)), network()
    x = images(5)
    assert torch.equal(model(x), plain(x))
    program(model, 0, first_layer=3)  # the index after the last layer's
    assert torch.equal(model(x), plain(x))
    program(model, 0)
    assert not torch.equal(model(x), plain(x))


def test_chips_without_variation_have_converters() -> None:
    model = analog(Converters(3, 3), sigma=0.0)
    program(model, 0)
    assert not torch.equal(model(images()), network()(images()))
    labels = torch.zeros(30, dtype=torch.long)
    assert (
        evaluate(model, (images(), labels), 2).values.tolist() == [(model(images()).argmax(1) == 0).float().mean()] * 2
    )


def test_several_chips_share_a_batch() -> None:
    model, x = analog(), images(6)
    program(model, (4, 9, 2))
    together = model(x)
    for i, sample in enumerate((4, 9, 2)):
        program(model, sample)
        assert torch.allclose(together[2 * i : 2 * i + 2], model(x[2 * i : 2 * i + 2]), atol=0.02)


def test_networks_train_with_converters() -> None:
    model, x = analog(Converters(6, 6)), images(30)
    labels = torch.arange(30) % 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(80):
        program(model, step % 4)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_what_is_clipped_is_counted() -> None:
    model, x = analog(Converters(8, 8, 0.9)), images()
    fractions = clipped(model, x, sample=3)
    program(model, 3)
    with torch.no_grad():
        inputs = model[:4](x)
        wanted = (inputs.abs() > model[4].periphery.dac.limit).float().mean().item()
        product = nn.functional.linear(model[4].periphery.dac(inputs), model[4].chip_weight())
        of_sums = (product.abs() > model[4].periphery.adc.limit).float().mean().item()
    assert fractions["4"] == (pytest.approx(wanted), pytest.approx(of_sums))
    assert fractions["0"][1] > 0.02  # so that the next layer's inputs do not reach the end of their range
    assert fractions["6"][1] > 0.02
    assert most_clipped(fractions) == max(max(both) for both in fractions.values())
    assert "4" not in clipped(model, x, sample=3, first_layer=2)


def test_clipping_is_warned_of() -> None:
    labels = torch.zeros(30, dtype=torch.long)
    with pytest.warns(ClippingWarning, match=r"of the inputs of 0, .* of the outputs of 4, .* \(chip 5\)"):
        evaluate(analog(Converters(8, 8, 0.9)), (images(), labels), 1, start=5, engine="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ClippingWarning)
        evaluate(analog(Converters(8, 8, 1.0), sigma=0.0), (images() / 2, labels), 1, engine="torch")


def test_copies_and_pickles_keep_converters() -> None:
    model = analog()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert ranges_of(twin) == ranges_of(model)
        program(twin, 3)
        program(model, 3)
        assert torch.equal(twin(images()), model(images()))
    bare = convert(network(), LogNormalVariation(0.3), seed=1)
    assert add_converters(bare, EIGHT, ranges=ranges_of(model)) == ranges_of(model)
    before = state_digest(bare)
    assert before == state_digest(model)
    add_converters(bare, None)
    assert ranges_of(bare) == {}
    assert state_digest(bare) != before
    assert state_digest(bare) == state_digest(convert(network(), LogNormalVariation(0.3), seed=1))


def test_ranges_are_saved_with_a_model(tmp_path: Path) -> None:
    model = analog()
    save(model, tmp_path / "m")
    again = convert(load(network(), tmp_path / "m"), LogNormalVariation(0.3), seed=1)
    assert add_converters(again, EIGHT, ranges=tmp_path / "m") == ranges_of(model)
    program(model, 3)
    program(again, 3)
    assert torch.equal(model(images()), again(images()))
    program(model, None)
    add_converters(model, None)
    save(model, tmp_path / "bare")
    with pytest.raises(UserError, match=r"converters: .*bare.*json holds no ranges of converters"):
        add_converters(again, EIGHT, ranges=str(tmp_path / "bare"))


def test_plain_networks_have_none() -> None:
    model = analog()
    with pytest.raises(UserError, match="a plain network has no converters"):
        chip(model, 3)
    assert torch.equal(chip(model, None)(images()), network()(images()))
    add_converters(model, None)
    program(model, 3)
    assert torch.equal(chip(model, 3)(images()), model(images()))


def test_mistakes_are_named() -> None:
    model = convert(network(), LogNormalVariation(0.3))
    for bits in (1, 17, True, 8.0):
        with pytest.raises(UserError, match="2 to 16 bits"):
            Converters(dac_bits=bits)
    for quantile in (0, 1.5, True):
        with pytest.raises(UserError, match="quantile"):
            Converters(8, 8, quantile)
    with pytest.raises(UserError, match="calibration images are expected, or ranges"):
        add_converters(model, EIGHT)
    with pytest.raises(UserError, match="no calibration images"):
        add_converters(model, EIGHT, images(0))
    with pytest.raises(UserError, match="all inputs of 0 are 0"):
        add_converters(model, EIGHT, torch.zeros(3, 2, 8, 8))
    with pytest.raises(UserError, match="not finite"):
        add_converters(model, EIGHT, torch.full((3, 2, 8, 8), float("inf")))
    with pytest.raises(UserError, match="'6' is a layer without ranges"):
        add_converters(model, EIGHT, ranges={"0": (1.0, 1.0), "4": (1.0, 1.0)})
    with pytest.raises(UserError, match="a finite number > 0"):
        add_converters(model, EIGHT, ranges=dict.fromkeys(("0", "4", "6"), (-1.0, 1.0)))
    assert ranges_of(model) == {}
    with pytest.raises(UserError, match=r"0 is a ConvTranspose2d; linear layers"):
        add_converters(convert(nn.Sequential(nn.ConvTranspose2d(2, 3, 3)), LogNormalVariation(0.3)), EIGHT, images())
