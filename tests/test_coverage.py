"""Variation reaches every weight, or the user hears of it, in what gives numbers."""

import copy
import functools
import itertools
import pickle
import subprocess
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from correctnet import LogNormalVariation, UserError, check_coverage, chip, convert, evaluate, program
from correctnet.crossbar.convert import chip_of, keeping, programmed
from correctnet.crossbar.kinds import crossbars
from correctnet.crossbar.layers import AnalogLayer, CoverageWarning, analog_layers
from correctnet.devices.base import Variation
from correctnet.evaluation.montecarlo import EngineWarning, clean_accuracy
from correctnet.noise import core
from correctnet.noise import specification as reference

HALF = LogNormalVariation(0.5)
CHIPS = 6


def data(*shape: int, classes: int = 10, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator), torch.randint(0, classes, (count,), generator=generator)


def factors(layer: int, sample: int, weight: torch.Tensor) -> torch.Tensor:
    """The factors of a chip by the numpy specification."""
    out, channels, *kernel = weight.shape
    flat = reference.lognormal(0, layer, sample, weight.numel(), 0.5)
    return torch.from_numpy(flat).view(out, *kernel, channels).movedim(-1, 1)


@torch.no_grad()
def oracle(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, exclude: tuple[str, ...] = ()) -> list[int]:
    """Correct images of each chip: the plain model, its weights replaced in place by the specification's."""
    counts = []
    places = [each for each in crossbars(model) if each.name not in exclude]
    weights = [getattr(each.module, each.parameter) for each in places]
    kept = [weight.detach().clone() for weight in weights]
    for sample in range(CHIPS):
        for each, weight, nominal in zip(places, weights, kept, strict=True):
            weight.data = nominal * factors(each.index, sample, nominal)
        counts.append(int((model(images.clone()).argmax(1) == labels).sum()))
    for weight, nominal in zip(weights, kept, strict=True):
        weight.data = nominal
    return counts


def agrees(model: nn.Module, images: torch.Tensor, exclude: tuple[str, ...] = (), slack: int = 0) -> None:
    """`check_coverage` passes, and every engine counts what the oracle counts, on every chip."""
    model.eval()
    with torch.no_grad():
        labels = model(images.clone()).argmax(1)
    wanted = oracle(model, images, labels, exclude)
    assert len(set(wanted)) > 1, "chips differ"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        warnings.simplefilter("ignore", CoverageWarning)
        analog = convert(model, HALF, exclude=exclude)
        check_coverage(model, analog, images[:8])
        for engine in ("auto", "torch"):
            found = evaluate(analog, (images, labels), CHIPS, engine=engine, progress=False).table.correct
            assert np.abs(found.to_numpy() - wanted).max() <= slack, (engine, found.tolist(), wanted)


def linear(*widths: int) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]


class Two(nn.Module):
    """Two layers that are reached in another way than by attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(20, 32, 10)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class InList(Two):
    def __init__(self):
        super().__init__()
        self.layers = [self.a, (self.b,)]

    def forward(self, x):
        return self.layers[1][0](F.relu(self.layers[0](x)))


class InDict(Two):
    def __init__(self):
        super().__init__()
        self.layers = {"first": self.a, "second": {"inner": self.b}}

    def forward(self, x):
        return self.layers["second"]["inner"](F.relu(self.layers["first"](x)))


class Functional(Two):
    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.a.weight, self.a.bias)), self.b.weight)


class Detached(Two):
    def forward(self, x):
        return self.b(F.relu(x @ self.a.weight.data.t() + self.a.bias.detach()))


class Cosine(Two):
    def forward(self, x):
        return F.linear(F.normalize(F.relu(self.a(x))), F.normalize(self.b.weight))


class Bound(Two):
    """A bound method kept as an attribute is copied with the network."""

    def __init__(self):
        super().__init__()
        self.head = self.b.forward
        self.partial = functools.partial(F.linear, bias=None)

    def forward(self, x):
        return self.head(F.relu(self.partial(x, self.a.weight)))


class Encoder(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)
        self.dim = 1 if batch_first else 0

    def forward(self, x):
        return self.head(self.encoder(x if self.dim else x.transpose(0, 1)).mean(self.dim))


class Scaled(Two):
    """A container with parameters of its own: a temperature, and a scale for each feature."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((1,), 2.0))
        self.scale = nn.Parameter(torch.rand(32))

    def forward(self, x):
        return self.b(F.relu(self.a(x)) * self.scale) / self.temperature


def inplace() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


@pytest.mark.parametrize("make", [InList, InDict, Functional, Detached, Cosine, Bound, Scaled])
def test_variation_reaches_layers_however_they_are_reached(make):
    agrees(make(), data(20)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_by_torchs_fast_path(batch_first):
    agrees(Encoder(batch_first), data(12, 32)[0], slack=0)


def test_in_place_relu():
    agrees(inplace(), data(3, 8, 8)[0])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 10)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.down(x)
        return self.fc(self.relu(y).mean((2, 3)))


def test_a_residual_network():
    agrees(Residual(), data(3, 8, 8)[0])


class Tied(nn.Module):
    """A linear layer whose weight an embedding shares: the crossbar varies, the table does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.table(x).mean(1))))


def test_a_weight_that_an_embedding_shares():
    tokens = torch.randint(0, 10, (200, 5), generator=torch.Generator().manual_seed(1))
    model = Tied().eval()
    analog = convert(model, HALF)
    assert check_coverage(model, analog, tokens[:8]) == ["body", "head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        assert evaluate(analog, (tokens, torch.zeros(200, dtype=torch.int64)), 4, progress=False).chips == 4


def test_pruned_and_normalised_weights():
    model = Two().eval()
    prune.l1_unstructured(model.a, "weight", amount=0.5)
    nn.utils.weight_norm(model.b)
    x, y = data(20)
    analog = convert(model, HALF)
    assert check_coverage(model, analog, x[:8]) == ["a", "b"]
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(analog(x), plain)
        bare = copy.deepcopy(Two())
        bare.load_state_dict(
            {"a.weight": model.a.weight, "a.bias": model.a.bias} | {"b.weight": model.b.weight, "b.bias": model.b.bias}
        )
        with programmed(analog, 3):
            varied = analog(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        found = evaluate(analog, (x, y), 4, progress=False).accuracies
        assert found.tolist() == evaluate(convert(bare, HALF), (x, y), 4, progress=False).accuracies.tolist()
    with torch.no_grad(), programmed(wanted := convert(bare, HALF), 3):
        torch.testing.assert_close(varied, wanted(x))


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize(
    ("normalise", "remove"),
    [
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
    ],
)
def test_weights_that_each_forward_pass_makes_anew(normalise, remove, engine):
    # The weight of the pass before is freed, and an activation may come to lie where it was.
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Linear(20, 32)), nn.ReLU(), nn.Linear(32, 10))
    x, y = data(20)
    model(x)
    model.eval()(x)
    analog = convert(model, HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        found = evaluate(analog, (x, y), CHIPS, engine=engine, progress=False)
    remove(model[0])
    assert found.table["correct"].tolist() == oracle(model, x, y)


# ---- what escapes is an error ---------------------------------------------------------------------------------------


def patched() -> nn.Module:
    model = Two()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


def wrapped() -> nn.Module:
    model = Two()
    model.forward = torch.no_grad()(model.forward)
    return model


def patched_inside() -> nn.Module:
    model = nn.Sequential(*linear(20, 32, 10))
    inner = model[1].forward
    model[1].forward = lambda x: inner(x)
    return model


@pytest.mark.parametrize("make", [patched, wrapped, patched_inside])
def test_a_patched_forward_is_refused_when_it_is_converted(make):
    with pytest.raises(UserError, match=r"the forward .*runs the original's layers"):
        convert(make(), HALF)


def test_a_forward_that_is_copied_with_the_network_is_not_refused():
    model = Two()
    model.forward = types.MethodType(lambda self, x: self.b(torch.tanh(self.a(x))), model)
    agrees(model, data(20)[0])


class Closed(Two):
    """A function over a layer, which a copy of the network takes over as it is."""

    def __init__(self, over):
        super().__init__()
        b, weight = self.b, self.b.weight
        self.head = {
            "layer": lambda x: b(x),
            "weight": lambda x: F.linear(x, weight),
            "transposed": lambda x: x @ weight.t(),
            "self": lambda x: self.b(x),
        }[over]

    def forward(self, x):
        return self.head(F.relu(self.a(x)))


@pytest.mark.parametrize("over", ["layer", "weight", "transposed", "self"])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_closure_over_a_layer_gives_no_accuracy(over, engine):
    model = Closed(over).eval()
    analog, (x, y) = convert(model, HALF), data(20)
    for network in (analog, copy.deepcopy(analog)):
        with pytest.raises(UserError, match="variation does not reach b: "):
            evaluate(network, (x, y), 3, engine=engine, progress=False)
    with pytest.raises(UserError, match="check_coverage"):
        check_coverage(model, analog, x[:8])


class Nominal(Two):
    def forward(self, x):
        return F.linear(F.relu(self.a(x)), self.b._parameters["weight"])


class NoLayer(Two):
    """Uses none of its layers."""

    def forward(self, x):
        return x[:, :10]


def test_nominal_weights_that_are_used_past_the_layer():
    with pytest.raises(UserError, match="variation does not reach b: "):
        evaluate(convert(Nominal(), HALF), data(20), 3, progress=False)
    with pytest.raises(UserError, match="none of a, b is used"):
        evaluate(convert(NoLayer(), HALF), data(20), 3, progress=False)


class Auxiliary(Two):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(32, 10)

    def forward(self, x):
        h = F.relu(self.a(x))
        return (self.b(h), self.extra(h)) if self.training else self.b(h)


class Renormalised(Two):
    def forward(self, x):
        self.a.weight.data = torch.renorm(self.a.weight.data, 2, 0, 0.3)
        return super().forward(x)


class Clamped(Two):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(-0.05, 0.05)
        return super().forward(x)


@pytest.mark.parametrize("make", [Renormalised, Clamped])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_weights_that_the_forward_pass_changes(make, engine):
    model, (x, y) = make(), data(20)
    with pytest.raises(UserError, match="changes the weights of a in its forward pass"):
        evaluate(convert(model, HALF), (x, y), 3, engine=engine, progress=False)
    with torch.no_grad():  # what it does is no change any more
        model.a.weight.mul_(0.001)
    evaluate(convert(model, HALF), (x, y), 3, engine="torch", progress=False)


def test_a_head_that_only_training_uses():
    model, (x, y) = Auxiliary().eval(), data(20)
    analog = convert(model, HALF)
    assert check_coverage(model, analog, x[:8]) == ["a", "b"]
    with pytest.warns(CoverageWarning, match="extra not used"):
        evaluate(analog, (x, y), 3, progress=False)


class Broken(LogNormalVariation):
    def sample(self, weight, seed, layer, sample):
        return weight.no_such_thing


def test_a_device_that_fails_is_not_taken_for_nominal_weights():
    with pytest.raises((UserError, AttributeError, RuntimeError), match="no_such_thing"):
        evaluate(convert(Functional(), Broken(0.5)), data(20), 2, engine="torch", progress=False)


def test_a_network_that_its_weights_do_not_change_is_said():
    model = Two()
    nn.init.zeros_(model.b.weight)
    with pytest.warns(CoverageWarning, match="do not depend on the weights"):
        result = evaluate(convert(model, HALF), data(20), 3, progress=False)
    assert len(set(result.accuracies)) == 1


@pytest.mark.parametrize("sigma", [0.0, 1e-9, 1e-6])
def test_tiny_variation_is_no_alarm(sigma):
    model, (x, y) = Two().eval(), data(20)
    analog = convert(model, LogNormalVariation(sigma))
    assert check_coverage(model, analog, x[:8]) == ["a", "b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(analog, (x, y), 2, progress=False)
    assert result.mean == pytest.approx(clean_accuracy(model, (x, y)), abs=0.01)


class DictOutput(Two):
    def forward(self, x):
        return {"logits": super().forward(x), "extra": [x]}


def test_coverage_of_a_network_with_a_dict_for_an_output():
    model, (x, y) = DictOutput().eval(), data(20)
    analog = convert(model, HALF)
    assert check_coverage(model, analog, x[:8]) == ["a", "b"]
    with torch.no_grad():
        wanted = [int((chip(analog, k)(x)["logits"].argmax(1) == y).sum()) for k in range(2)]
    for engine in ("auto", "torch"):
        assert evaluate(analog, (x, y), 2, engine=engine, progress=False).table.correct.tolist() == wanted


# ---- conversion -----------------------------------------------------------------------------------------------------


def test_layers_keep_their_identity():
    model = InList()
    analog = convert(model, HALF)
    assert analog.layers[0] is analog.a
    assert isinstance(analog.layers[1][0], AnalogLayer)
    assert not any(isinstance(m, AnalogLayer) for m in model.modules())
    assert all(p is not q for p, q in zip(model.parameters(), analog.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy"),
        (lambda: torch.jit.trace(Two().eval(), torch.randn(1, 20)), "TorchScript"),
        (lambda: nn.Sequential(nn.Embedding(4, 3)), "Embedding, which cannot"),
        (lambda: nn.Sequential(nn.ReLU()), "no layer left to convert"),
        (lambda: nn.Sequential(nn.Linear(3, 2, device="meta")), "meta and has no weights yet"),
    ],
)
def test_what_cannot_be_converted_says_why(make, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    with pytest.raises(UserError, match=message):
        convert(model, HALF)


def test_conversion_inside_inference_mode():
    x, y = data(20)
    with torch.inference_mode():
        analog = convert(Two().eval(), HALF)
        inside = evaluate(analog, (x, y), 3, progress=False).accuracies
    assert inside.tolist() == evaluate(convert(Two(), HALF), (x, y), 3, progress=False).accuracies.tolist()
    with torch.inference_mode():
        born = Two().eval()  # its parameters are inference tensors
    assert inside.tolist() == evaluate(convert(born, HALF), (x, y), 3, progress=False).accuracies.tolist()


def test_exclusion_by_any_name_of_a_layer_and_of_all():
    layer = nn.Linear(4, 4)
    model = nn.Module()
    model.first, model.again, model.last = layer, layer, nn.Linear(4, 2)
    with pytest.warns(CoverageWarning, match=r"first\.weight"):
        analog = convert(model, HALF, exclude=["again"])
    assert [m.layer_index for m in analog_layers(analog)] == [1]
    with pytest.raises(UserError, match="left to convert"):
        convert(model, HALF, exclude=[""])


def test_another_name_of_a_layers_weight_is_said_to_stay_nominal():
    class Shared(Two):
        def __init__(self):
            super().__init__()
            self.kept = nn.ParameterList([self.a.weight])

        def forward(self, x):
            return self.b(F.relu(F.linear(x, self.kept[0])))

    model = Shared()
    with pytest.warns(CoverageWarning, match=r"no variation on kept\.0, the weight of an analog layer"):
        convert(model, HALF)
    for name in ("kept", "kept.0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(model, HALF, exclude=[name])


def test_parts_that_were_converted_on_their_own_are_refused():
    model = nn.Sequential(convert(nn.Linear(20, 32), HALF), nn.ReLU(), convert(nn.Linear(32, 10), HALF))
    for use in (
        lambda: program(model, 3),
        lambda: evaluate(model, data(20), 3),
        lambda: clean_accuracy(model, data(20)),
    ):
        with pytest.raises(UserError, match="converted on their own"):
            use()


@pytest.mark.parametrize("name", ["variation", "layer_index", "chip", "varies", "nominal", "chip_weight"])
def test_attributes_that_an_analog_layer_would_hide(name):
    for value in (3, torch.ones(10, 32), nn.Parameter(torch.ones(3)), nn.ReLU()):
        model = Two()
        setattr(model.b, name, value)
        with pytest.raises(UserError, match=f"b has an attribute '{name}', as analog layers do; rename it"):
            convert(model, HALF)
        convert(model, HALF, exclude=["b"])


def test_weights_that_are_changed_as_a_list():
    analog = convert(Two(), HALF)
    wanted = 3 * analog.a.nominal.detach(), 3 * analog.b.nominal.detach()
    program(analog, 3)
    with torch.no_grad():
        torch._foreach_mul_([analog.a.weight, analog.b.weight], 3.0)
    assert all(torch.equal(layer.nominal, value) for layer, value in zip((analog.a, analog.b), wanted, strict=True))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs():
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 0), nn.Linear(0, 10))
    assert "0" in check_coverage(model, convert(model, HALF), data(20)[0][:8])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_chip_is_not_recorded_by_torchscript():
    analog, (x, _) = convert(Two(), HALF).eval(), data(20)
    torch.testing.assert_close(torch.jit.trace(analog, x)(x), analog(x))
    program(analog, 3)
    with pytest.raises(UserError, match="cannot record a chip's weights"):
        torch.jit.trace(analog, x, check_trace=False)


def test_the_weights_of_a_chip_are_loaded_as_a_tensor(tmp_path):
    analog = convert(Two(), HALF)
    program(analog, 3)
    torch.save(analog.a.weight, tmp_path / "w.pt")
    for found in (torch.load(tmp_path / "w.pt"), pickle.loads(pickle.dumps(analog.a.weight))):
        assert type(found) is torch.Tensor
        assert torch.equal(found, analog.a.nominal * factors(0, 3, analog.a.nominal))


def test_the_warning_names_what_exclude_takes():
    class Tokens(Two):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 20))

        def forward(self, x):
            return super().forward(x + self.token)

    with pytest.warns(CoverageWarning, match="token"):
        convert(Tokens(), HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Tokens(), HALF, exclude=["token"])


# ---- weights on a chip are never stale ------------------------------------------------------------------------------


def fresh(model: nn.Module, x: torch.Tensor, sample: int) -> torch.Tensor:
    """What a chip gives for the weights that an analog model has now, by a conversion of its own."""
    plain = Two()
    plain.load_state_dict(model.state_dict())
    analog = convert(plain, HALF)
    program(analog, sample)
    return analog(x)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.b.weight.data.mul_(0),
        lambda m: m.b.weight.mul_(2),
        lambda m: m.b.weight.detach().mul_(2),
        lambda m: m.b.weight[0].mul_(2),
        lambda m: m.b.weight.view(-1)[3:7].zero_(),
        lambda m: m.b.weight.__setitem__((0, 0), 5.0),
        lambda m: setattr(m.b.weight, "data", torch.ones(10, 32)),
        lambda m: setattr(m.b, "weight", nn.Parameter(torch.ones(10, 32))),
        lambda m: nn.init.normal_(m.b.weight),
        lambda m: m.b.weight.t().t().clamp_(-0.1, 0.1),
        lambda m: torch.mul(m.b.weight, 2, out=m.b.weight),
        lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}, assign=True),
        lambda m: [p.data.mul_(2) for p in m.parameters()],
        lambda m: [p.data.__setitem__(slice(None), 1.0) for p in m.parameters()],
        lambda m: torch.utils.swap_tensors(m.b._parameters["weight"], nn.Parameter(torch.ones(10, 32))),
    ],
)
def test_weights_that_change_under_a_chip_are_seen(change):
    analog, x = convert(Two(), HALF), data(20)[0]
    program(analog, 3)
    before = analog(x)
    change(analog)
    after = analog(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh(analog, x, 3))


def test_the_weight_that_is_read_is_the_chips():
    analog = convert(Two(), HALF)
    nominal = analog.b.nominal.detach().clone()
    program(analog, 3)
    wanted = nominal * factors(1, 3, nominal)
    with torch.no_grad():
        assert torch.equal(analog.b.weight + 0, wanted)
        assert torch.equal(analog.b.weight.data.clone(), wanted)
        assert torch.equal(analog.b.weight.sum(1), wanted.sum(1))
        assert torch.equal(torch.stack(list(analog.b.weight.unbind(0))), wanted)
        assert np.array_equal(analog.b.weight.numpy(), wanted.numpy())
    assert torch.equal(analog.b.nominal, nominal)
    assert torch.equal(analog.state_dict()["b.weight"], nominal)
    program(analog, None)
    assert analog.b.weight is analog.b.nominal


def test_gradients_through_a_weight_that_is_read():
    analog, x = convert(Functional(), HALF), data(20)[0]
    program(analog, 3)
    analog(x).sum().backward()
    read = analog.b.nominal.grad.clone()
    called = convert(Two(), HALF)
    with torch.no_grad():
        called.b.bias.zero_()
    program(called, 3)
    called(x).sum().backward()
    torch.testing.assert_close(read, called.b.nominal.grad)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("fused", [True, False])
def test_a_chip_follows_an_optimizer(optimizer, fused):
    analog, (x, y) = convert(Two(), HALF), data(20)
    program(analog, 7)
    steps = optimizer(analog.parameters(), lr=1e-2, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            seen = analog(x)
            assert torch.equal(seen, fresh(analog, x, 7))
        steps.zero_grad()
        F.cross_entropy(analog(x), y).backward()
        steps.step()
    for engine in ("auto", "torch"):
        found = evaluate(analog, (x, y), 3, engine=engine, progress=False).accuracies.tolist()
        plain = Two()
        plain.load_state_dict(analog.state_dict())
        assert found == evaluate(convert(plain, HALF), (x, y), 3, progress=False).accuracies.tolist()


@torch.no_grad()
def test_functional_call_copies_and_pickles():
    analog, x = convert(Two(), HALF), data(20)[0]
    program(analog, 3)
    for scale in (1.0, 2.0, 3.0):
        state = {k: scale * v for k, v in analog.state_dict().items()}
        found = torch.func.functional_call(analog, state, (x,))
        twin = Two()
        twin.load_state_dict(state)
        assert torch.equal(found, fresh(twin, x, 3))
    with keeping(analog):
        analog(x)
        for twin in (copy.deepcopy(analog), copy.copy(analog), pickle.loads(pickle.dumps(analog))):
            assert torch.equal(twin(x), analog(x))
        twin = copy.deepcopy(analog)
    twin.b.nominal.mul_(2)
    assert torch.equal(twin(x), fresh(twin, x, 3))
    assert not torch.equal(twin(x), analog(x))


def test_two_threads_share_a_model():
    analog, (x, y) = convert(Two(), HALF), data(20)

    def chips(start: int) -> list[float]:
        return evaluate(analog, (x, y), 20, start=start, engine="torch", progress=False).accuracies.tolist()

    wanted, found = [chips(0), chips(100)], [None, None]
    threads = [threading.Thread(target=lambda i=i, s=s: found.__setitem__(i, chips(s))) for i, s in ((0, 0), (1, 100))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_threads_evaluate_a_model_that_is_training():
    model, (x, y) = nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.9), nn.Linear(32, 10)), data(20)
    analog = convert(model, HALF).train()
    wanted, found = oracle(model.eval(), x, y), {}

    def count(thread: int) -> None:
        result = evaluate(analog, (x, y), CHIPS, engine="torch", progress=False)
        found[thread] = result.table["correct"].tolist()

    threads = [threading.Thread(target=count, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), wanted)
    assert all(module.training for module in analog.modules())
    assert not chip_of(analog).running


def test_a_model_that_another_thread_has_is_not_programmed():
    analog, caught = convert(Two(), HALF), []

    def other() -> None:
        try:
            program(analog, 5)
        except UserError as error:
            caught.append(str(error))

    with programmed(analog, 3):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert analog.a.chip.sample == 3
    assert "another thread" in caught[0]


# ---- what is left as it was -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_evaluation_leaves_no_trace(engine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(288, 10)
    )
    analog, (x, y) = convert(model, HALF), data(3, 8, 8)
    analog.train()
    analog[1].eval()
    program(analog, 3, first_layer=1)
    modes = [m.training for m in analog.modules()]
    state = {k: v.clone() for k, v in analog.state_dict().items()}
    kept, shuffled = (
        x.clone(),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True),
    )
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    evaluate(analog, shuffled, 3, engine=engine, progress=False)
    clean_accuracy(analog, (x, y))
    check_coverage(model, analog, x[:4])
    drawn = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert drawn == (torch.rand(1).item(), np.random.rand())  # noqa: NPY002
    assert [m.training for m in analog.modules()] == modes
    assert (analog[0].chip.sample, analog[0].chip.first_layer, analog[0].chip.running) == (3, 1, False)
    assert all(torch.equal(v, state[k]) for k, v in analog.state_dict().items())
    assert torch.equal(x, kept)


class Normalising(nn.Module):
    """Normalises its input in place."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Conv2d(shape, 8, 3)
        self.f = nn.Linear(8, 10)

    def forward(self, x):
        x -= 0.45
        x /= 0.25
        return self.f(self.c(x).relu().mean((2, 3)))


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_network_that_changes_its_input(engine, channels, order):
    x = torch.rand(64, channels, 16, 16, generator=torch.Generator().manual_seed(2)).to(memory_format=order)
    kept, model = x.clone(), Normalising(channels).eval()
    with torch.no_grad():
        y = model(x.clone()).argmax(1)
    wanted = oracle(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        found = evaluate(convert(model, HALF), (x, y), CHIPS, engine=engine, progress=False)
    assert found.table.correct.tolist() == wanted
    assert torch.equal(x, kept)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(20, 10)
        self.memory = torch.zeros(1)

    def forward(self, x):
        out = self.f(x)
        self.memory = 0.9 * self.memory + 0.1 * out.mean()
        return out - self.memory


def test_tracing_leaves_nothing_in_the_model():
    analog, (x, y) = convert(Remembering(), HALF), data(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(analog, (x, y), 2, progress=False)
        result = evaluate(analog, (x, y), 2, engine="torch", progress=False)
    assert isinstance(analog.memory, torch.Tensor)
    assert result.table.correct.dtype.kind == "i"


def test_preparing_a_chip_is_undone_and_begins_anew_for_each():
    torch.manual_seed(0)
    analog, (x, y) = convert(Two(), HALF), data(20)
    state = {k: v.clone() for k, v in analog.state_dict().items()}

    def prepare(model: nn.Module) -> None:
        with torch.no_grad():
            model.b.bias.add_(torch.linspace(-1, 1, 10))

    together = evaluate(analog, (x, y), 4, prepare=prepare, progress=False).accuracies
    alone = [evaluate(analog, (x, y), 1, start=s, prepare=prepare, progress=False).mean for s in range(4)]
    assert together.tolist() == alone
    assert all(torch.equal(v, state[k]) for k, v in analog.state_dict().items())


def test_buffers_that_are_not_saved_are_put_back():
    class Scaled(Two):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(20), persistent=False)

        def forward(self, x):
            return super().forward(x * self.scale)

    def prepare(model: nn.Module) -> None:
        model.scale[:10] += model.a.chip.sample

    analog, (x, y) = convert(Scaled(), HALF), data(20)
    together = evaluate(analog, (x, y), 4, prepare=prepare, progress=False).accuracies.tolist()
    assert torch.equal(analog.scale, torch.ones(20))
    assert together == [evaluate(analog, (x, y), 1, start=s, prepare=prepare, progress=False).mean for s in range(4)]


class Counting(Two):
    """Its output grows with each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        adjacency = (torch.arange(20)[:, None] - torch.arange(20)).abs() < 2
        self.register_buffer("adjacency", adjacency.float().to_sparse())

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward((self.adjacency @ x.t()).t()) * torch.arange(10) * self.calls


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_network_that_counts_its_calls(engine):
    analog, (x, y) = convert(Counting(), HALF), data(20)
    buffer = analog.calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(analog, (x, y), 4, engine=engine, progress=False).accuracies.tolist()
        again = evaluate(analog, (x, y), 2, start=2, engine=engine, progress=False).accuracies.tolist()
    assert analog.calls is buffer
    assert buffer == 0
    assert again == found[2:]


# ---- the core beside torch ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")
def test_weights_that_the_graph_reads_are_the_chips():
    from correctnet.engine.engine import Engine

    x, _ = data(20)
    for make in (Functional, Cosine):
        model = make().eval()
        analog = convert(model, HALF)
        engine = Engine(analog, x)
        found = engine.outputs(x, [0, 4])
        for i, sample in enumerate((0, 4)):
            with torch.no_grad(), programmed(analog, sample):
                torch.testing.assert_close(found[i], analog(x), rtol=1e-4, atol=1e-4)


class Dropping(Two):
    def forward(self, x):
        return self.b(F.dropout(F.relu(self.a(x))))


def test_a_random_network_is_said_to_be_one():
    from correctnet.evaluation.montecarlo import OutputWarning

    with pytest.warns(OutputWarning, match="change from call to call"), pytest.warns(EngineWarning):
        evaluate(convert(Dropping(), HALF), data(20), 2, progress=False)


@pytest.mark.skipif(not core.status().built, reason="the C++ core was not built")
def test_the_engine_says_that_a_network_is_random():
    from correctnet.engine.engine import describe

    assert "change from call to call" in describe(convert(Dropping(), HALF), data(20)[0]).reason


def test_a_network_that_looks_across_a_batch_keeps_the_loaders_batches():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    ).eval()
    x, _ = data(3, 8, 8, count=64)
    with torch.no_grad():
        batches = [(part, model(part).argmax(1)) for part in x.split(8)]
    analog = convert(model, HALF)
    with pytest.warns(EngineWarning, match="depends on the others of the batch"):
        auto = evaluate(analog, batches, CHIPS, progress=False).table.correct.tolist()
    assert auto == evaluate(analog, batches, CHIPS, engine="torch", progress=False).table.correct.tolist()
    assert auto == [sum(c) for c in zip(*(oracle(model, *batch) for batch in batches), strict=True)]


class Magnifying(nn.Module):
    """Subtracts two nearly equal numbers: float32 rounding becomes a part of the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(20, 64), nn.Linear(64, 10)

    def forward(self, x):
        h = F.relu(self.a(x)) + 1e5
        return self.b(h - 1e5) * 1.0


def test_an_ill_conditioned_network_runs_through_torch_with_a_warning():
    model, (x, y) = Magnifying().eval(), data(20)
    wanted = oracle(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        found = evaluate(convert(model, HALF), (x, y), CHIPS, progress=False).table.correct.tolist()
    assert found == wanted


def test_a_network_that_the_core_computes_wrongly_runs_through_torch(monkeypatch):
    from correctnet.engine.engine import Engine

    outputs = Engine.outputs
    monkeypatch.setattr(Engine, "outputs", lambda self, *args: 1.1 * outputs(self, *args) + 0.1)
    model, (x, y) = Two().eval(), data(20)
    with pytest.warns(EngineWarning, match="the core's outputs differ from torch's .* please report"):
        found = evaluate(convert(model, HALF), (x, y), CHIPS, progress=False)
    assert found.table.correct.tolist() == oracle(model, x, y)


class Own(Variation):
    def sample(self, weight, seed, layer, sample):
        return weight * (1 + 0.5 * np.sin(sample + layer))

    def describe(self):
        return {"model": "own", "amplitude": 0.5}


def test_a_device_of_ones_own():
    model, (x, y) = Two().eval(), data(20)
    analog = convert(model, Own())
    assert check_coverage(model, analog, x[:8]) == ["a", "b"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        result = evaluate(analog, (x, y), 3, progress=False)
    assert set(result.table["device"]) == {"own(amplitude=0.5)"}


class Random(Variation):
    def sample(self, weight, seed, layer, sample):
        return weight + torch.randn_like(weight)

    def describe(self):
        return {}


class InPlace(Random):
    def sample(self, weight, seed, layer, sample):
        return weight.data.mul_(1.1)


class Short(Random):
    def sample(self, weight, seed, layer, sample):
        return weight[:1]


class Double(Random):
    def sample(self, weight, seed, layer, sample):
        return 1.1 * weight.double()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (Random(), "Random gives other weights each time for one chip"),
        (InPlace(), "InPlace changes the nominal weights in place"),
        (Short(), r"Short must give weights \(32, 20\) float32, not \(1, 20\) float32"),
        (Double(), r"Double must give weights \(32, 20\) float32, not \(32, 20\) float64"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_device_of_ones_own_that_is_none(device, message, engine):
    analog = convert(Two(), device)
    before = analog.a.nominal.detach().clone()
    with pytest.raises(UserError, match=message):
        evaluate(analog, data(20), 2, engine=engine, progress=False)
    assert torch.equal(analog.a.nominal, before)


@pytest.mark.slow
def test_a_reloaded_module_is_one_line():
    code = """
import importlib, torch, correctnet.crossbar.layers, correctnet
from correctnet import LogNormalVariation, convert, evaluate
before = convert(torch.nn.Linear(4, 2), LogNormalVariation(0.5))
importlib.reload(correctnet.crossbar.layers)
after = correctnet.crossbar.convert.convert(torch.nn.Linear(4, 2), LogNormalVariation(0.5))
for model in (before, after):
    try:
        print(evaluate(model, (torch.randn(9, 4), torch.zeros(9, dtype=torch.int64)), 2, progress=False).chips)
    except correctnet.UserError as error:
        print(error)
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert len(said) == 2
    assert all(line == "2" or "was reloaded" in line for line in said)
