"""Suppression, compensation and sweep on every kind of layer."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from correctnet import (
    LogNormalVariation,
    UserError,
    check_coverage,
    compensate,
    convert,
    correct,
    evaluate,
    find_candidates,
    fit_compensators,
    load,
    overhead,
    save,
    search,
    sensitivity,
    suppress,
)
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.layers import CoverageWarning
from correctnet.evaluation.montecarlo import EngineWarning
from correctnet.methods import suppression
from correctnet.methods.compensation import Compensated, compensable, filters_of
from correctnet.methods.compensation_training import CompensationWarning

HALF = LogNormalVariation(0.5)

# ---- suppression ---------------------------------------------------------------------------------------------------


class Own(nn.Module):
    analog_parameters = ("table",)

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x):
        return torch.einsum("ocd,ncd->no", self.table, x)


def by_units(layer, *shapes):
    """The matrix of a linear map, (outputs, inputs), column by column from its outputs on unit inputs."""
    columns = []
    for places in itertools.product(*[np.ndindex(*shape) for shape in shapes]):
        units = [torch.zeros(1, *shape) for shape in shapes]
        for unit, place in zip(units, places, strict=True):
            unit[(0, *place)] = 1.0
        columns.append(layer(*units).detach().flatten())
    return torch.stack(columns, 1).double().numpy()


def blocks(layer, names, count):
    """The matrices that are stacked in parameters: of gates, or of queries, keys and values."""
    return [part.detach().double().numpy() for n in names for part in getattr(layer, n).chunk(count)]


def conv(kind, *args, **kwargs):
    return kind(*args, bias=False, **kwargs)


ATTENTION, LSTM, GRU = nn.MultiheadAttention(4, 2), nn.LSTM(3, 4, proj_size=2), nn.GRUCell(3, 4)
# By name: a layer, and its matrices (outputs, inputs), from what it computes. Those of all groups are one here: its
# blocks have the same term of (11).
MAPS = {
    "linear subclass": (conv(type("Sub", (nn.Linear,), {}), 5, 3), lambda m: [by_units(m, (5,))]),
    "conv1d": (conv(nn.Conv1d, 3, 5, 2), lambda m: [by_units(m, (3, 2))]),
    "conv1d grouped": (conv(nn.Conv1d, 4, 6, 3, groups=2), lambda m: [by_units(m, (4, 3))]),
    "conv2d subclass": (conv(type("Sub", (nn.Conv2d,), {}), 4, 2, 2, groups=2), lambda m: [by_units(m, (4, 2, 2))]),
    "conv3d": (conv(nn.Conv3d, 2, 5, 2), lambda m: [by_units(m, (2, 2, 2, 2))]),
    "conv3d grouped": (conv(nn.Conv3d, 2, 4, 2, groups=2), lambda m: [by_units(m, (2, 2, 2, 2))]),
    "transposed1d": (conv(nn.ConvTranspose1d, 3, 2, 4), lambda m: [by_units(m, (3, 1))]),
    "transposed2d grouped": (conv(nn.ConvTranspose2d, 4, 6, 2, groups=2), lambda m: [by_units(m, (4, 1, 1))]),
    "transposed3d": (conv(nn.ConvTranspose3d, 2, 3, 2), lambda m: [by_units(m, (2, 1, 1, 1))]),
    "bilinear": (conv(nn.Bilinear, 2, 3, 4), lambda m: [by_units(m, (2,), (3,))]),
    "attention": (
        ATTENTION,
        lambda m: [*blocks(m, ["in_proj_weight"], 3), *blocks(m.out_proj, ["weight"], 1)],
    ),
    "lstm": (
        LSTM,
        lambda m: [*blocks(m, ["weight_ih_l0", "weight_hh_l0"], 4), *blocks(m, ["weight_hr_l0"], 1)],
    ),
    "cell": (GRU, lambda m: blocks(m, ["weight_ih", "weight_hh"], 3)),
    "own parameter": (Own(), lambda m: [by_units(m, (2, 3))]),
    "spectral_norm": (
        parametrizations.spectral_norm(conv(nn.Conv1d, 3, 5, 2)).eval(),
        lambda m: [by_units(m, (3, 2))],
    ),
}


@pytest.mark.parametrize("form", ["orthogonal", "one-sided"])
@pytest.mark.parametrize("name", MAPS)
def test_the_penalty_of_each_kind_is_the_formula_on_its_maps(name, form):
    layer, maps = MAPS[name]
    lam, wanted = 0.3, 0.0
    for matrix in maps(layer):
        w = matrix.T  # (inputs, outputs), as (11) has it
        if form == "orthogonal":
            wanted += np.square(w.T @ w - lam**2 * np.eye(w.shape[1])).sum()
        else:
            singular = np.linalg.svd(w, compute_uv=False)
            wanted += np.square(np.maximum(0, singular**2 - lam**2)).sum()
    found = suppression.penalty(suppression.analog_weights(layer), lam, form)
    assert found.item() == pytest.approx(wanted, rel=1e-4)
    layer.zero_grad()
    found.backward()
    held = [p for n, p in layer.named_parameters() if "bias" not in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in held)
    norms = [np.linalg.norm(matrix, 2) for matrix in maps(layer)]
    assert max(suppression.spectral_norms(layer).values()) == pytest.approx(max(norms), rel=1e-4)
    analog = convert(layer, HALF)
    assert suppression.spectral_norms(analog) == suppression.spectral_norms(layer)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (4, 3)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 2, 2)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), (4, 1, 1)),
        (nn.Bilinear(2, 3, 4), nn.BatchNorm1d(4), None),
    ],
)
def test_batchnorm_is_folded_into_other_kinds(layer, norm, shape):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    norm.eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = layer, norm

        def forward(self, x):
            return self.norm(self.layer(x) if shape is not None else self.layer(*x))

    net = Net().eval()
    shapes = [(2,), (3,)] if shape is None else [shape]
    zeros = [torch.zeros(1, *each) for each in shapes]

    def slope(*x):
        return (net(*x) - net(*zeros)) if shape is not None else net(x) - net(zeros)

    matrix = by_units(slope, *shapes)
    wanted = np.square(matrix @ matrix.T - 0.09 * np.eye(len(matrix))).sum()
    found = suppression.penalty(suppression.analog_weights(net, {"layer": norm}), 0.3).item()
    assert found == pytest.approx(wanted, rel=1e-3)
    if shape is not None:
        assert suppression.batchnorms(net) == {"layer": norm}


# ---- compensation --------------------------------------------------------------------------------------------------


class Same(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


LAYERS = {
    "tokens": (nn.Linear(3, 5), (2, 7, 3)),
    "tokens in two dimensions": (nn.Linear(3, 5), (2, 4, 7, 3)),
    "conv1d": (nn.Conv1d(3, 5, 3, stride=2), (2, 3, 9)),
    "conv3d": (nn.Conv3d(3, 5, 2, padding=1), (2, 3, 4, 4, 4)),
    "transposed1d": (nn.ConvTranspose1d(3, 5, 3, stride=2), (2, 3, 4)),
    "transposed2d": (nn.ConvTranspose2d(3, 5, 2, stride=2), (2, 3, 4, 4)),
    "subclass": (Same(3, 5, 3), (2, 3, 4, 4)),
    "parametrized": (parametrizations.weight_norm(nn.Conv1d(3, 5, 3)), (2, 3, 9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_compensation_of_other_kinds_is_the_formula(name, dtype):
    layer, shape = LAYERS[name]
    layer = layer.to(dtype)
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(Compensated(layer, 4)(x), layer(x))  # the identity at first
    whole = Compensated(layer, 4, init="random")
    y = layer(x)
    if isinstance(layer, nn.Linear):
        pooled, last = x, lambda v: v
    else:
        axes = x.dim() - 2
        pooled = getattr(F, f"adaptive_avg_pool{axes}d")(x, y.shape[2:])
        pooled, last = pooled.movedim(1, -1), lambda v: v.movedim(1, -1)
    y = last(y)

    def product(part, v):
        return v @ part.weight.flatten(1).t() + part.bias

    generated = product(whole.generator, torch.cat([pooled, y], -1)).relu()
    wanted = product(whole.compensator, torch.cat([y, generated], -1))
    assert whole(x).dtype == dtype
    torch.testing.assert_close(
        last(whole(x)), wanted, **({"rtol": 0.1, "atol": 0.05} if dtype == torch.bfloat16 else {})
    )
    layer.float()


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": "same"}, {"padding": 2, "padding_mode": "circular"}],
)
@pytest.mark.parametrize(("kind", "axes"), [(nn.Conv1d, 1), (nn.Conv3d, 3)])
def test_pooling_by_the_window_of_the_layer(kind, axes, options):
    layer, x = kind(4, 6, 3, **options), torch.randn(2, 4, *(7,) * axes)
    mean = kind(4, 4, 3, **options, groups=4, bias=False)
    nn.init.constant_(mean.weight, 1 / 3**axes)
    whole = Compensated(layer, 2, pool="kernel")
    torch.testing.assert_close(whole._pooled(x, layer(x)), mean(x))


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(3, 4, 3), Same(3, 4, 3)])
def test_a_window_that_is_not_known(layer):
    with pytest.raises(UserError, match=f"the window of {type(layer).__name__} is not known; use 'adaptive'"):
        Compensated(layer, 2, pool="kernel")


class Twice(nn.Module):
    """A layer with two names, on tokens."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.again, self.head = self.mix, nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.again(torch.tanh(self.mix(x))).mean(1))


class Tagger(nn.Module):
    """Convolution, attention, an encoder, a recurrent layer and a parameter, on sequences (N, T, 6)."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.recurrent = nn.GRU(6, 4, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.mix = nn.Parameter(torch.eye(6) + torch.randn(6, 6) / 8)
        self.analog_parameters = ("mix",)

    def forward(self, x):
        x = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2) @ self.mix
        x = self.encoder(x + self.attention(x, x, x)[0])
        return self.head(self.recurrent(x)[0].mean(1))


ORDER = (
    "conv",
    "mix",
    "attention.in_proj_weight",
    "attention.out_proj",
    "encoder.self_attn.in_proj_weight",
    "encoder.self_attn.out_proj",
    "encoder.linear1",
    "encoder.linear2",
    "recurrent.weight_ih_l0",
    "recurrent.weight_hh_l0",
    "head",
)


def tagger():
    torch.manual_seed(2)
    network = Tagger().eval()
    x = torch.randn(80, 5, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network, (x, network(x).argmax(1))


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        for category in (CoverageWarning, EngineWarning, CompensationWarning):
            warnings.simplefilter("ignore", category)
        yield


def test_what_can_be_compensated():
    network, (x, y) = tagger()
    assert set(compensable(network)) == {"conv", "head", "encoder.linear1", "encoder.linear2"}
    for name, kind in (
        ("attention.in_proj_weight", "MultiheadAttention"),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear"),
        ("recurrent.weight_hh_l0", "GRU"),
        ("mix", "Tagger"),
    ):
        for call in (compensate, overhead):
            with pytest.raises(UserError, match=rf"{name} \({kind}\) cannot be compensated: only convolutions"):
                call(network, {name: 2})
    with pytest.raises(UserError, match="cannot be compensated"):
        fit_compensators(network, {"mix": 2}, x, y, HALF, quiet=True)


def test_overhead_is_that_of_the_parameters(tmp_path):
    network, (x, _) = tagger()
    filters = {"conv": 2, "encoder.linear1": 3, "head": 1}
    whole = compensate(network, filters, init="random").eval()

    def count(m):
        return sum(p.numel() for p in m.parameters())

    assert overhead(network, filters) == pytest.approx(count(whole) / count(network) - 1)
    save(whole, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(network, tmp_path / "model").eval()(x), whole(x))
    assert [(c.name.replace(".original", ""), c.index) for c in crossbars(whole)] == [
        (c.name, c.index) for c in crossbars(network)
    ]
    assert filters_of(network, [0.5, 0, 0.25]) == {"head": 2, "encoder.linear2": 2}


@torch.no_grad()
def test_torchs_transformer_layer_calls_what_is_compensated():
    network, (x, _) = tagger()
    with torch.no_grad():
        wanted = network(x)
    identity = compensate(network, {"encoder.linear1": 2, "encoder.linear2": 2}).eval()
    torch.testing.assert_close(identity(x), wanted)
    identity.encoder.linear1.compensator.bias += 10  # shows, in evaluation and without gradients
    assert not torch.allclose(identity(x), wanted, atol=0.1)
    training = identity.train()(x)  # no dropout
    torch.testing.assert_close(identity.eval()(x), training)
    names = check_coverage(identity, convert(identity, HALF), x[:4])
    assert len(names) == len(ORDER)
    assert "encoder.linear1.original" in names


def test_a_layer_with_two_names_on_tokens(quiet):
    torch.manual_seed(0)
    network, x = Twice().eval(), torch.randn(60, 4, 6)
    with torch.no_grad():
        y = network(x).argmax(1)
    whole = fit_compensators(network, {"mix": 3}, x, y, HALF, epochs=2, quiet=True)
    assert whole.mix is whole.again
    assert isinstance(whole.mix, Compensated)
    added, before = 3 * 13 + 6 * 10, sum(p.numel() for p in network.parameters())
    assert overhead(network, {"mix": 3}) == pytest.approx(added / before)


# ---- the whole method ----------------------------------------------------------------------------------------------


def test_the_sweep_varies_from_layer_i_on_in_the_order_of_execution(quiet):
    network, data = tagger()
    found = find_candidates(network, data, HALF, chips=3, seed=4, progress=False)
    assert found.names == ORDER
    index = {c.name: c.index for c in crossbars(network)}
    start = int(found.results[1].table["sample"].min())
    for i in (1, 3, 7, 10, 11):
        counts = []
        for sample in range(start, start + 3):
            twin, _ = tagger()
            with torch.no_grad():
                for each in crossbars(twin):
                    if each.name in ORDER[i - 1 :]:
                        each.weight.copy_(HALF.sample(each.weight.detach().clone(), 4, index[each.name], sample))
                counts.append(int((twin(data[0]).argmax(1) == data[1]).sum()))
        assert found.results[i].table["correct"].tolist() == counts, i


def test_the_sweep_in_order_of_registration_with_parameters_by_name(quiet):
    """The index of a named parameter is not its position, by which `first_layer` would leave it out."""

    class Mixing(nn.Module):
        analog_parameters = ("mix",)

        def __init__(self):
            super().__init__()
            self.scale, self.mix = nn.Parameter(torch.ones(6)), nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return torch.relu(x @ self.mix) * self.scale

    torch.manual_seed(1)
    network, x = nn.Sequential(nn.Linear(6, 6), Mixing(), Mixing()).eval(), torch.randn(50, 6)
    index = {c.name: c.index for c in crossbars(network)}
    assert index == {"0": 0, "1.mix": 1 + 3, "2.mix": 1 + 5}
    with torch.no_grad():
        labels = network(x).argmax(1)
    found = find_candidates(network, (x, labels), HALF, chips=3, progress=False)
    for i, result in found.results.items():
        counts = []
        for sample in result.table["sample"]:
            twin = copy.deepcopy(network)
            with torch.no_grad():
                for each in crossbars(twin)[i - 1 :]:
                    each.weight.copy_(HALF.sample(each.weight.detach().clone(), 0, each.index, int(sample)))
                counts.append(int((twin(x).argmax(1) == labels).sum()))
        assert result.table["correct"].tolist() == counts, i


def test_the_sensitivity_of_each_weight_alone(quiet):
    network, data = tagger()
    table = sensitivity(network, data, HALF, chips=2, progress=False)
    assert tuple(table.drop_duplicates("name")["name"]) == ORDER
    weights = {c.name: c.weight.numel() for c in crossbars(network)}
    assert dict(zip(table["name"], table["weights"], strict=True)) == weights


def test_suppression_lowers_the_norms_of_every_kind(quiet):
    network, data = tagger()
    before = suppression.spectral_norms(network)
    after = suppression.spectral_norms(suppress(network, data, HALF, epochs=30, beta=0.05, progress=False))
    assert before.keys() == after.keys() == set(ORDER)
    # Those of the recurrent weights and the head are near lambda from the start.
    falling = [name for name, norm in before.items() if norm > 1]
    assert len(falling) > 4
    assert all(after[name] < before[name] for name in falling), (before, after)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "derive",
    [
        lambda m, name: prune.l1_unstructured(m, name, amount=0.3),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_suppression_of_derived_weights(derive, quiet):
    network, data = tagger()
    for name, own in (("conv", "weight"), ("recurrent", "weight_hh_l0"), ("attention", "in_proj_weight")):
        derive(network.get_submodule(name), own)
    with torch.no_grad():
        network(data[0])
    hand = {c.name: suppression.penalty([c.matrices(c.weight)], 0.34).item() for c in crossbars(network)}
    trained = suppress(network, data, HALF, epochs=3, beta=0.05, learning_rate=0.01, progress=False)
    after = {c.name: suppression.penalty([c.matrices(c.weight)], 0.34).item() for c in crossbars(trained)}
    assert sum(after.values()) < 0.9 * sum(hand.values())
    whole = fit_compensators(trained, {"conv": 2, "head": 1}, *data, HALF, epochs=1, quiet=True)
    analog = convert(whole, HALF)
    assert len(check_coverage(whole, analog, data[0][:4])) == len(ORDER)


def test_the_search_leaves_out_what_cannot_be_compensated(quiet):
    network, data = tagger()
    settings = {"evaluations": 2, "train_epochs": 1, "chips": 2, "progress": False}
    with pytest.warns(CompensationWarning, match=r"mix, recurrent\.weight_ih_l0 cannot be compensated and left out"):
        placed = search(network, ["conv", "mix", "recurrent.weight_ih_l0"], data, data, HALF, limit=0.9, **settings)
    assert placed.candidates == ("conv",)


def test_the_whole_method_on_a_network_of_all_kinds(quiet, tmp_path):
    network, data = tagger()
    how = {
        "chips": 3,
        "suppress": {"epochs": 1},
        "sweep": {"chips": 2},
        "search": {"evaluations": 2, "train_epochs": 1, "chips": 2},
        "compensate": {"epochs": 1},
    }
    found = correct(network, data, data, data, HALF, limit=0.9, work=tmp_path, progress=False, **how)
    assert found.sweep.names == ORDER
    assert list(found.table["row"]) == ["unprotected", "suppressed", "corrected"]
    again = correct(network, data, data, data, HALF, limit=0.9, work=tmp_path, progress=False, **how)
    assert found.table.equals(again.table)
    start = int(found.results["corrected"].table["sample"].min())
    result = evaluate(convert(found.network, HALF), data, 3, start=start, progress=False)
    assert result.mean == found.results["corrected"].mean
