import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from stopping import Stopped, stopping_loss
from torch import nn

from correctnet.crossbar.convert import convert
from correctnet.crossbar.layers import AnalogLayer, crossbar_layers
from correctnet.datasets.base import Split
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import evaluate
from correctnet.evaluation.simulation import Simulation
from correctnet.methods import compensation, compensation_training
from correctnet.methods.compensation import Compensated, compensate
from correctnet.methods.compensation_training import CompensationWarning, fit_compensators
from correctnet.methods.saved import load, plan_of, save
from correctnet.networks.blocks import Block
from correctnet.networks.building import build
from correctnet.networks.lenet import lenet5
from correctnet.noise import streams
from correctnet.settings import Compensate, Training
from correctnet.training.loop import fit


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
    with pytest.raises(UserError, match="not in a Block"):
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
    network = lenet5()
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
    save(compensated, tmp_path)
    plan = {"filters": filters, "place": "block", "activation": "none", "pool": "kernel"}
    assert plan_of(compensated) == plan
    loaded = load(lenet5(), tmp_path).eval()
    assert isinstance(loaded, nn.Module)
    x = torch.randn(3, 1, 32, 32)
    assert torch.equal(loaded(x), compensated(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    with pytest.raises(UserError, match="made for another network"):
        load(lenet5(widths=(3, 4, 5, 6)), tmp_path)


@pytest.mark.parametrize("options", [{}, {"activation": "none"}, {"pool": "kernel"}, {"place": "block"}])
@pytest.mark.parametrize(
    "filters", [{}, {"conv2.layer": 4}, {"linear2.layer": 1}, {"conv1.layer": 1, "linear3.layer": 2}]
)
def test_a_saved_network_computes_what_it_did(lenet, tmp_path, filters, options):
    compensated = compensate(lenet, filters, init="random", **options).eval()
    save(compensated, tmp_path)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(load(lenet5(), tmp_path).eval()(x), compensated(x))


def test_models_of_names_that_differ_behind_a_dot_are_saved_and_loaded_apart(lenet, tmp_path):
    saved = {}
    for k in (3, 5):
        saved[k] = compensate(lenet, {"conv1.layer": k}, seed=k, init="random")
        save(saved[k], tmp_path / f"sigma0.{k}.safetensors")
    assert len(list(tmp_path.iterdir())) == 4
    for k, model in saved.items():
        back = load(lenet, tmp_path / f"sigma0.{k}.json").state_dict()
        assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_what_compensate_cannot_make_is_not_saved(lenet, tmp_path):
    mixed = compensate(compensate(lenet, {"conv1.layer": 2}), {"conv2.layer": 2}, activation="none")
    with pytest.raises(UserError, match="differ in place, activation or pooling"):
        save(mixed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_plans(lenet):
    with pytest.raises(UserError, match=r"no conv or linear layer 'conv3\.layer'"):
        compensate(lenet, {"conv3.layer": 3})
    with pytest.raises(UserError, match="at least 1 filter"):
        compensate(lenet, {"conv1.layer": 0})
    with pytest.raises(UserError, match="LSTM"):
        Compensated(nn.LSTM(1, 2), 1)


def test_compensators_win_accuracy_back(tiny, blobs):
    variation = LogNormalVariation(1.0)
    fit(tiny, blobs, Training(epochs=10, batch=32), seed=0, quiet=True)
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    filters = {"0.layer": 4, "3.layer": 8, "4": 3}
    options = {"epochs": 20, "batch": 32, "learning_rate": 0.01, "chips_per_batch": 4, "quiet": True}
    compensated = fit_compensators(tiny, filters, blobs.images, blobs.labels, variation, **options)
    bare, helped = (evaluate(convert(m, variation), blobs, 40, progress=False) for m in (tiny, compensated))
    assert helped.minus(bare).low > 0.01
    assert not any(isinstance(m, AnalogLayer) for m in compensated.modules())
    after = {k.replace(".original", ""): v for k, v in compensated.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items()), "the original weights stay as they were"
    with pytest.raises(UserError, match=r"fit_compensators: epoch: unknown key .did you mean 'epochs'"):
        fit_compensators(tiny, {"0.layer": 4}, blobs.images, blobs.labels, variation, epoch=3)


@pytest.mark.parametrize(
    ("batchnorm", "changed"),
    [("frozen", set()), ("updated", {"running_mean", "running_var"}), ("affine", {"weight", "bias"})],
)
def test_what_of_batchnorm_changes_while_compensators_train(tiny, blobs, batchnorm, changed):
    options = {"epochs": 5, "quiet": True, "batchnorm": batchnorm}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that they are not kept
        compensated = fit_compensators(
            tiny, {"0.layer": 2}, blobs.images, blobs.labels, LogNormalVariation(0.3), **options
        )
    before, after = tiny[0].norm.state_dict(), compensated[0].norm.state_dict()
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different - {"num_batches_tracked"} == changed
    for name, layer in crossbar_layers(tiny):
        kept = compensated.get_submodule(name.replace("0.layer", "0.layer.original"))
        assert torch.equal(kept.weight, layer.weight)
        assert torch.equal(kept.bias, layer.bias)


def test_nothing_to_compensate_is_the_network_itself(tiny, blobs):
    untouched = fit_compensators(tiny, {}, blobs.images, blobs.labels, LogNormalVariation(0.3), quiet=True)
    with torch.no_grad():
        assert torch.equal(untouched(blobs.images), tiny(blobs.images))


def test_a_linear_layer_compensates_each_token_alike():
    torch.manual_seed(0)
    layer = Compensated(nn.Linear(5, 3), filters=4, init="random")
    x = torch.randn(2, 6, 7, 5)
    assert layer(x).shape == (2, 6, 7, 3)
    for index in np.ndindex(2, 6, 7):
        torch.testing.assert_close(layer(x)[index], layer(x[index][None])[0])


def test_a_convolution_without_a_batch():
    layer = Compensated(nn.Conv2d(2, 3, 3, stride=2), filters=4, init="random")
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_layers_have_the_network_s_dtype(dtype):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.Flatten(), nn.Linear(8 * 64, 4))
    options = {"filters": {"0": 2, "2": 3}, "init": "random", "pool": "kernel", "seed": 3}
    found = compensate(network.to(dtype), **options)
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert found(torch.randn(2, 3, 8, 8).to(dtype)).dtype == dtype
    wanted = compensate(network.float(), **options)
    for a, b in zip(*(compensation.compensation_parameters(m) for m in (found, wanted)), strict=True):
        assert torch.equal(a, b.to(dtype)), "the same numbers, rounded"


ODD = [
    {"padding": "same"},
    {"padding": "same", "kernel_size": 4, "dilation": 2},
    {"padding": "valid"},
    {"dilation": 2},
    {"dilation": (1, 3), "padding": (0, 2), "stride": (2, 1)},
    {"padding": 3},
    {"kernel_size": 1, "padding": 1},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": (2, 1), "padding_mode": "replicate", "kernel_size": (5, 3)},
    {"groups": 2, "padding": 1},
    {"groups": 4, "kernel_size": (1, 5), "stride": (1, 2)},
]


@pytest.mark.parametrize("pool", ["adaptive", "kernel"])
@pytest.mark.parametrize("options", ODD)
def test_any_convolution_is_compensated(pool, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6 if "groups" not in options else 8, **{"kernel_size": 3, **options})
    layer = Compensated(conv, 3, init="random", pool=pool)
    x = torch.randn(2, 4, 12, 11)
    y = conv(x)
    assert layer(x).shape == y.shape
    if pool == "kernel":  # a depthwise convolution of the same geometry, each pixel of the window weighing the same
        mean = nn.Conv2d(4, 4, **{"kernel_size": 3, **options, "groups": 4}, bias=False)
        nn.init.constant_(mean.weight, 1 / mean.weight[0, 0].numel())
        pooled = mean(x)
    else:
        pooled = F.adaptive_avg_pool2d(x, y.shape[2:])
    generated = F.conv2d(torch.cat([pooled, y], 1), layer.generator.weight, layer.generator.bias).relu()
    expected = F.conv2d(torch.cat([y, generated], 1), layer.compensator.weight, layer.compensator.bias)
    torch.testing.assert_close(layer(x), expected)
    identity = Compensated(conv, 3, pool=pool)
    torch.testing.assert_close(identity(x), y)
    assert compensation.cost(conv, 3) == sum(
        p.numel() for part in (layer.generator, layer.compensator) for p in part.parameters()
    )


def test_the_core_and_torch_compensate_any_convolution_alike():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=3, dilation=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding="same", groups=2),
        nn.Flatten(),
        nn.Linear(6 * 100, 3),
    ).eval()
    options = {"filters": {"0": 2, "2": 3, "4": 2}, "pool": "kernel", "init": "random"}
    analog = convert(compensate(network, **options).eval(), LogNormalVariation(0.5))
    data = torch.randn(60, 1, 8, 8), torch.arange(60) % 3
    counts = [evaluate(analog, data, 5, engine=e, progress=False).table["correct"].tolist() for e in ("auto", "torch")]
    assert counts[0] == counts[1]


class Twice(nn.Module):
    """One layer under two names, in two containers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.c = nn.Linear(6, 6)
        self.again = self.c
        self.deep = nn.Sequential(nn.ReLU(), self.c)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.deep(self.again(self.c(self.first(x)))))


def test_a_layer_with_several_names_is_compensated_at_all_places(tmp_path):
    torch.manual_seed(0)
    network = Twice().eval()
    compensated = compensate(network, {"c": 3}, init="random").eval()
    assert isinstance(compensated.c, Compensated)
    assert compensated.again is compensated.c is compensated.deep[1]
    x = torch.randn(20, 8)
    y = compensated.first(x)
    expected = compensated.last(compensated.c(compensated.c(compensated.c(y)).relu()))
    assert torch.equal(compensated(x), expected)
    assert len(compensation.compensation_parameters(compensated)) == 4
    save(compensated, tmp_path)
    assert torch.equal(load(network, tmp_path).eval()(x), expected)
    trained = fit_compensators(
        network, {"c": 3}, x, torch.arange(20) % 3, LogNormalVariation(0.3), epochs=1, quiet=True
    )
    assert trained.again is trained.c


@pytest.mark.parametrize(
    ("network", "name", "place"),
    [(nn.Linear(4, 3), "", "layer"), (Block(nn.Linear(4, 3)), "layer", "block")],
)
def test_a_network_that_is_one_layer(network, name, place, tmp_path):
    compensated = compensate(network, {name: 2}, place=place).eval()
    assert isinstance(compensated, Compensated)
    x = torch.randn(5, 4)
    torch.testing.assert_close(compensated(x), network(x))
    save(compensated, tmp_path)
    assert torch.equal(load(network, tmp_path)(x), compensated(x))


def test_a_layer_in_two_blocks_is_not_half_compensated():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(Block(shared), Block(shared))
    with pytest.raises(UserError, match=r"layer '0\.layer' is also used outside of its Block"):
        compensate(network, {"0.layer": 2}, place="block")
    assert isinstance(compensate(network, {"0.layer": 2})[1].layer, Compensated)


def test_a_compensated_layer_is_not_compensated_again(lenet):
    once = compensate(lenet, {"conv1.layer": 2})
    with pytest.raises(UserError, match=r"conv1\.layer\.original is already compensated"):
        compensate(once, {"conv1.layer.original": 2})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"place": "blocks"}, "place must be one of 'layer', 'block', not 'blocks'"),
        ({"activation": "gelu"}, "activation must be one of 'none', 'relu', not 'gelu'"),
        ({"init": "zero"}, "init must be one of 'identity', 'random', not 'zero'"),
        ({"pool": "max"}, "pool must be one of 'adaptive', 'kernel', not 'max'"),
        ({"pools": "adaptive"}, "an option must be one of 'activation', 'init', 'pool', not 'pools'"),
        ({"seed": 1.5}, "the seed must be a whole number, not 1.5"),
    ],
)
def test_options_that_are_not_there(lenet, options, line):
    with pytest.raises(UserError, match=line):
        compensate(lenet, {"conv1.layer": 2}, **options)


@pytest.mark.parametrize("filters", [["conv1.layer"], None, 3])
def test_filters_are_a_mapping(lenet, filters):
    for call in (compensate, compensation.overhead):
        with pytest.raises(UserError, match="filters map names of layers to numbers of filters"):
            call(lenet, filters)


@pytest.mark.parametrize("ratio", [float("nan"), float("inf")])
def test_ratios_are_finite(lenet, ratio):
    with pytest.raises(UserError, match="a ratio of filters must be a finite number"):
        compensation.filters_of(lenet, [0.5, ratio])


def test_training_in_inference_mode_is_refused(blobs, tiny):
    with torch.inference_mode(), pytest.raises(UserError, match="no gradients in"):
        fit(tiny, blobs, Training(epochs=1), 0, quiet=True)


@pytest.mark.parametrize("filters", [1.0, "2", True, None])
def test_filters_are_whole_numbers(lenet, filters):
    with pytest.raises(UserError, match="the number of filters of a generator must be a whole number"):
        compensate(lenet, {"conv1.layer": filters})


def test_the_weights_of_a_compensated_layer_can_be_read(lenet):
    for place, name in (("layer", "conv1.layer"), ("block", "conv1")):
        layer = compensate(lenet, {"conv1.layer": 2}, place=place).get_submodule(name)
        assert torch.equal(layer.weight, lenet.conv1.layer.weight)
        assert torch.equal(layer.bias, lenet.conv1.layer.bias)
        assert "weight" not in dict(layer.named_parameters(recurse=False))
    assert Compensated(nn.Linear(2, 2, bias=False), 1).bias is None


class Direct(nn.Module):
    """Uses the weight of a layer itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return F.linear(F.normalize(self.first(x)), F.normalize(self.second.weight))


class Listed(nn.Module):
    """Calls a layer from a list as well."""

    def __init__(self, both):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 3)
        self.layers, self.both = [self.first], both

    def forward(self, x):
        x = self.first(x) if self.both else x
        return self.second(self.layers[0](x).relu())


@pytest.mark.parametrize(
    ("network", "name", "line"),
    [
        (Direct, "second", "is never called on these images, so compensating it has no effect"),
        (lambda: Listed(False), "first", "is never called on these images"),
        (lambda: Listed(True), "first", "is also called from where it cannot be compensated"),
    ],
)
def test_a_layer_that_is_used_behind_its_back_is_not_trained(network, name, line):
    torch.manual_seed(0)
    network, images = network(), torch.randn(40, 16)
    other = "second" if isinstance(network, Listed) else "first"

    def fitted(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what carries no variation, what is not kept
            return fit_compensators(
                network, {name: 2}, images, torch.arange(40) % 3, LogNormalVariation(0.3), epochs=1, quiet=True
            )

    with pytest.raises(UserError, match=f"{name} {line}"):
        fitted(name)
    assert compensation.compensation_modules(fitted(other)).keys() == {other}


def test_a_vision_transformer_s_linear_layers_are_compensated():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Unflatten(1, (8, 2)), nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 4), nn.Flatten(), nn.Linear(32, 3)
    )
    images = torch.randn(60, 16)
    filters = {"1": 2, "3": 2, "5": 2}
    compensated = fit_compensators(
        network, filters, images, torch.arange(60) % 3, LogNormalVariation(0.3), epochs=2, quiet=True
    )
    assert compensated(images).shape == (60, 3)
    evaluate(convert(compensated, LogNormalVariation(0.3)), (images, torch.arange(60) % 3), 2, progress=False)


VARIATION = LogNormalVariation(1.0)


def trained_tiny(tiny, blobs):
    fit(tiny, blobs, Training(epochs=10, batch=32), seed=0, quiet=True)
    return tiny


@pytest.mark.parametrize("init", ["identity", "random"])
@pytest.mark.parametrize("batchnorm", ["frozen", "updated", "affine"])
@pytest.mark.parametrize("given", [False, True])
def test_compensators_that_end_worse_are_not_kept(tiny, blobs, init, batchnorm, given):
    network = trained_tiny(tiny, blobs)
    validation = (blobs.images[:60], blobs.labels[:60]) if given else None
    options = {"epochs": 1, "learning_rate": 20.0, "init": init, "batchnorm": batchnorm, "validation": validation}
    filters = {"0.layer": 4, "4": 3}
    with pytest.warns(CompensationWarning, match="not kept: over 10 validation chips") as caught:
        compensated = fit_compensators(network, filters, blobs.images, blobs.labels, VARIATION, quiet=True, **options)
    assert Path(caught[0].filename) == Path(__file__), "the warning points at the call"
    with torch.no_grad():
        torch.testing.assert_close(compensated(blobs.images), network(blobs.images))
    assert all(torch.equal(compensated[0].norm.state_dict()[k], v) for k, v in network[0].norm.state_dict().items())
    if given:  # the accuracy that is named is that of the network on chips for this comparison
        chips = streams.chips("validate-fit_compensators", 10)
        bare = evaluate(convert(network, VARIATION), validation, 10, start=chips.start, progress=False)
        assert f"{bare.mean:.2%} without" in str(caught[0].message)


def test_compensators_that_win_are_kept_without_a_word(tiny, blobs):
    network = trained_tiny(tiny, blobs)
    options = {"epochs": 10, "chips_per_batch": 4, "quiet": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compensated = fit_compensators(
            network, {"0.layer": 4, "3.layer": 8, "4": 3}, blobs.images, blobs.labels, VARIATION, **options
        )
    assert not torch.allclose(compensated(blobs.images), network(blobs.images))


class Notes(set):
    """What the copies of a network note, too."""

    def __deepcopy__(self, memo):
        return self


class Seen(nn.Module):
    """Notes the first number of its inputs, and whether they are trained on."""

    def __init__(self):
        super().__init__()
        self.linear, self.trained, self.judged = nn.Linear(4, 3), Notes(), Notes()

    def forward(self, x):
        (self.trained if torch.is_grad_enabled() else self.judged).update(x[:, 0].int().tolist())
        return self.linear(x)


def used(count, **options):
    network = Seen()
    images = torch.randn(count, 4)
    images[:, 0] = torch.arange(count)
    labels = torch.arange(count) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompensationWarning)
        fit_compensators(
            network, {"linear": 2}, images, labels, LogNormalVariation(0.3), epochs=1, quiet=True, **options
        )
    return network.trained, network.judged


@pytest.mark.parametrize("count", [20, 57, 100])
def test_a_tenth_of_the_images_is_held_out(count, monkeypatch):
    monkeypatch.setattr(compensation_training, "check_calls", lambda *_: None)
    trained, judged = used(count)
    assert len(judged) == count // 10
    assert trained | judged == set(range(count))
    assert not trained & judged
    assert used(count) == (trained, judged)
    assert count < 50 or used(count, seed=1)[1] != judged


def test_of_few_images_none_is_held_out(monkeypatch):
    monkeypatch.setattr(compensation_training, "check_calls", lambda *_: None)
    assert used(19) == (set(range(19)), set(range(19)))
    validation = Split(torch.full((5, 4), 77.0), torch.arange(5) % 3)
    assert used(100, validation=validation) == (set(range(100)), {77})


def test_the_caller_s_state_is_left_as_it_was(tiny, blobs):
    tiny.train()
    tiny[0].norm.eval()
    tiny[4].weight.requires_grad_(False)
    tiny[0].layer.to(memory_format=torch.channels_last)
    modes, flags = [m.training for m in tiny.modules()], [p.requires_grad for p in tiny.parameters()]
    strides, images = [p.stride() for p in tiny.parameters()], blobs.images.clone()
    state = {k: v.clone() for k, v in tiny.state_dict().items()}
    numbers = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state(legacy=False))  # noqa: NPY002
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compensated = fit_compensators(
                tiny, {"0.layer": 2}, blobs.images, blobs.labels, VARIATION, epochs=1, batchnorm="updated", quiet=True
            )
        compensate(tiny, {"0.layer": 2})
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(np.random.get_state(legacy=False))) == before[1:]  # noqa: NPY002
        numbers.append(torch.rand(1).item())
        torch.manual_seed(seed)
        assert torch.rand(1).item() == numbers[-1]
    assert len(set(numbers)) == 3
    assert [m.training for m in tiny.modules()] == modes
    assert [p.requires_grad for p in tiny.parameters()] == flags
    assert [p.stride() for p in tiny.parameters()] == strides
    assert all(torch.equal(state[k], v) for k, v in tiny.state_dict().items())
    assert torch.equal(images, blobs.images)
    assert all(p.grad is None for p in tiny.parameters())
    assert not compensated.training
    own = {id(p) for p in compensation.compensation_parameters(compensated)}
    kept = [p.requires_grad for p in compensated.parameters() if id(p) not in own]
    assert kept == flags, "a frozen parameter stays frozen in the copy"


NO_CLASSES = [
    (lambda x, y: (x, y[:150]), "images and labels: 300 images and 150 labels"),
    (lambda x, y: (x[:150], y), "150 images and 300 labels"),
    (lambda x, y: (x, y[:, None]), r"not \(300, 1\)"),
    (lambda x, y: (x, F.one_hot(y)), r"not \(300, 3\)"),
    (lambda x, y: (x, y + 0.5), "whole numbers; these are float32"),
    (lambda x, y: (x, y + 1), "there is a label 3, and the network has 3 classes"),
    (lambda x, y: (x, y - 1), "from 0 on; there is a -1"),
    (lambda x, y: (x[:0], y[:0]), "there are no images"),
    (lambda x, y: (x.numpy(), y.numpy()), "a tensor of images and one of labels are expected"),
    (lambda x, y: (x[:, :, 0], y), "the network cannot run on images of shape"),
    (lambda x, y: ((255 * x).byte(), y), "the network cannot run on images of shape"),
]


@pytest.mark.parametrize(("spoilt", "line"), NO_CLASSES)
def test_inputs_that_are_no_classification(tiny, blobs, spoilt, line):
    def fitted(images, labels, **options):
        with pytest.raises(UserError) as caught:
            fit_compensators(tiny, {"0.layer": 2}, images, labels, VARIATION, quiet=True, **options)
        assert re.search(line, str(caught.value))
        assert str(caught.value).startswith("fit_compensators: ")
        assert len(str(caught.value).splitlines()) == 1

    bad = spoilt(blobs.images, blobs.labels)
    fitted(*bad)
    if "cannot run" not in line:
        line = line.replace("images and labels", "validation")
        fitted(blobs.images, blobs.labels, validation=bad)


@pytest.mark.parametrize("outputs", [nn.Linear(64, 1), nn.Unflatten(1, (8, 8)), nn.Sequential(nn.Flatten(0))])
def test_networks_that_are_no_classifiers(blobs, outputs):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), outputs)
    with pytest.raises(UserError, match=r"must return \(N, classes\) with 2 classes or more"):
        fit_compensators(network, {"1": 2}, blobs.images, blobs.labels * 0, VARIATION, quiet=True)


@pytest.mark.parametrize(
    ("filters", "line"),
    [
        ({"0.layer": 0}, "at least 1 filter, not 0"),
        ({"0.layer": -3}, "at least 1 filter, not -3"),
        ({"0.layer": 1.5}, "whole number, not 1.5"),
        ({"conv": 2}, "no conv or linear layer 'conv'"),
        ([("0.layer", 2)], "filters map names of layers"),
        ("0.layer", "filters map names of layers"),
    ],
)
def test_filters_that_are_none(tiny, blobs, filters, line):
    with pytest.raises(UserError, match=line):
        fit_compensators(tiny, filters, blobs.images, blobs.labels, VARIATION, quiet=True)


def test_a_network_and_its_generators_begin_with_unrelated_weights():
    network = build("lenet5", 10, 1, seed=0, widths=(64, 64, 32, 32))
    compensated = compensate(network, dict.fromkeys(["conv1.layer", "conv2.layer"], 64), seed=0, init="random")
    weights = [network.conv1.layer.weight, network.conv2.layer.weight]
    for name in ("conv1", "conv2"):
        layer = compensated.get_submodule(f"{name}.layer")
        weights += [layer.generator.weight, layer.compensator.weight]
    drawn = torch.stack([w.detach().flatten()[:1600] for w in weights])
    correlation = torch.corrcoef(drawn).fill_diagonal_(0).abs()
    assert correlation.max() < 5 / 1600**0.5


def test_initial_weights_do_not_depend_on_torch_s_default_dtype(lenet):
    first = compensate(lenet, {"conv1.layer": 3}, init="random")
    try:
        torch.set_default_dtype(torch.float64)
        second = compensate(lenet, {"conv1.layer": 3}, init="random")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---- loaders, a loss of one's own, and a folder ----------------------------------------------------------------------

FEW = {"epochs": 2, "batch": 60, "quiet": True}


def unlike_identity(model):
    return {k: v for k, v in model.state_dict().items() if "generator" in k or "compensator" in k}


@pytest.mark.filterwarnings("ignore::correctnet.methods.compensation_training.CompensationWarning")
def test_compensators_are_trained_on_a_loader_and_with_a_loss(tiny, blobs, monkeypatch):
    seen = {}

    def noting(model, train, section, seed, **options):
        seen.update(train=train, **options)

    monkeypatch.setattr(compensation_training, "fit", noting)
    loader = list(zip(blobs.images.split(60), blobs.labels.split(60), strict=True))
    found = fit_compensators(
        tiny, {"0.layer": 2}, loader, variation=VARIATION, validation=loader[:2], loss=F.multi_margin_loss, **FEW
    )
    assert seen["train"] is loader
    assert seen["hooks"].loss is F.multi_margin_loss
    assert list(compensation.compensation_modules(found)) == ["0.layer"]


def test_the_stage_decides_which_chips_and_weights_are_drawn(tiny, blobs):
    data = blobs.images, blobs.labels
    options = {"validation": data, "init": "random", **FEW}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_compensators(tiny, {"4": 2}, *data, VARIATION, stage="compensate", **options)
        other = fit_compensators(tiny, {"4": 2}, *data, VARIATION, **options)
    assert not torch.equal(found[4].generator.weight, other[4].generator.weight)
    section = Compensate(epochs=2, batch=60, init="random")
    analog, plan, hooks = compensation_training.prepare(tiny, {"4": 2}, section, VARIATION, 0, "compensate")
    parameters = compensation_training.trained_parameters(analog, section)
    fit(analog, blobs, section, 0, stage="compensate", parameters=parameters, hooks=hooks, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compensation_training.keep_better(analog, tiny, plan, blobs, 0, "compensate", Simulation(engine="torch"))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in analog.state_dict().items())


@pytest.mark.filterwarnings("ignore::correctnet.methods.compensation_training.CompensationWarning")
def test_a_stopped_call_with_a_folder_is_continued(tiny, blobs, tmp_path):
    stopping, calls = stopping_loss(at=8)  # five batches an epoch

    def call(work, loss):
        options = {"validation": (blobs.images, blobs.labels), "loss": loss, "work": work, **FEW}
        return fit_compensators(tiny, {"4": 2}, blobs.images, blobs.labels, VARIATION, **options)

    whole = call(None, None)
    with pytest.raises(Stopped):
        call(tmp_path, stopping)
    resumed = call(tmp_path, stopping)
    assert len(calls) == 8 + 5
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda d: ([d.images], None, VARIATION, {}), "fit_compensators: validation: a loader's images cannot be held "
         "out; give images and labels on which the compensators are compared with none"),
        (lambda d: (d.images, d.labels, None, {}), "fit_compensators: variation: a device model such as "
         "LogNormalVariation(0.5) is expected"),
        (lambda d: (d.images, d.labels, VARIATION, {"stage": "search"}), "fit_compensators: stage must be "
         "'fit_compensators' or 'compensate', not 'search'"),
        (lambda d: (5, None, VARIATION, {}), "fit_compensators: a pair of tensors (images, labels), or a loader that "
         "yields such pairs and can be iterated over many times, is expected, not a int"),
    ],
)  # fmt: skip
def test_calls_with_loaders_that_are_refused(tiny, blobs, call, line):
    images, labels, variation, options = call(blobs)
    with pytest.raises(UserError) as error:
        fit_compensators(tiny, {"4": 2}, images, labels, variation, **options)
    assert str(error.value) == line
