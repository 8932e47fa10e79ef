import copy
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from correctnet.crossbar.convert import convert, program
from correctnet.datasets.base import Split
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.methods import suppression
from correctnet.networks.building import build
from correctnet.noise import streams
from correctnet.settings import Training
from correctnet.training import loop as training
from correctnet.training.checkpoint import Checkpoint
from correctnet.training.loop import Hooks, fit


def section(**changes):
    return Training(**{"batch": 32, "epochs": 4, "learning_rate": 0.01, **changes})


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("adamw", 0.01), ("sgd", 0.1)])
def test_it_learns(tiny, blobs, optimizer, learning_rate):
    rows = fit(tiny, blobs, section(epochs=8, optimizer=optimizer, learning_rate=learning_rate), seed=0, quiet=True)
    assert rows[-1]["accuracy"] > 0.95
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert not tiny.training


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_killed_training_ends_with_the_same_weights(tiny, blobs, tmp_path, optimizer, when):
    settings = section(optimizer=optimizer)
    whole = copy.deepcopy(tiny)
    uninterrupted = fit(whole, blobs, settings, seed=3, hooks=Hooks(augment="crop"), quiet=True)

    def batches():
        killed = copy.deepcopy(tiny)
        seen = []

        def kill(draw):
            seen.append(draw)
            if draw == when * 10 + 4:  # ten batches an epoch: in the middle of epoch `when + 1`
                raise Killed

        checkpoint = Checkpoint(tmp_path / "c.safetensors", "identity")
        hooks = Hooks(augment="crop", before_batch=kill)
        with pytest.raises(Killed):
            fit(killed, blobs, settings, seed=3, hooks=hooks, checkpoint=checkpoint, log=tmp_path / "l", quiet=True)
        resumed, seen_after = copy.deepcopy(tiny), []
        hooks = Hooks(augment="crop", before_batch=seen_after.append)
        fit(resumed, blobs, settings, seed=3, hooks=hooks, checkpoint=checkpoint, log=tmp_path / "l", quiet=True)
        return resumed, seen_after

    resumed, seen_after = batches()
    assert same(weights(whole), weights(resumed))
    assert seen_after == list(range(when * 10, 40)), "finished epochs are not done again"
    log = pd.read_csv(tmp_path / "l")
    assert list(log["epoch"]) == [1, 2, 3, 4]
    assert list(log["process"]) == [1] * when + [2 if when else 1] * (4 - when)
    assert list(log["loss"]) == pytest.approx([r["loss"] for r in uninterrupted])


def test_a_training_killed_behind_its_last_epoch_writes_its_log_again(tiny, blobs, tmp_path):
    checkpoint, log = Checkpoint(tmp_path / "c.safetensors", "identity"), tmp_path / "log.csv"
    fit(copy.deepcopy(tiny), blobs, section(), seed=0, checkpoint=checkpoint, log=log, quiet=True)
    log.unlink()  # as Snakemake does with the outputs of a job that did not end
    rows = fit(copy.deepcopy(tiny), blobs, section(), seed=0, checkpoint=checkpoint, log=log, quiet=True)
    assert list(pd.read_csv(log)["epoch"]) == [1, 2, 3, 4] == [r["epoch"] for r in rows]


def test_a_checkpoint_of_other_settings_is_not_used(tiny, blobs, tmp_path):
    path = tmp_path / "c.safetensors"
    fit(copy.deepcopy(tiny), blobs, section(), seed=0, checkpoint=Checkpoint(path, "old"), quiet=True)
    fresh, again = copy.deepcopy(tiny), copy.deepcopy(tiny)
    fit(fresh, blobs, section(epochs=2), seed=1, quiet=True)
    rows = fit(again, blobs, section(epochs=2), seed=1, checkpoint=Checkpoint(path, "new"), quiet=True)
    assert len(rows) == 2
    assert same(weights(fresh), weights(again))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * len(b)])
def test_a_damaged_checkpoint_costs_time_only(tiny, blobs, tmp_path, damage, capsys):
    path = tmp_path / "c.safetensors"
    fit(copy.deepcopy(tiny), blobs, section(), seed=0, checkpoint=Checkpoint(path, "i"), quiet=True)
    path.write_bytes(damage(path.read_bytes()))
    fresh, again = copy.deepcopy(tiny), copy.deepcopy(tiny)
    fit(fresh, blobs, section(), seed=0, quiet=True)
    fit(again, blobs, section(), seed=0, checkpoint=Checkpoint(path, "i"), quiet=True)
    assert same(weights(fresh), weights(again))
    assert "c.safetensors: not a usable checkpoint" in capsys.readouterr().out


def test_only_the_chosen_parameters_change(tiny, blobs):
    before = weights(tiny)
    fit(tiny, blobs, section(epochs=1), seed=0, parameters=list(tiny[4].parameters()), quiet=True)
    changed = {k for k, v in tiny.state_dict().items() if not torch.equal(v, before[k])}
    # BatchNorm's statistics are no parameters: they follow the data unless they are frozen.
    assert changed == {"4.weight", "4.bias", "0.norm.running_mean", "0.norm.running_var", "0.norm.num_batches_tracked"}
    assert all(p.requires_grad for p in tiny.parameters())
    before = weights(tiny)
    hooks = Hooks(update_batchnorm=False)
    fit(tiny, blobs, section(epochs=1), seed=0, parameters=list(tiny[4].parameters()), hooks=hooks, quiet=True)
    assert {k for k, v in tiny.state_dict().items() if not torch.equal(v, before[k])} == {"4.weight", "4.bias"}


def test_the_penalty_is_part_of_the_gradient(tiny, blobs):
    # Without data (a huge temperature) only the penalty is left: the norm of the last layer goes to its target.
    layer = tiny[4]
    hooks = Hooks(
        penalty=lambda: (layer.weight.norm() - 0.5) ** 2,
        penalty_weight=lambda done: 10.0,
        temperature=1e9,
    )
    assert abs(layer.weight.norm().item() - 0.5) > 0.1
    fit(tiny, blobs, section(epochs=10), seed=0, hooks=hooks, quiet=True)
    assert layer.weight.norm().item() == pytest.approx(0.5, abs=0.02)


def test_several_chips_a_batch_average_the_gradient(tiny, blobs):
    # One step of plain SGD on one batch: the step with three draws is the mean of the three steps with one draw.
    batch = Split(blobs.images[:32], blobs.labels[:32])
    settings = section(epochs=1, optimizer="sgd", warmup=0.0)

    def step(hooks_of):
        analog = convert(tiny, LogNormalVariation(0.5))
        before = weights(analog)
        fit(analog, batch, settings, seed=0, hooks=hooks_of(analog), quiet=True)
        return {k: v - before[k] for k, v in analog.named_parameters()}

    def one(sample):
        return lambda m: Hooks(before_batch=lambda d: program(m, sample), update_batchnorm=False)

    def three(m):
        hooks = Hooks(before_batch=lambda d: program(m, d), update_batchnorm=False)
        hooks.draws_per_batch = 3
        return hooks

    singles, together = [step(one(i)) for i in range(3)], step(three)
    for name, value in together.items():
        torch.testing.assert_close(value, sum(s[name] for s in singles) / 3, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_a_clipped_step_is_as_long_as_asked_and_as_steep(tiny, blobs, clip):
    # One step of SGD without momentum's history: the change is learning rate x (1 + 0.9) x gradient.
    batch = Split(blobs.images[:32], blobs.labels[:32])

    def step(**changes):
        model = copy.deepcopy(tiny)
        settings = section(epochs=1, optimizer="sgd", warmup=0.0, learning_rate=0.1, **changes)
        fit(model, batch, settings, seed=0, quiet=True)
        pairs = zip(model.parameters(), tiny.parameters(), strict=True)
        return torch.cat([(a - b).detach().flatten() for a, b in pairs])

    free, clipped = step(), step(clip=clip)
    norm = free.norm().item() / 0.19
    assert clipped.norm().item() == pytest.approx(0.19 * min(norm, clip), rel=1e-3)
    assert torch.cosine_similarity(free, clipped, dim=0).item() == pytest.approx(1, abs=1e-4)


def test_layers_of_dropout_drop_unless_they_are_told_not_to(blobs):
    modes = []
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(blobs.images[0].numel(), 3), nn.BatchNorm1d(3))
    model.register_forward_pre_hook(lambda module, _: modes.append((module[1].training, module[3].training)))
    for hooks in (Hooks(), Hooks(dropout=False), Hooks(update_batchnorm=False)):
        fit(model, blobs, section(epochs=1, batch=len(blobs)), seed=0, hooks=hooks, quiet=True)
    assert modes == [(True, True), (False, True), (True, False)]


def test_learning_rate_schedule():
    rates = [training.learning_rate(step, 100, 0.1, 0.2) for step in range(100)]
    assert max(rates) == pytest.approx(0.1)
    assert rates[0] == pytest.approx(0.1 / 21)
    assert rates.index(max(rates)) == 20
    assert rates[60] == pytest.approx(0.05)  # half way down the cosine
    assert rates[-1] < 1e-4
    assert all(math.isfinite(r) and r > 0 for r in rates)


def test_the_first_epochs_see_smaller_images():
    seen = []
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.register_forward_pre_hook(lambda module, images: seen.append(tuple(images[0].shape[1:])))
    images = Split(torch.rand(64, 1, 32, 32), torch.randint(0, 3, (64,)))
    fit(model, images, section(epochs=4), seed=0, hooks=Hooks(sizes=(8, 20)), quiet=True)
    assert seen == [(1, n, n) for n in (8, 20, 32, 32) for _ in range(2)]


def test_no_epochs_is_no_change(tiny, blobs, tmp_path):
    before = weights(tiny)
    assert fit(tiny, blobs, section(epochs=0), seed=0, log=tmp_path / "log.csv", quiet=True) == []
    assert same(before, weights(tiny))
    assert len(pd.read_csv(tmp_path / "log.csv")) == 0


def test_a_loss_that_is_not_finite_is_an_error(tiny, blobs):
    with pytest.raises(UserError, match="not finite in epoch 1"):
        fit(tiny, blobs, section(), seed=0, hooks=Hooks(temperature=1e-45), quiet=True)


@pytest.mark.parametrize("form", ["orthogonal", "one-sided"])
def test_a_regulariser_that_diverges_is_an_error(form):
    """LAPACK's own, "the algorithm failed to converge", would say nothing of the cause."""
    model = build("lenet5", 10, 1, seed=0)
    images = Split(torch.rand(64, 1, 32, 32), torch.randint(0, 10, (64,)))
    hooks = Hooks(
        penalty=lambda: suppression.penalty(suppression.analog_weights(model), 0.34, form),
        penalty_weight=lambda done: 1e6,
    )
    with pytest.raises(UserError, match=r"the loss is not finite in epoch \d; lower the learning rate or beta"):
        fit(model, images, section(optimizer="sgd", learning_rate=1.0), seed=0, hooks=hooks, quiet=True)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_optimizer_is_torchs_plain_one(optimizer, weight_decay):
    """The fused kernels go through memory: gradients in another memory order than their weights' would be mixed up."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten())
    ours = nn.Sequential(*ours, nn.Linear(4 * 4 * 4, 3)).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(ours).to(memory_format=torch.contiguous_format)
    settings = section(optimizer=optimizer, weight_decay=weight_decay)
    fused = training.make_optimizer(list(ours.parameters()), settings)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in plain.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if optimizer == "sgd":
        loop = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, foreach=False)
    else:
        loop = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    x = torch.randn(6, 3, 8, 8)
    for _ in range(4):
        for model, steps, order in ((ours, fused, torch.channels_last), (plain, loop, torch.contiguous_format)):
            steps.zero_grad()
            model(x.contiguous(memory_format=order)).square().mean().backward()
            sum(p.square().sum() for p in model.parameters()).backward()  # accumulates, as a penalty does
            steps.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def states():
    """The states of all global generators of this process."""
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state(legacy=False))]  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_caller_has_is_left_as_it_was(blobs, fails):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip
    model.train()
    model[1].eval()  # as one does who keeps its statistics
    model[3].to(memory_format=torch.channels_last)
    model[3].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    strides = [p.stride() for p in model.parameters()]
    frozen = model[3].weight.clone()
    images = blobs.images.clone()
    before = states()
    if fails:
        with pytest.raises(UserError, match="not finite"):
            fit(model, blobs, section(epochs=1), seed=0, hooks=Hooks(temperature=1e-45), quiet=True)
    else:
        fit(model, blobs, section(epochs=2), seed=0, hooks=Hooks(augment="crop"), quiet=True)
    assert states() == before
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.stride() for p in model.parameters()] == strides
    assert torch.equal(model[3].weight, frozen), "what requires no gradient is not trained"
    assert torch.equal(blobs.images, images)
    assert fails or all(p.grad is None for p in model.parameters())


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))


def test_dropout_is_a_function_of_the_seed_and_survives_a_kill(blobs, tmp_path):
    found = []
    for outside in (1, 2):
        model = dropping()
        torch.manual_seed(outside)
        fit(model, blobs, section(), seed=3, quiet=True)
        found.append(weights(model))
    assert same(*found)
    other = dropping()
    fit(other, blobs, section(), seed=4, quiet=True)
    assert not same(found[0], weights(other))

    def kill(draw):
        if draw == 25:
            raise Killed

    checkpoint = Checkpoint(tmp_path / "c.safetensors", "identity")
    with pytest.raises(Killed):
        fit(dropping(), blobs, section(), seed=3, hooks=Hooks(before_batch=kill), checkpoint=checkpoint, quiet=True)
    resumed = dropping()
    fit(resumed, blobs, section(), seed=3, checkpoint=checkpoint, quiet=True)
    assert same(found[0], weights(resumed))


def test_dropout_has_a_stream_of_its_own(blobs, monkeypatch):
    # Of the same epoch: the order of the images is drawn from other numbers than what is dropped.
    drawn = []
    model = dropping()
    model[2].register_forward_hook(lambda *_: drawn.append(torch.get_rng_state()))
    fit(model, blobs, section(epochs=1, batch=300), seed=0, quiet=True)
    again = torch.Generator()
    again.set_state(drawn[0])
    used = streams.torch_generator(0, "dropout", "fit", 0)
    torch.empty(300, 16).bernoulli_(0.5, generator=used)
    assert torch.equal(torch.rand(5, generator=again), torch.rand(5, generator=used))
    assert streams.seed_of(0, "dropout", "fit", 0) != streams.seed_of(0, "batches", "fit", 0)


def test_each_stage_and_epoch_has_batches_and_crops_of_its_own(blobs, monkeypatch):
    seen = []
    numbered = Split(torch.arange(300.0).view(300, 1, 1, 1).expand(300, 1, 8, 8).contiguous(), blobs.labels)
    crops = training.augment

    def cropped(images, generator, **options):
        seen.append((images[:, 0, 4, 4].tolist(), crops(torch.ones(300, 1, 8, 8), generator).flatten().tolist()))
        return images

    monkeypatch.setattr(training, "augment", cropped)
    for stage in ("pretrain", "inject"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        settings = section(epochs=2, batch=300, learning_rate=1e-6)
        fit(model, numbered, settings, seed=0, stage=stage, hooks=Hooks(augment="crop"), quiet=True)
    assert all(sorted(order) == list(range(300)) for order, _ in seen)
    assert len({tuple(order) for order, _ in seen}) == len({tuple(crop) for _, crop in seen}) == 4


@pytest.mark.parametrize(
    ("model", "shape", "dtype"),
    [
        (lambda: [nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)],
         (1, 4, 4, 4), None),
        (lambda: [nn.Conv3d(1, 2, 3, padding=1), nn.Flatten(2), nn.Conv1d(2, 2, 4), nn.Flatten(), nn.Linear(122, 3)],
         (1, 4, 4, 4), None),
        (lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)], (5,), None),
        (lambda: [nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3)], (2, 5, 5), torch.float64),
        (lambda: [nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3)], (6,), torch.int64),
    ],
    ids=["3-D", "3-D and 1-D", "tabular", "double", "tokens"],
)  # fmt: skip
@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8])
def test_any_module_is_trained(model, shape, dtype, labels):
    torch.manual_seed(0)
    model = nn.Sequential(*model())
    classes = torch.arange(90) % 3
    inputs = torch.randn(90, *shape) + classes.view(-1, *[1] * len(shape))
    if dtype == torch.int64:
        inputs = (2 * classes)[:, None] + torch.randint(0, 4, (90, *shape))
    elif dtype:
        model, inputs = model.to(dtype), inputs.to(dtype)
    rows = fit(model, Split(inputs, classes.to(labels)), section(epochs=30), seed=0, quiet=True)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert {p.dtype for p in model.parameters()} == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_the_loss_of_a_double_network_is_double():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    inputs, labels = torch.randn(8, 4).double(), torch.arange(8) % 3
    expected = nn.functional.cross_entropy(model(inputs), labels).item()
    rows = fit(model, Split(inputs, labels), section(epochs=1, batch=8), seed=0, quiet=True)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-13)


class Tuple(nn.Linear):
    def forward(self, x):
        return "other", super().forward(x)


NO_CLASSES = [
    (nn.Linear(4, 3), torch.zeros(7, dtype=torch.int64), "8 images and 7 labels"),
    (nn.Linear(4, 3), torch.zeros(8, 1, dtype=torch.int64), r"labels \(N,\).*not \(8, 1\)"),
    (nn.Linear(4, 3), torch.zeros(8, 3), r"labels \(N,\).*not \(8, 3\)"),
    (nn.Linear(4, 3), torch.full((8,), 0.5), "whole numbers; these are float32"),
    (nn.Linear(4, 3), torch.full((8,), 3), "there is a label 3, and the network has 3 classes"),
    (nn.Linear(4, 3), torch.full((8,), -100), "from 0 on; there is a -100"),
    (nn.Linear(4, 1), torch.zeros(8, dtype=torch.int64), r"2 classes or more.* N = 8 images, not \(8, 1\)"),
    (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), torch.zeros(8, dtype=torch.int64), r"not \(8,\)"),
    (nn.Unflatten(1, (2, 2)), torch.zeros(8, dtype=torch.int64), "nothing to train"),
    (nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))), torch.zeros(8, dtype=torch.int64), r"\(8, 2, 2\)"),
    (Tuple(4, 3), torch.zeros(8, dtype=torch.int64), "not a tuple of 2"),
]


@pytest.mark.parametrize(("model", "labels", "line"), NO_CLASSES)
def test_what_is_no_classification(model, labels, line):
    before = weights(model)
    with pytest.raises(UserError, match=line) as caught:
        fit(model, Split(torch.randn(8, 4), labels), section(epochs=1), seed=0, quiet=True)
    assert len(str(caught.value).splitlines()) == 1
    assert same(before, weights(model))


def test_no_images():
    with pytest.raises(UserError, match="there are no images"):
        fit(nn.Linear(4, 3), Split(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), section(), seed=0)
    with pytest.raises(UserError, match=r"only images .N, C, H, W. can be augmented"):
        fit(nn.Linear(4, 3), Split(torch.zeros(8, 4), torch.arange(8) % 3), section(), 0, hooks=Hooks(augment="crop"))


def test_a_network_that_writes_into_its_input_sees_the_same_images_on_every_chip():
    seen = []

    class Normalised(nn.Linear):
        def forward(self, x):
            seen.append(x.clone())
            x -= 0.5
            return super().forward(x)

    images = torch.randn(16, 4)
    kept = images.clone()
    fit(Normalised(4, 3), Split(images, torch.arange(16) % 3), section(epochs=1), 0, hooks=Hooks(draws_per_batch=3))
    assert torch.equal(images, kept)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_last_batch_of_one_image_that_batchnorm_cannot_normalise():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    data = Split(torch.randn(33, 4), torch.arange(33) % 3)
    with pytest.raises(UserError, match="the last of 33 images is alone in its batch; choose another"):
        fit(model, data, section(epochs=1, batch=32), seed=0, quiet=True)
    fit(model, data, section(epochs=1, batch=32), seed=0, hooks=Hooks(update_batchnorm=False), quiet=True)


def test_gradients_are_taken_whatever_the_caller_does_with_them(blobs):
    found = []
    for grad in (True, False):
        model = dropping()
        with torch.set_grad_enabled(grad):
            fit(model, blobs, section(epochs=1), seed=0, quiet=True)
            assert torch.is_grad_enabled() == grad
        found.append(weights(model))
    assert same(*found)
