"""Every kind of layer on its crossbars, against plain torch with explicitly noisy weights."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from correctnet import LogNormalVariation, UserError, check_coverage, chip, convert, evaluate, program, programmed
from correctnet.crossbar.kinds import KINDS, crossbars
from correctnet.crossbar.layers import AnalogModule, CoverageWarning, analog_layers, crossbar_layers
from correctnet.crossbar.modules import hold_nominal
from correctnet.crossbar.probe import left_alone
from correctnet.engine.engine import Engine
from correctnet.evaluation.montecarlo import EngineWarning

HALF = LogNormalVariation(0.5)
SEED = 11
COUNT = 60


class Same(nn.Conv2d):
    """Pads by itself, and so is no `nn.Conv2d` that the core knows."""

    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """Computes with another function of its weight."""

    def forward(self, x):
        weight = self.weight / self.weight.flatten(1).std(1).view(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Adapted(nn.Linear):
    """A linear layer with a low-rank branch, whose parameters are its own."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x):
        return super().forward(x) + F.linear(self.down(x), self.up)


class Own(nn.Module):
    """A head of the user's, which multiplies with a parameter."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(outputs, inputs) / 4), nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        return self.scale * (x @ self.weight.t())


class Sequence(nn.Module):
    """Computes `body` on sequences (N, T, 6) and its mean over time by a linear head."""

    def __init__(self, body, width, call=None):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 5)
        self.call = call or (lambda body, x: body(x)[0])

    def forward(self, x):
        return self.head(self.call(self.body, x).mean(1))


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(6, 7), nn.Linear(7, 5)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.head = nn.Bilinear(6, 6, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.pair(x[:, 0], x[:, 1])))


def chain(*modules):
    return nn.Sequential(*modules)


def sideways(body, x):
    """Time first, for modules without batch_first."""
    return body(x.transpose(0, 1))[0].transpose(0, 1)


def cross(body, x):
    """Attention with other keys and values, and masks."""
    return body(x, 2 * x, x - 1, attn_mask=torch.eye(x.shape[1], dtype=torch.bool), need_weights=False)[0]


def narrow(body, x):
    return body(x, x[..., :4], x - 1)[0]


class Even(nn.Module):
    def forward(self, weight):
        return weight - weight.mean(1, keepdim=True)


TOKENS = (4, 6)
# By name: the network, its input, and the layer index of each weight on a crossbar, by hand.
NETWORKS = {
    "conv1d": (
        lambda: chain(nn.Conv1d(3, 8, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)),
        (3, 10),
        {"3.weight": 0, "0.weight": 1},
    ),
    "conv1d grouped": (
        lambda: chain(nn.Conv1d(4, 8, 3, groups=2, padding="same"), nn.Flatten(), nn.Linear(80, 5)),
        (4, 10),
        {"2.weight": 0, "0.weight": 1},
    ),
    "conv3d": (
        lambda: chain(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)),
        (2, 4, 4, 4),
        {"3.weight": 0, "0.weight": 1},
    ),
    "transposed1d": (
        lambda: chain(nn.ConvTranspose1d(3, 4, 3, 2), nn.Flatten(), nn.Linear(44, 5)),
        (3, 5),
        {"2.weight": 0, "0.weight": 1},
    ),
    "transposed2d": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(216, 5)),
        (3, 6, 6),
        {"0.weight": 0, "3.weight": 1, "1.weight": 2},
    ),
    "transposed3d": (
        lambda: chain(nn.ConvTranspose3d(2, 3, 2), nn.Flatten(), nn.Linear(81, 5)),
        (2, 2, 2, 2),
        {"2.weight": 0, "0.weight": 1},
    ),
    "bilinear": (Two, TOKENS, {"head.weight": 0, "pair.weight": 1}),
    "attention": (
        lambda: Sequence(nn.MultiheadAttention(6, 2, batch_first=True), 6, lambda body, x: body(x, x, x)[0]),
        TOKENS,
        {"head.weight": 0, "body.in_proj_weight": 1, "body.out_proj.weight": 2},
    ),
    "attention, time first": (
        lambda: Sequence(nn.MultiheadAttention(6, 2), 6, lambda body, x: sideways(lambda y: body(y, y, y), x)),
        TOKENS,
        {"head.weight": 0, "body.in_proj_weight": 1, "body.out_proj.weight": 2},
    ),
    "attention, crossed": (
        lambda: Sequence(nn.MultiheadAttention(6, 2, batch_first=True, bias=False), 6, cross),
        TOKENS,
        {"head.weight": 0, "body.in_proj_weight": 1, "body.out_proj.weight": 2},
    ),
    "attention, three weights": (
        lambda: Sequence(nn.MultiheadAttention(6, 2, batch_first=True, kdim=4), 6, narrow),
        TOKENS,
        {"head.weight": 0, **{f"body.{w}_proj_weight": i for i, w in enumerate("qkv", 1)}, "body.out_proj.weight": 4},
    ),
    "encoder": (
        lambda: Sequence(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 6, lambda body, x: body(x)),
        TOKENS,
        {
            "body.linear1.weight": 0,
            "body.linear2.weight": 1,
            "head.weight": 2,
            "body.self_attn.in_proj_weight": 3,
            "body.self_attn.out_proj.weight": 4,
        },
    ),
    "lstm": (
        lambda: Sequence(nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True), 14),
        TOKENS,
        {
            "head.weight": 0,
            **{
                f"body.weight_{kind}_l{layer}{end}": 1 + 4 * layer + 2 * bool(end) + (kind == "hh")
                for layer in (0, 1)
                for end in ("", "_reverse")
                for kind in ("ih", "hh")
            },
        },
    ),
    "lstm with projections": (
        lambda: Sequence(nn.LSTM(6, 7, proj_size=3), 3, sideways),
        TOKENS,
        {"head.weight": 0, "body.weight_ih_l0": 1, "body.weight_hh_l0": 2, "body.weight_hr_l0": 3},
    ),
    "gru": (
        lambda: Sequence(nn.GRU(6, 7, bias=False), 7, sideways),
        TOKENS,
        {"head.weight": 0, "body.weight_ih_l0": 1, "body.weight_hh_l0": 2},
    ),
    "rnn": (
        lambda: Sequence(nn.RNN(6, 7, batch_first=True), 7),
        TOKENS,
        {"head.weight": 0, "body.weight_ih_l0": 1, "body.weight_hh_l0": 2},
    ),
    **{
        f"{kind.__name__}": (
            lambda kind=kind: Cells(kind),
            TOKENS,
            {"head.weight": 0, "cell.weight_ih": 1, "cell.weight_hh": 2},
        )
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    },
    "subclasses": (
        lambda: chain(Same(3, 4, 3), Standardised(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), Adapted(8, 5)),
        (3, 6, 6),
        {"4.weight": 0, "5.down.weight": 1, "0.weight": 2, "1.weight": 3, "5.weight": 4},
    ),
    "own parameters": (
        lambda: chain(nn.Linear(6, 8), nn.ReLU(), Own(8, 8), nn.ReLU(), Own(8, 5)),
        (6,),
        {"0.weight": 0, "2.weight": 3, "4.weight": 5},
    ),
}
NAMED = {"own parameters": ["4.weight", "2.weight"]}


def images(shape, count=COUNT):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def made(name):
    torch.manual_seed(5)
    make, shape, indices = NETWORKS[name]
    network = make().eval()
    for p in network.parameters():
        p.data = p.data.clone()
    return network, images(shape), indices


def converted(name, network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        return convert(network, HALF, SEED, analog=NAMED.get(name, ()))


@torch.no_grad()
def noisy(network, indices, sample):
    """A copy of the plain network whose weights on crossbars are those of a chip, as copies of the parameters."""
    twin = copy.deepcopy(network)
    for name, index in indices.items():
        weight = twin.get_parameter(name)
        weight.copy_(HALF.sample(weight.clone(), SEED, index, sample))
    return twin


@pytest.fixture(params=NETWORKS)
def case(request):
    network, x, indices = made(request.param)
    return request.param, network, x, indices


@torch.no_grad()
def test_each_kind_computes_with_the_weights_of_its_chip(case):
    name, network, x, indices = case
    before = copy.deepcopy(network.state_dict())
    analog = converted(name, network)
    assert list(analog.state_dict()) == list(before)
    nominal = network(x)
    assert torch.equal(analog(x), nominal)
    assert len(check_coverage(network, analog, x[:6], sample=3)) == len(indices)
    for sample in (0, 7, 2**32 - 1):
        wanted = noisy(network, indices, sample)(x)
        assert not torch.allclose(wanted, nominal, rtol=1e-2)
        with programmed(analog, sample):
            found = analog(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(chip(analog, sample)(x), wanted)
    assert torch.equal(analog(x), nominal)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_evaluation_of_each_kind_counts_what_plain_networks_do(case):
    name, network, x, indices = case
    with torch.no_grad():
        labels = network(x).argmax(1)
        wanted = [int((noisy(network, indices, k)(x).argmax(1) == labels).sum()) for k in range(5)]
    analog = converted(name, network)
    assert len(set(wanted)) > 1
    for engine in ("auto", "torch"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = evaluate(analog, (x, labels), 5, engine=engine, progress=False)
        assert found.table.correct.tolist() == wanted, engine
        assert {w.category for w in caught} <= {EngineWarning}
        if engine == "auto" and name not in ("own parameters", "conv1d", "conv1d grouped"):
            assert caught, "not all of these kinds are fused"


def test_a_weight_that_a_chip_does_not_vary_is_nominal(case):
    """Each weight alone: so none takes another's address, and none is left out."""
    name, network, x, indices = case
    for own, index in indices.items():
        others = [n for n in indices if n != own]
        with torch.no_grad():
            wanted = noisy(network, {own: index}, 4)(x)
        analog = converted(name, network)
        for each in crossbars(analog):
            path = f"{each.name}.{each.parameter}".lstrip(".")
            path = path if path in indices else each.name
            if path in others:
                hold_nominal(each.module, [each.parameter])
        with torch.no_grad(), programmed(analog, 4):
            torch.testing.assert_close(analog(x), wanted, rtol=1e-5, atol=1e-6)


def test_gradients_on_a_chip_are_those_through_the_factors(case):
    name, network, x, indices = case
    analog = converted(name, network)
    analog.train()
    for module in (analog, network.train()):
        for each in module.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
            if isinstance(each, nn.MultiheadAttention):
                each.dropout = 0.0
    weights = {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters()}
    ones = {n: HALF.sample(torch.ones_like(weights[n]).detach(), SEED, i, 9) for n, i in indices.items()}
    varied = {n: w * ones[n] if n in ones else w for n, w in weights.items()}
    torch.func.functional_call(network, varied, (x,)).square().sum().backward()
    with programmed(analog, 9):
        analog(x).square().sum().backward()
        twin = copy.deepcopy(analog)  # after a pass with gradients
    for own, p in analog.named_parameters():
        scale = weights[own].grad.abs().max().item()
        torch.testing.assert_close(p.grad, weights[own].grad, rtol=1e-3, atol=1e-4 * scale, msg=own)
    with torch.no_grad(), programmed(twin, 9), programmed(analog, 9):
        assert torch.equal(twin.eval()(x), analog.eval()(x))


def test_copies_and_pickles(case):
    name, network, x, _ = case
    if isinstance(network, Sequence):  # a lambda cannot be pickled
        network = network.body
        x = [x, x[..., : network.kdim], x] if isinstance(network, nn.MultiheadAttention) else [x]
    else:
        x = [x]
    analog = converted(name, network)
    program(analog, 6)

    def outputs(model):
        return torch.cat([y.flatten() for y in tree_leaves(model(*x)) if isinstance(y, torch.Tensor)])

    with torch.no_grad():
        wanted = outputs(analog)
        for twin in (copy.deepcopy(analog), pickle.loads(pickle.dumps(analog))):
            assert torch.equal(outputs(twin), wanted)
            assert [own.layer_index for own in analog_layers(twin)] == [
                own.layer_index for own in analog_layers(analog)
            ]
            program(twin, None)
            assert torch.equal(outputs(twin), outputs(network))
        assert torch.equal(outputs(analog), wanted)


@torch.no_grad()
def test_several_chips_in_a_batch_are_those_chips(case):
    name, network, x, _ = case
    analog, chips = converted(name, network), [3, 8, 3]
    parts = []
    for sample, part in zip(chips, x.chunk(3), strict=True):
        with programmed(analog, sample):
            parts.append(analog(part))
    torch.backends.mha.set_fastpath_enabled(False)  # reads weights itself, of which there are three
    try:
        with programmed(analog, chips):
            if name == "own parameters":
                with pytest.raises(UserError, match="several chips are programmed"):
                    analog(x)
                return
            torch.testing.assert_close(analog(x), torch.cat(parts), rtol=1e-4, atol=1e-5)
            with pytest.raises(UserError, match=r"3 chips share each batch|has none"):
                analog(x[:4])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# ---- what is read past the attributes ------------------------------------------------------------------------------


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "kernel"), [("attention", "_native_multi_head_attention"), ("encoder", "_transformer_encoder_layer_fwd")]
)
@torch.no_grad()
def test_torchs_fused_attention_computes_with_the_weights_of_the_chip(name, kernel):
    network, x, indices = made(name)
    analog = converted(name, network)
    with left_alone(analog), programmed(analog, 2), Called() as called:
        found = analog(x)
    assert kernel in called.names
    assert torch.equal(found, noisy(network, indices, 2)(x))


@torch.no_grad()
def test_recurrent_layers_forget_a_chip():
    network, x, indices = made("lstm")
    analog = converted("lstm", network)
    outputs = {}
    for sample in (None, 3, None, 5, 3, None):
        with programmed(analog, sample):
            found = analog(x)
        assert torch.equal(found, outputs.setdefault(sample, found))
    assert all(a is b for a, b in zip(analog.body._flat_weights, analog.body.parameters(), strict=True))
    analog.body.weight_hh_l0.mul_(0.5)
    network.body.weight_hh_l0.mul_(0.5)
    with programmed(analog, 3):
        torch.testing.assert_close(analog(x), noisy(network, indices, 3)(x))
    assert torch.equal(analog.double()(x.double()), network.double()(x.double()))


@torch.no_grad()
def test_a_recurrent_layer_on_packed_sequences_and_states():
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 7).eval()
    x = pack_padded_sequence(torch.randn(5, 3, 6), [5, 4, 2])
    state = torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    analog = convert(lstm, HALF, SEED)
    wanted = noisy(lstm, {"weight_ih_l0": 0, "weight_hh_l0": 1}, 3)
    program(analog, 3)
    torch.testing.assert_close(analog(x, state)[0].data, wanted(x, state)[0].data)
    torch.testing.assert_close(analog(x, state)[1], wanted(x, state)[1])
    program(analog, [1, 2, 3])
    with pytest.raises(UserError, match="cannot share a packed sequence"):
        analog(x, state)
    x = torch.randn(5, 3, 6)
    _, (hidden, _) = analog(x, state)
    for i, sample in enumerate((1, 2, 3)):
        own = noisy(lstm, {"weight_ih_l0": 0, "weight_hh_l0": 1}, sample)
        part = own(x[:, i : i + 1], tuple(s[:, i : i + 1] for s in state))[1][0]
        torch.testing.assert_close(hidden[:, i : i + 1], part)


class Leaking(nn.GRU):
    """Computes with the list of weights itself."""

    def forward(self, x):
        return F.linear(x, dict(self.named_parameters())["weight_ih_l0"])[..., :7], None


def test_nominal_weights_that_are_used_past_a_module_give_no_accuracy():
    network = Sequence(Leaking(6, 7, batch_first=True), 7)
    x = images(TOKENS)
    with pytest.raises(UserError, match=r"variation does not reach body\.weight_ih_l0"):
        evaluate(convert(network, HALF), (x, torch.zeros(len(x), dtype=torch.long)), 2, progress=False)


# ---- derived weights -----------------------------------------------------------------------------------------------

DERIVED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Even()),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", DERIVED)
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d"])
@torch.no_grad()
def test_derived_weights(layer, how):
    torch.manual_seed(1)
    first = {"linear": nn.Linear(36, 8), "conv1d": nn.Conv1d(1, 8, 36), "conv2d": nn.Conv2d(1, 8, 6)}[layer]
    shape = {"linear": (36,), "conv1d": (1, 36), "conv2d": (1, 6, 6)}[layer]
    network = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    DERIVED[how](first)
    x = images(shape)
    network(x)
    network.eval()(x)
    # New kinds and the new API come after those that were analog first.
    after = layer == "conv1d" or not (how.startswith("old") or how == "pruned")
    indices = {0: 1, 3: 0} if after else {0: 0, 3: 1}
    bare = copy.deepcopy(network)
    bare[0] = {"linear": nn.Linear(36, 8), "conv1d": nn.Conv1d(1, 8, 36), "conv2d": nn.Conv2d(1, 8, 6)}[layer]
    bare[0].bias.copy_(first.bias)
    analog = convert(network, HALF, SEED)
    assert torch.equal(analog(x), network(x))
    assert set(check_coverage(network, analog, x[:4])) == {"0", "3"}
    labels, counts = network(x).argmax(1), []
    for sample in range(4):
        for place, index in indices.items():
            bare[place].weight.copy_(HALF.sample(network[place].weight.detach().clone(), SEED, index, sample))
        counts.append(int((bare(x).argmax(1) == labels).sum()))
        with programmed(analog, sample):
            torch.testing.assert_close(analog(x), bare(x))
        plain = chip(analog, sample)
        torch.testing.assert_close(plain(x), bare(x))
        assert not any(isinstance(m, AnalogModule) for m in plain.modules())
        assert {n for n, _ in plain.named_parameters()} == {"0.weight", "0.bias", "3.weight", "3.bias"}
        assert type(plain[0]) is type(bare[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        for engine in ("auto", "torch"):
            assert evaluate(analog, (x, labels), 4, engine=engine, progress=False).table.correct.tolist() == counts
    assert torch.equal(analog(x), network(x))  # the class of the original has kept its parametrization


def test_derived_weights_of_modules_with_several():
    torch.manual_seed(1)
    network = Sequence(nn.LSTM(6, 7, batch_first=True), 7).eval()
    parametrizations.weight_norm(network.body, "weight_hh_l0")
    x = images(TOKENS)
    analog = convert(network, HALF, SEED)
    assert len(check_coverage(network, analog, x[:4])) == 3
    bare = Sequence(nn.LSTM(6, 7, batch_first=True), 7).eval()
    with torch.no_grad():
        for name, index in {"head.weight": 0, "body.weight_ih_l0": 1, "body.weight_hh_l0": 2}.items():
            module, _, own = name.rpartition(".")
            weight = getattr(network.get_submodule(module), own)
            bare.get_parameter(name).copy_(HALF.sample(weight.detach().clone(), SEED, index, 5))
        for name in ("head.bias", "body.bias_ih_l0", "body.bias_hh_l0"):
            bare.get_parameter(name).copy_(network.get_parameter(name))
        with programmed(analog, 5):
            torch.testing.assert_close(analog(x), bare(x))
        torch.testing.assert_close(chip(analog, 5)(x), bare(x))


def test_spectral_norm_is_estimated_once_a_training_pass():
    torch.manual_seed(0)
    network = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 3)).train()
    analog = convert(network, HALF).train()
    program(analog, 1)
    x = torch.randn(4, 8)
    for _ in range(3):
        network(x)
        analog(x)
    for own, other in zip(network.buffers(), analog.buffers(), strict=True):
        assert torch.equal(own, other)


def test_a_module_that_is_parametrized_after_its_conversion():
    for layer, x in ((nn.Conv1d(3, 4, 3), images((3, 6))), (nn.Linear(3, 4), images((3,)))):
        analog = convert(layer, HALF)
        with pytest.raises(UserError, match="parametrize, then convert"):
            parametrizations.weight_norm(analog)(x)


# ---- names and addresses -------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(6, 6, batch_first=True)
        self.first = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.sub = Adapted(6, 6)
        self.conv = nn.Conv2d(1, 2, 1)
        self.table = nn.Parameter(torch.randn(3, 6))
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = self.sub(self.first(self.recurrent(x)[0]))
        x = self.attention(x, x, x)[0] + self.conv(x[:, None]).mean(1)
        return self.last(x.mean(1) + self.table.sum(0))


def test_layers_that_were_analog_before_keep_their_addresses():
    """Their index is the position among exact Conv2d and Linear, as before there were other kinds."""
    network = Mixed()
    old = [n for n, m in network.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert old == ["first", "sub.down", "conv", "last"]
    assert [(c.name, c.index) for c in crossbars(network)] == [
        *((name, i) for i, name in enumerate(old)),
        ("recurrent.weight_ih_l0", 4),
        ("recurrent.weight_hh_l0", 5),
        ("attention.in_proj_weight", 6),
        ("attention.out_proj", 7),
        ("sub", 8),
    ]
    kept = {c.name: c.index for c in crossbars(network)}
    for names in (["table"], ["sub.up", "table"], ["table", "sub.up"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            analog = convert(network, HALF, analog=names, exclude="attention")
        found = {c.name: c.index for c in crossbars(analog)}
        assert {n: i for n, i in found.items() if n not in names} == kept
        position = [n for n, _ in network.named_parameters()].index
        assert {n: found[n] for n in names} == {n: len(kept) + position(n) for n in names}
    assert [name for name, _ in crossbar_layers(network)] == list(kept)


def test_single_weights_can_be_excluded():
    network, x = Mixed().eval(), images((3, 6))
    excluded = ["recurrent.weight_hh_l0", "attention.in_proj_weight", "sub.up", "table", "first"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analog = convert(network, HALF, SEED, exclude=excluded)
    wanted = {
        "sub.down.weight": 1,
        "conv.weight": 2,
        "last.weight": 3,
        "recurrent.weight_ih_l0": 4,
        "attention.out_proj.weight": 7,
        "sub.weight": 8,
    }
    assert [own.layer_index for own in analog_layers(analog)] == list(wanted.values())
    with torch.no_grad(), programmed(analog, 3):
        torch.testing.assert_close(analog(x), noisy(network, wanted, 3)(x))
    assert set(check_coverage(network, analog, x[:3])) == {n.removesuffix(".weight") for n in wanted}


def test_parameters_without_variation_are_named():
    with pytest.warns(CoverageWarning) as caught:
        convert(Mixed(), HALF)
    text = str(caught[0].message)
    assert "no variation on table, sub.up: " in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Mixed(), HALF, analog=["table", "sub.up"])


def test_a_module_names_its_own_parameters():
    class Named(Own):
        analog_parameters = ("weight",)

    torch.manual_seed(0)
    network, x = chain(nn.Linear(6, 8), Named(8, 5)).eval(), images((6,))
    analog = convert(network, HALF, SEED)
    assert check_coverage(network, analog, x[:3]) == ["0", "1.weight"]
    with torch.no_grad(), programmed(analog, 2):
        torch.testing.assert_close(analog(x), noisy(network, {"0.weight": 0, "1.weight": 3}, 2)(x))
    root = Named(6, 5).eval()  # the network itself
    analog = convert(root, HALF, SEED)
    assert check_coverage(root, analog, x[:3]) == ["weight"]


class Holder(nn.Module):
    """A network that holds a parameter on a crossbar beside its layers; the parameter is the first factor, or bare."""

    analog_parameters = ("mix",)

    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)
        self.mix, self.scale = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.last(torch.relu(torch.relu(self.first(x)) @ self.mix) * self.scale)


@pytest.mark.parametrize("inside", [False, True])
def test_the_layers_beside_a_parameter_by_name_are_fused(inside):
    torch.manual_seed(0)
    network, x = Holder().eval(), images((6,))
    network = chain(network, nn.ReLU()) if inside else network
    before = "0." if inside else ""
    report = Engine(convert(network, HALF), x).report
    assert set(report.fused) == {f"{before}first", f"{before}last"}
    assert report.unfused == (f"{before}mix",)
    assert report.unused == (f"{before}spare",)
    wanted = {f"{before}{n}": i for n, i in {"first.weight": 0, "last.weight": 2, "mix": 3}.items()}
    with torch.no_grad():
        labels = network(x).argmax(1)
        counts = [int((noisy(network, wanted, k)(x).argmax(1) == labels).sum()) for k in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert evaluate(convert(network, HALF, SEED), (x, labels), 4, progress=False).table.correct.tolist() == counts


class Owned(nn.Conv1d):
    """Has methods and attributes of its own, some under names that analog layers use."""

    def __init__(self, name=None):
        super().__init__(1, 2, 3)
        if name:
            setattr(self, name, "mine")

    def margin(self):
        return self.padding


class Parted(Owned):
    def crossbars(self):
        return []


@pytest.mark.parametrize("name", ["owner", "parameter", "chip", "variation", "nominal", "batch_axis", "parts"])
def test_names_of_analog_layers_are_theirs(name):
    assert convert(Owned("other"), HALF).margin() == (0,)
    with pytest.raises(UserError, match=f"convert: the layer has an attribute '{name}', as analog layers do; rename"):
        convert(Owned(name), HALF)
    with pytest.raises(UserError, match=r"convert: 0 has an attribute 'crossbars', as analog layers do"):
        convert(chain(Parted()), HALF)
    holder = Holder()
    holder.variation = holder.owner = "mine"  # modules that only hold a parameter have few names
    assert convert(holder, HALF).owner == "mine"


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 6), torch.randn(5, 6)])
        self.codes = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
        self.register_buffer("fixed", torch.randn(5, 5))
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.scale * F.linear(torch.relu(F.linear(x, self.weights[0])), self.weights[1]) @ self.fixed


def test_parameters_of_lists():
    network, x = Listed().eval(), images((6,))
    analog = convert(network, HALF, SEED, analog=["weights.0", "weights.1"], exclude="codes")
    assert check_coverage(network, analog, x[:3]) == ["weights.0", "weights.1"]
    with torch.no_grad(), programmed(analog, 2):
        torch.testing.assert_close(analog(x), noisy(network, {"weights.0": 2, "weights.1": 3}, 2)(x))


@pytest.mark.parametrize(
    ("network", "names", "line"),
    [
        (Listed, ["weight"], "convert: analog: the model has no parameter 'weight'"),
        (Listed, "weights.2", "convert: analog: the model has no parameter 'weights.2'"),
        (Listed, ["codes"], "convert: analog: codes is int64; a crossbar holds floating-point weights"),
        (Listed, ["fixed"], "convert: analog: fixed is a buffer; a crossbar holds trained parameters"),
        (Listed, ["scale"], r"convert: analog: scale has 1 dimensions; a crossbar holds matrices, \(out, in, ...\)"),
        (lambda: chain(nn.LazyConv1d(4, 3)), (), "convert: its module '0' is lazy and has no weights yet"),
        (lambda: nn.LazyLinear(4), (), "convert: the model is lazy and has no weights yet"),
        (lambda: nn.LSTM(3, 4, device="meta"), (), "convert: the model is on the device meta"),
        (Listed, (), "convert: the model has no layer left to convert"),
    ],
)
def test_parameters_that_cannot_be_on_a_crossbar(network, names, line):
    with pytest.raises(UserError, match=line):
        convert(network(), HALF, analog=names)


def test_a_declared_parameter_that_the_module_does_not_have():
    network = Own(6, 5)
    network.analog_parameters = ("weights",)
    with pytest.raises(UserError, match="convert: analog: the model has no parameter 'weights'"):
        convert(network, HALF)


def test_a_lazy_layer_that_has_seen_a_batch():
    network, x = chain(nn.LazyConv1d(4, 3), nn.Flatten(), nn.LazyLinear(5)).eval(), images((3, 8))
    network(x)
    assert check_coverage(network, convert(network, HALF), x[:3]) == ["2", "0"]


class Quantised(nn.Linear):
    """Keeps its weight in 8 bits."""

    def __init__(self):
        super().__init__(6, 5)
        self.weight = nn.Parameter((100 * self.weight).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.float() / 100, self.bias)


def test_weights_of_a_subclass_that_are_no_floating_point_numbers_stay_digital():
    with pytest.warns(CoverageWarning, match=r"no variation on 1\.weight"):
        analog = convert(chain(nn.Linear(6, 6), Quantised()), HALF)
    assert [c.name for c in crossbars(analog)] == ["0"]


def test_every_kind_is_tested_and_documented():
    kinds = set()
    for make, _, _ in NETWORKS.values():
        kinds |= {kind.module for kind in KINDS for m in make().modules() if isinstance(m, kind.module)}
    assert kinds == {kind.module for kind in KINDS}
    text = (Path(__file__).parents[1] / "docs/layers.md").read_text(encoding="utf-8")
    for kind in KINDS:
        layers = [m for m in vars(nn).values() if isinstance(m, type) and issubclass(m, kind.module)]
        names = {m.__name__.removeprefix("Lazy") for m in layers} - {"RNNCellBase", "RNNBase"}
        missing = [name for name in names if f"nn.{name}" not in text and f"`{name[-2:]}`" not in text]
        assert not missing, missing
