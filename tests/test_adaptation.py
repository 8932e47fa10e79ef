"""Online adaptation of protected weights, against a training that is written out and the limits f = 0 and 1."""

import copy

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from by_hand import run, succeed
from torch import nn
from torch.nn.utils import parametrizations

from correctnet.crossbar.convert import convert, program, programmed
from correctnet.crossbar.layers import analog_layers
from correctnet.crossbar.protection import protect
from correctnet.devices.device import Device
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import clean_accuracy, evaluate
from correctnet.methods.adaptation import adapt
from correctnet.methods.selection import protected_weights
from correctnet.noise import streams
from correctnet.pipeline.config import Config
from correctnet.settings import Adapt, Training
from correctnet.training.loop import Hooks, fit

DEVICE = LogNormalVariation(0.5)


@pytest.fixture
def trained(tiny, blobs):
    """The network after a training."""
    fit(tiny, blobs, Training(epochs=4, batch=50, learning_rate=0.01), 0, quiet=True)
    return tiny.eval()


def protected(network, fraction, select="random", device=DEVICE, **options):
    analog = convert(network, device)
    protect(analog, protected_weights(network, fraction, select, **options))
    return analog


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_only_protected_weights_are_trained(trained, blobs):
    analog = protected(trained, 0.3)
    before = state(analog)
    program(analog, 5)
    layers = analog_layers(analog)
    masks = [layer.variation.mask(layer.nominal, layer.layer_index) for layer in layers]
    drawn = [layer.chip_weight().detach().clone() for layer in layers]
    adapt(analog, blobs, batch=50)
    for layer, mask, old in zip(layers, masks, drawn, strict=True):
        new = layer.chip_weight().detach()
        assert torch.equal(new[~mask], old[~mask]), "the crossbars are never written again"
        assert (new[mask] != old[mask]).float().mean() > 0.5, "all but those of units that are off"
        assert torch.equal(new[mask], layer.nominal.detach()[mask])
    weights = {f"{name}.weight" for name in ("0.layer", "3.layer", "4")}
    for name, value in analog.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in weights), name
    assert all(p.requires_grad for p in analog.parameters())
    assert not any(p._backward_hooks for p in analog.parameters())


def test_a_step_is_that_of_the_written_loss(trained, blobs, monkeypatch):
    """S as a tensor of its own beside frozen weights of the chip, three steps of SGD."""
    monkeypatch.setattr("correctnet.training.loop.learning_rate", lambda *_: 0.05)
    monkeypatch.setattr(
        "correctnet.training.loop.make_optimizer", lambda parameters, _: torch.optim.SGD(parameters, lr=0.05)
    )
    few, chip = blobs.take(150), convert(trained, DEVICE)
    masks = protected_weights(trained, 0.3, "random")
    with programmed(chip, 5):
        fixed = {f"{name}.weight": chip.get_submodule(name).chip_weight().detach().clone() for name in masks}
    learnt = {f"{name}.weight": chip.get_submodule(name).nominal.detach().clone().requires_grad_() for name in masks}
    order = torch.randperm(150, generator=streams.torch_generator(0, "batches", "adapt", 0))
    for part in order.split(50):
        mixed = {n: torch.where(masks[n.removesuffix(".weight")], s, fixed[n]) for n, s in learnt.items()}
        logits = torch.func.functional_call(copy.deepcopy(trained).eval(), mixed, few.images[part])
        gradients = torch.autograd.grad(F.cross_entropy(logits, few.labels[part]), list(learnt.values()))
        for s, g in zip(learnt.values(), gradients, strict=True):
            s.data -= 0.05 * g
    analog = protected(trained, 0.3)
    program(analog, 5)
    adapt(analog, few, batch=50)
    for name, mask in masks.items():
        own, wanted = analog.get_submodule(name).nominal.detach(), learnt[f"{name}.weight"].detach()
        torch.testing.assert_close(own[mask], wanted[mask], rtol=1e-4, atol=1e-6)
        assert (own[mask] - trained.get_submodule(name).weight[mask]).abs().max() > 1e-4


def test_with_all_weights_every_chip_recovers(trained, blobs):
    """f = 1: no variation is left, and the training is that of a digital network, on every chip the same."""
    analog = protected(trained, 1.0)
    found = evaluate(analog, blobs, 3, prepare=lambda chip: adapt(chip, blobs, batch=50), progress=False)
    digital = copy.deepcopy(trained)
    weights = [digital[0].layer.weight, digital[3].layer.weight, digital[4].weight]
    hooks = Hooks(dropout=False, update_batchnorm=False)
    section = Adapt(passes=1, batch=50).training()
    fit(digital, blobs, section, 0, stage="adapt", parameters=weights, hooks=hooks, quiet=True)
    assert set(found.accuracies) == {clean_accuracy(digital, blobs)}
    assert found.mean >= clean_accuracy(trained, blobs) - 0.01


def test_chips_recover_and_each_begins_from_the_same_weights(trained, blobs):
    train, test = blobs.take(200), type(blobs)(blobs.images[200:], blobs.labels[200:])
    analog = protected(trained, 0.3, device=LogNormalVariation(1.0))
    before = state(analog)
    how = {"batch": 25, "passes": 3, "learning_rate": 0.01}
    bare = evaluate(analog, test, 6, progress=False)
    found = evaluate(analog, test, 6, prepare=lambda chip: adapt(chip, train, **how), progress=False)
    assert found.minus(bare).low > 0, f"{bare} -> {found}"
    assert found.mean > 0.9 * clean_accuracy(trained, test)
    assert all(torch.equal(value, before[name]) for name, value in analog.state_dict().items())
    later = evaluate(analog, test, 2, start=4, prepare=lambda chip: adapt(chip, train, **how), progress=False)
    assert later.table["correct"].tolist() == found.table["correct"].tolist()[4:], "whatever chips came before"
    with programmed(analog, 2):  # by hand
        adapt(analog, train, **how)
        with torch.no_grad():
            correct = (analog(test.images).argmax(1) == test.labels).sum().item()
    assert abs(correct - found.table["correct"][2]) <= 1


def test_few_images(trained, blobs):
    found = []
    for data, options in ((blobs, {"images": 100}), (blobs.take(100), {}), (blobs, {})):
        analog = protected(trained, 0.3)
        program(analog, 5)
        adapt(analog, data, batch=50, **options)
        found.append(analog[4].nominal.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_bad_calls(trained, blobs):
    analog = convert(trained, DEVICE)
    with pytest.raises(UserError, match="one chip is trained"):
        adapt(analog, blobs)
    program(analog, 1)
    with pytest.raises(UserError, match="no weight is protected"):
        adapt(analog, blobs)
    protect(analog, protected_weights(trained, 0, "random"))
    with pytest.raises(UserError, match="no weight is protected"):
        adapt(analog, blobs)
    with pytest.raises(UserError, match="adapt: weight_decay: unknown key"):
        adapt(analog, blobs, weight_decay=0.1)
    program(analog, [1, 2])
    with pytest.raises(UserError, match="one chip is trained"):
        adapt(analog, blobs)


def test_derived_weights_cannot_be_adapted(blobs):
    network = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 3)))
    analog = protected(network, 0.5)
    program(analog, 1)
    with pytest.raises(UserError, match=r"the weights of 1 are derived from others"):
        adapt(analog, blobs)


def test_a_device_whose_weights_depend_on_each_other(trained, blobs):
    """Conductances are scaled by the layer's largest weight: where that one is trained, all others would move."""
    analog = protected(trained, 0.3, "magnitude", device=Device.preset("pcm-hermes-1"))
    before = state(analog)
    program(analog, 1)
    with pytest.raises(UserError, match="on a Device the other weights of a layer depend on the protected ones"):
        adapt(analog, blobs, batch=50, learning_rate=0.1)
    assert all(torch.equal(value, before[name]) for name, value in analog.state_dict().items())


def test_only_digital_layers_are_trained_with_their_biases(trained, blobs):
    analog = convert(trained, DEVICE, exclude="4")
    before = state(analog)
    program(analog, 5)
    adapt(analog, blobs, weights="digital", batch=50, learning_rate=0.01)
    changed = {name for name, value in analog.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"4.weight", "4.bias"}
    with pytest.raises(UserError, match="no layer is digital"):
        adapt(on_chip(convert(trained, DEVICE)), blobs, weights="digital")


def on_chip(analog, chip=5):
    program(analog, chip)
    return analog


def test_the_last_layer_digital_is_a_regression_on_stored_features(trained, blobs):
    """As in [18]: the features of the chip are computed once, and the last layer is trained on them alone."""
    images, labels = blobs.images, blobs.labels
    analog = on_chip(convert(trained, DEVICE, exclude="4"))
    with torch.no_grad():
        features = analog.eval()[:4](images)
    last = nn.Sequential(copy.deepcopy(trained[4]))
    settings = Training(epochs=2, batch=50, learning_rate=0.01, weight_decay=0.0)
    fit(last, (features, labels), settings, 3, stage="adapt", quiet=True)
    adapt(analog, blobs, weights="digital", passes=2, batch=50, learning_rate=0.01, seed=3)
    torch.testing.assert_close(analog[4].weight, last[0].weight)


def test_the_ceiling_trains_all_weights_through_the_chip(trained, blobs):
    """A step is that of the loss of W e^theta, with e^theta of this chip; biases and BatchNorm stay."""
    analog = on_chip(convert(trained, DEVICE))
    factors = {id(own): (own.chip_weight() / own.nominal).detach() for own in analog_layers(analog)}
    before = state(analog)
    plain = evaluate(convert(trained, DEVICE), blobs, 3, progress=False)
    adapt(analog, blobs, weights="all", batch=50, learning_rate=0.01, passes=2)
    changed = {name for name, value in analog.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in ("0.layer", "3.layer", "4")}
    for own in analog_layers(analog):
        torch.testing.assert_close(own.chip_weight().detach(), (own.nominal * factors[id(own)]).detach())
    found = evaluate(
        convert(trained, DEVICE), blobs, 3, prepare=lambda chip: adapt(chip, blobs, weights="all"), progress=False
    )
    assert found.mean > plain.mean


def test_rows_that_are_adapted(tmp_path):
    """The stage: what it needs of a chip is in the columns, and a chip is that of the function."""
    pre, few = tmp_path / "pretrain", ["--quiet", "--threads", 1, "--images", 100]
    succeed("pretrain", "--quiet", "--threads", 1, "--epochs", 3, "--batch", 64, "--out", pre)

    def table(name, *options, chips=3):
        own = [*few, *options, "--chips", chips, "--note", "pair=p", "--note", f"row={name}", "--model", pre]
        succeed("evaluate", *own, "--out", tmp_path / f"{name}.csv")
        return pd.read_csv(tmp_path / f"{name}.csv")

    random = ["--fraction", 0.2, "--select", "random", "--sigma", 0.8]
    bare = table("bare", *random)
    online = table("online", *random, "--passes", 2, "--adapt-images", 600, "--learning-rate", 0.003)
    assert online["accuracy"].mean() > bare["accuracy"].mean()
    assert online["adapt_images"].tolist() == [600] * 3
    assert online["adapt_passes"].tolist() == [2] * 3
    assert (online["adapt_seconds"] > 0).all()
    assert online["overhead"].tolist() == bare["overhead"].tolist()
    clean = [table(name, *random, "--sigma", 0, *more) for name, more in (("c", ()), ("d", ("--passes", 2)))]
    assert clean[0]["correct"].tolist() == clean[1]["correct"].tolist()

    parts = [table(f"part{i}", *random, "--passes", 1, "--start", 2 * i, chips=2) for i in range(2)]
    files = [tmp_path / f"part{i}.csv" for i in range(2)]
    for i, path in enumerate(files):  # chunks of one row
        path.write_text(path.read_text().replace(f"part{i}", "part"))
    succeed("merge", *files, "--out", tmp_path / "whole.csv")
    assert len(pd.read_csv(tmp_path / "whole.csv")) == sum(map(len, parts))
    succeed("collect", tmp_path / "whole.csv", tmp_path / "bare.csv", "--out", tmp_path / "samples.csv")
    refused = run("evaluate", *few, "--passes", 1, "--chips", 1, "--model", pre, "--out", tmp_path / "x.csv")
    assert refused.exit_code
    assert "set protect.fraction" in refused.output
    path = tmp_path / "config.yaml"
    head = "runs: {paper: [p]}\nrows: {u: {evaluate: pretrain, label: u}}\npairs: {p: {adapt: {passes: 1}%s}}\n"
    path.write_text(head % "")
    with pytest.raises(UserError, match=r"'u' trains protected weights \(adapt\), and protects none"):
        Config.load(path)
    path.write_text(head % ", protect: {fraction: 0.1}")
    assert Config.load(path).settings("p", "u").adapt.passes == 1
