from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from correctnet import compensation, models
from correctnet.analog import AnalogLayer, convert, crossbar_layers
from correctnet.compensation import Compensated, compensate
from correctnet.config import Training
from correctnet.errors import UserError
from correctnet.montecarlo import evaluate
from correctnet.training import fit
from correctnet.variation import LogNormalVariation


def test_forward_is_figure_5():
    # Loops over pixels, in float64: generator on (pooled input, noisy output), compensator on (output, generated).
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2).double()
    layer = Compensated(conv, filters=4, init="random").double()
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    y, pooled = conv(x)[0], F.adaptive_avg_pool2d(x, 4)[0]
    expected = torch.empty(3, 4, 4, dtype=torch.float64)
    generator = layer.generator.weight.squeeze(), layer.generator.bias
    compensator = layer.compensator.weight.squeeze(), layer.compensator.bias
    for i, j in np.ndindex(4, 4):
        data = (generator[0] @ torch.cat([pooled[:, i, j], y[:, i, j]]) + generator[1]).clamp(min=0)
        expected[:, i, j] = compensator[0] @ torch.cat([y[:, i, j], data]) + compensator[1]
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("pool", ["adaptive", "kernel"])
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2}, {"kernel_size": 5, "padding": 2, "stride": 3}])
def test_pooled_input_has_the_output_s_size(pool, options):
    conv = nn.Conv2d(2, 3, **{"kernel_size": 3, **options})
    layer = Compensated(conv, 2, pool=pool)
    x = torch.randn(2, 2, 13, 11)
    assert layer(x).shape == conv(x).shape


@pytest.mark.parametrize("place", ["layer", "block"])
def test_it_starts_from_the_identity(lenet, place):
    names = [name for name, _ in crossbar_layers(lenet)]
    compensated = compensate(lenet, dict.fromkeys(names[:-1], 3), place=place)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(compensated(x), lenet(x))
    assert not torch.allclose(compensate(lenet, {names[0]: 3}, init="random")(x), lenet(x))


def test_place_block_stands_behind_batchnorm_and_relu(tiny):
    compensated = compensate(tiny, {"0.layer": 2}, place="block")
    assert isinstance(compensated[0], Compensated)
    assert [n for n, _ in compensated[0].original.named_children()] == ["layer", "norm", "relu"]
    at_layer = compensate(tiny, {"0.layer": 2}, place="layer")
    assert isinstance(at_layer[0].layer, Compensated)
    with pytest.raises(UserError, match="in no Block"):
        compensate(tiny, {"4": 2}, place="block")


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.booleans())
def test_cost_counts_the_parameters(inputs, outputs, filters, linear):
    layer = nn.Linear(inputs, outputs) if linear else nn.Conv2d(inputs, outputs, 3)
    module = Compensated(layer, filters)
    added = sum(p.numel() for p in compensation.compensation_parameters(nn.Sequential(module)))
    assert compensation.cost(layer, filters) == added
    assert compensation.cost(layer, 0) == 0


def test_ratios_become_filters(lenet):
    filters = compensation.filters_of(lenet, [0.5, 0.01, 0.0, -1.0])
    assert filters == {"conv1.layer": 3, "conv2.layer": 1}
    # By hand: conv1, l 1, n 6, m 3: 3 (1 + 6) + 3 + 6 (6 + 3) + 6 = 84; conv2, l 6, n 16, m 1: 22 + 1 + 16 x 17 + 16.
    assert compensation.overhead(lenet, filters) == pytest.approx((84 + 311) / 61706)
    with pytest.raises(UserError, match="6 ratios"):
        compensation.filters_of(lenet, [1.0] * 6)


def test_lenet5_with_both_convolutions_costs_little():
    network = models.lenet5()
    assert 0.016 < compensation.overhead(network, compensation.filters_of(network, [1, 1])) < 0.017


def test_only_compensation_parameters_are_named(lenet):
    compensated = compensate(lenet, {"conv1.layer": 3, "conv2.layer": 5})
    chosen = {id(p) for p in compensation.compensation_parameters(compensated)}
    names = [name for name, p in compensated.named_parameters() if id(p) in chosen]
    assert len(names) == 8
    assert all("generator" in n or "compensator" in n for n in names)


def test_saved_and_loaded_as_a_plain_module(lenet, tmp_path):
    filters = {"conv1.layer": 3, "linear1.layer": 2}
    compensated = compensate(lenet, filters, place="block", init="random", activation="none", pool="kernel").eval()
    compensation.save(compensated, tmp_path)
    plan = {"filters": filters, "place": "block", "activation": "none", "pool": "kernel"}
    assert compensation.plan_of(compensated) == plan
    loaded = compensation.load(models.lenet5(), tmp_path).eval()
    assert isinstance(loaded, nn.Module)
    x = torch.randn(3, 1, 32, 32)
    assert torch.equal(loaded(x), compensated(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    with pytest.raises(UserError, match="made for another network"):
        compensation.load(models.lenet5(widths=(3, 4, 5, 6)), tmp_path)


@pytest.mark.parametrize("options", [{}, {"activation": "none"}, {"pool": "kernel"}, {"place": "block"}])
@pytest.mark.parametrize(
    "filters", [{}, {"conv2.layer": 4}, {"linear2.layer": 1}, {"conv1.layer": 1, "linear3.layer": 2}]
)
def test_a_saved_network_computes_what_it_did(lenet, tmp_path, filters, options):
    compensated = compensate(lenet, filters, init="random", **options).eval()
    compensation.save(compensated, tmp_path)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(compensation.load(models.lenet5(), tmp_path).eval()(x), compensated(x))


def test_models_of_names_that_differ_behind_a_dot_are_saved_and_loaded_apart(lenet, tmp_path):
    saved = {}
    for k in (3, 5):
        saved[k] = compensate(lenet, {"conv1.layer": k}, seed=k, init="random")
        compensation.save(saved[k], tmp_path / f"sigma0.{k}.safetensors")
    assert len(list(tmp_path.iterdir())) == 4
    for k, model in saved.items():
        back = compensation.load(lenet, tmp_path / f"sigma0.{k}.json").state_dict()
        assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_what_compensate_cannot_make_is_not_saved(lenet, tmp_path):
    mixed = compensate(compensate(lenet, {"conv1.layer": 2}), {"conv2.layer": 2}, activation="none")
    with pytest.raises(UserError, match="differ in place, activation or pooling"):
        compensation.save(mixed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_plans(lenet):
    with pytest.raises(UserError, match=r"no conv or linear layer 'conv3\.layer'"):
        compensate(lenet, {"conv3.layer": 3})
    with pytest.raises(UserError, match="at least 1 filter"):
        compensate(lenet, {"conv1.layer": 0})
    with pytest.raises(UserError, match="Conv1d"):
        Compensated(nn.Conv1d(1, 2, 3), 1)


def test_compensators_win_accuracy_back(tiny, blobs):
    variation = LogNormalVariation(1.0)
    fit(tiny, blobs, SimpleNamespace(**{**Training().model_dump(), "epochs": 10, "batch": 32}), seed=0, quiet=True)
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    filters = {"0.layer": 4, "3.layer": 8, "4": 3}
    options = {"epochs": 20, "batch": 32, "learning_rate": 0.01, "quiet": True}
    compensated = compensation.fit_compensators(tiny, filters, blobs.images, blobs.labels, variation, **options)
    bare, helped = (evaluate(convert(m, variation), blobs, 40, progress=False) for m in (tiny, compensated))
    assert helped.minus(bare).low > 0.01
    assert not any(isinstance(m, AnalogLayer) for m in compensated.modules())
    after = {k.replace(".original", ""): v for k, v in compensated.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items()), "the original weights stay as they were"
    with pytest.raises(UserError, match=r"fit_compensators: epoch: unknown key .did you mean 'epochs'"):
        compensation.fit_compensators(tiny, {"0.layer": 4}, blobs.images, blobs.labels, variation, epoch=3)


@pytest.mark.parametrize(
    ("batchnorm", "changed"),
    [("frozen", set()), ("updated", {"running_mean", "running_var"}), ("affine", {"weight", "bias"})],
)
def test_what_of_batchnorm_changes_while_compensators_train(tiny, blobs, batchnorm, changed):
    compensated = compensation.fit_compensators(
        tiny, {"0.layer": 2}, blobs.images, blobs.labels, LogNormalVariation(0.3), epochs=1, batch=64, quiet=True,
        batchnorm=batchnorm,
    )  # fmt: skip
    before, after = tiny[0].norm.state_dict(), compensated[0].norm.state_dict()
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different - {"num_batches_tracked"} == changed
    for name, layer in crossbar_layers(tiny):
        kept = compensated.get_submodule(name.replace("0.layer", "0.layer.original"))
        assert torch.equal(kept.weight, layer.weight)
        assert torch.equal(kept.bias, layer.bias)


def test_nothing_to_compensate_is_the_network_itself(tiny, blobs):
    untouched = compensation.fit_compensators(tiny, {}, blobs.images, blobs.labels, LogNormalVariation(0.3), quiet=True)
    with torch.no_grad():
        assert torch.equal(untouched(blobs.images), tiny(blobs.images))
