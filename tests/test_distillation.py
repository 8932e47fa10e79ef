"""Distillation against torch's own divergence, and the training that uses it."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from by_hand import succeed
from torch import nn

from correctnet.crossbar.convert import convert, program
from correctnet.crossbar.layers import analog_layers
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import evaluate
from correctnet.files import storage
from correctnet.methods.distillation import distil, distillation_loss, learn_from
from correctnet.noise import streams
from correctnet.settings import Distil
from correctnet.training.loop import Hooks, fit

DEVICE = LogNormalVariation(0.5)
HOW = {"epochs": 1, "batch": 50, "progress": False}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_the_loss_is_torchs_divergence(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 4 * torch.randn(2, 30, 7, generator=generator)
    student.requires_grad_()
    expected = temperature**2 * F.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
    )
    found = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert found > 0.1


def test_the_loss_of_a_perfect_student_is_zero():
    z = torch.randn(5, 3, requires_grad=True)
    loss = distillation_loss(z, z.detach() + 2.0, 2.0)  # logits are the same up to a constant
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-6
    with pytest.raises(UserError, match=r"the student's outputs \(5, 3\) are not those of the teacher \(5, 4\)"):
        distillation_loss(z, torch.zeros(5, 4), 2.0)


def test_the_gradient_does_not_fade_with_the_temperature():
    """At a high T the loss is ||z_s - z_t||^2 / (2 classes), of centred logits, whatever T is (Hinton et al., 2015)."""
    generator = torch.Generator().manual_seed(1)
    s, t = torch.randn(2, 40, 6, generator=generator)
    centred = [z - z.mean(1, keepdim=True) for z in (s, t)]
    limit = (centred[0] - centred[1]).square().sum(1).mean() / (2 * 6)
    for temperature in (100.0, 200.0):
        torch.testing.assert_close(distillation_loss(s, t, temperature), limit, rtol=0.05, atol=0)


def by_hand(network, blobs, alpha, temperature, steps):
    """The first steps of SGD with momentum 0, written out."""
    analog = convert(network, DEVICE, 0)
    weights = list(analog.parameters())
    order = torch.randperm(300, generator=streams.torch_generator(0, "batches", "distil", 0))
    for step in range(steps):
        part = order[50 * step : 50 * step + 50]
        x, y = blobs.images[part], blobs.labels[part]
        program(analog, streams.chip("train-distil", step))
        z = analog(x)
        with torch.no_grad():
            wanted = network(x)
        kl = F.kl_div((z / temperature).log_softmax(1), (wanted / temperature).softmax(1), reduction="batchmean")
        loss = (1 - alpha) * F.cross_entropy(z, y) + alpha * temperature**2 * kl
        yield loss.item()
        for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            w.data -= 0.01 * g
    program(analog, None)


def test_a_training_is_that_of_the_written_loss(tiny, blobs, monkeypatch):
    """Chips, batches, both terms and their weights, with BatchNorm frozen."""
    monkeypatch.setattr("correctnet.training.loop.learning_rate", lambda *_: 0.01)
    monkeypatch.setattr(
        "correctnet.training.loop.make_optimizer", lambda parameters, _: torch.optim.SGD(parameters, lr=0.01)
    )
    section = Distil(epochs=1, batch=50, alpha=0.7, temperature=3.0, batchnorm="frozen")
    analog, losses = convert(tiny, DEVICE, 0), []
    hooks = Hooks(before_batch=lambda draw: program(analog, streams.chip("train-distil", draw)), update_batchnorm=False)
    learn_from(tiny, hooks, section)
    rows = fit(analog, blobs, section, 0, stage="distil", hooks=hooks, quiet=True)
    losses = list(by_hand(tiny, blobs, 0.7, 3.0, 6))
    assert rows[0]["loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert max(losses) > 1.01 * min(losses)


def test_without_a_teacher_it_is_variation_aware_training(tiny, blobs):
    found = distil(tiny, blobs, DEVICE, alpha=0.0, **HOW)
    analog = convert(tiny, DEVICE, 0)
    hooks = Hooks(before_batch=lambda draw: program(analog, streams.chip("train-distil", draw)))
    fit(analog, blobs, Distil(epochs=1, batch=50), 0, stage="distil", hooks=hooks, quiet=True)
    for (name, own), (_, other) in zip(found.state_dict().items(), analog.state_dict().items(), strict=True):
        assert torch.equal(own, other), name


def test_labels_do_not_matter_where_the_teacher_has_all_the_weight(tiny, blobs):
    shuffled = blobs.images, blobs.labels.flip(0)
    found = [distil(tiny, data, DEVICE, alpha=1.0, **HOW) for data in (blobs, shuffled)]
    assert torch.equal(found[0][4].weight, found[1][4].weight)
    mixed = [distil(tiny, data, DEVICE, alpha=0.9, **HOW) for data in (blobs, shuffled)]
    assert not torch.equal(mixed[0][4].weight, mixed[1][4].weight)


def test_a_student_learns_what_an_untrained_network_is_taught(tiny, blobs):
    """A network that knows nothing learns the classes from a teacher alone, with variation in its weights."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    fit(teacher, blobs, Distil(epochs=5, batch=50, learning_rate=0.01), 0, quiet=True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    how = {"epochs": 15, "batch": 25, "learning_rate": 0.01, "progress": False}
    found = distil(tiny, (blobs.images, blobs.labels.flip(0)), DEVICE, teacher=teacher, alpha=1.0, **how)
    results = [evaluate(convert(network, DEVICE), blobs, 10, progress=False).mean for network in (tiny, found)]
    assert results[0] < 0.6
    assert results[1] > 0.8
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(hasattr(module, "chip") for module in found.modules())
    assert all(p.requires_grad for p in found.parameters())


def test_digital_layers_are_exact_in_the_training(tiny, blobs, monkeypatch):
    seen = []
    monkeypatch.setattr("correctnet.methods.distillation.fit", lambda model, *_, **__: seen.append(model))
    distil(tiny, blobs, DEVICE, exclude="0", **HOW)
    assert [layer.layer_index for layer in analog_layers(seen[0])] == [1, 2]


def test_bad_calls(tiny, blobs):
    with pytest.raises(UserError, match="the network carries variation"):
        distil(convert(tiny, DEVICE), blobs, DEVICE)
    with pytest.raises(UserError, match="the teacher carries variation"):
        distil(tiny, blobs, DEVICE, teacher=convert(tiny, DEVICE))
    with pytest.raises(UserError, match="alpha: Input should be less than or equal to 1"):
        distil(tiny, blobs, DEVICE, alpha=2)
    with pytest.raises(UserError, match=r"outputs \(50, 3\) are not those of the teacher \(50, 4\)"):
        distil(tiny, blobs, DEVICE, teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), **HOW)


def test_the_stage(tmp_path):
    """The history says what was trained and how; digital layers train exactly."""
    train = ["--quiet", "--threads", 1, "--epochs", 1, "--batch", 64]
    pre = tmp_path / "pretrain"
    succeed("pretrain", *train, "--out", pre)
    for name, options in {"d": ["--alpha", 0.9, "--temperature", 4], "f": ["--front", 1]}.items():
        succeed("distil", *train, *options, "--pretrained", pre, "--out", tmp_path / name)
    _, description = storage.read_model(tmp_path / "d")
    last = description["history"][-1]
    assert last["stage"] == "distil"
    assert (last["settings"]["distil"]["alpha"], last["settings"]["distil"]["temperature"]) == (0.9, 4.0)
    log = pd.read_csv(tmp_path / "d" / "log.csv")
    assert len(log) == 1
    out = tmp_path / "e.csv"
    succeed(
        "evaluate", "--quiet", "--threads", 1, "--chips", 2, "--images", 50, "--model", tmp_path / "d", "--out", out
    )
    assert pd.read_csv(out)["epochs"].tolist() == ["1 pretrain + 1 distil"] * 2
    assert (tmp_path / "d" / "model.safetensors").read_bytes() != (tmp_path / "f" / "model.safetensors").read_bytes()
