"""Training on loaders and with a loss of one's own, against loops written out by hand."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from correctnet.errors import UserError
from correctnet.settings import Training
from correctnet.training.checkpoint import Checkpoint
from correctnet.training.loop import Hooks, fit, learning_rate

SGD = Training(epochs=3, batch=999, optimizer="sgd", learning_rate=0.1)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def by_hand(model, batches, settings, loss=F.cross_entropy):
    """SGD with Nesterov momentum over the same batches in each epoch."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    total, seen = [], 0
    for step in range(settings.epochs * len(batches)):
        images, labels = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings.epochs * len(batches), 0.1, settings.warmup)
        optimizer.zero_grad()
        value = loss(model(images), labels)
        value.backward()
        optimizer.step()
        total.append(value.item() * len(labels))
        seen += len(labels)
    return model.eval(), total, seen


@pytest.mark.parametrize("length", [True, False])
def test_each_batch_of_a_loader_is_a_step(tiny, blobs, length):
    batches = list(zip(blobs.images.split(70), blobs.labels.split(70), strict=True))

    class Loader:
        def __iter__(self):
            yield from batches

    class Counted(Loader):
        def __len__(self):
            return len(batches)

    trained = copy.deepcopy(tiny)
    rows = fit(trained, Counted() if length else Loader(), SGD, seed=0, quiet=True)
    expected, losses, _ = by_hand(tiny, batches, SGD)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert [r["loss"] for r in rows] == pytest.approx([sum(losses[i : i + 5]) / 300 for i in (0, 5, 10)], rel=1e-4)
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]


def test_a_loss_of_one_s_own(tiny, blobs):
    def smooth(outputs, labels):
        return F.cross_entropy(outputs, labels, label_smoothing=0.2)

    batches = list(zip(blobs.images.split(70), blobs.labels.split(70), strict=True))
    trained = copy.deepcopy(tiny)
    fit(trained, batches, SGD, seed=0, hooks=Hooks(loss=smooth), quiet=True)
    expected, _, _ = by_hand(tiny, batches, SGD, smooth)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    plain = copy.deepcopy(tiny)
    fit(plain, batches, SGD, seed=0, quiet=True)
    assert not same(weights(plain), weights(trained))


class Augmented(Dataset):
    """Images to which every generator that transforms draw from adds something."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return self.split.images[i] + 0.1 * noise, self.split.labels[i]


class Killed(Exception):
    pass


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_training_on_a_loader_ends_with_the_same_weights(tiny, blobs, tmp_path, given, workers):
    def loader():
        generator = torch.Generator().manual_seed(5) if given else None
        return DataLoader(Augmented(blobs), batch_size=60, shuffle=True, generator=generator, num_workers=workers)

    whole, killed, resumed = (copy.deepcopy(tiny) for _ in range(3))
    fit(whole, loader(), SGD, seed=3, quiet=True)

    def kill(draw):
        if draw == 7:
            raise Killed

    checkpoint = Checkpoint(tmp_path / "c.safetensors", "identity")
    with pytest.raises(Killed):
        fit(killed, loader(), SGD, seed=3, hooks=Hooks(before_batch=kill), checkpoint=checkpoint, quiet=True)
    torch.rand(17), random.random(), np.random.rand()  # noqa: NPY002 (another process has other generators)
    rows = fit(resumed, loader(), SGD, seed=3, checkpoint=checkpoint, quiet=True)
    assert [r["process"] for r in rows] == [1, 2, 2]
    assert same(weights(whole), weights(resumed))
    other = copy.deepcopy(tiny)
    fit(other, loader(), SGD, seed=4, quiet=True)
    assert not same(weights(whole), weights(other)), "the order follows the seed"


def test_the_caller_s_generators_are_left_as_they_were(tiny, blobs):
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(Augmented(blobs), batch_size=60, shuffle=True, generator=own)

    def states():
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), random.getstate(), legacy, own.get_state()]

    before = states()
    fit(tiny, loader, SGD, seed=3, quiet=True)
    after = states()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


class Shrinking:
    """A loader with fewer batches in each pass."""

    def __init__(self, split, batches=5, step=-1):
        self.split, self.batches, self.step = split, batches, step

    def __len__(self):
        return 5

    def __iter__(self):
        for i in range(self.batches):
            yield self.split.images[i : i + 40], self.split.labels[i : i + 40]
        self.batches += self.step


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda d: Shrinking(d),
            "training: the loader yields 4 instead of 5 batches in epoch 2; the learning rate is "
            "planned for the same number in each epoch",
        ),
        (
            lambda d: Shrinking(d, step=1),
            "training: the loader yields more than 5 batches in epoch 2; the learning "
            "rate is planned for the same number in each epoch",
        ),
        (lambda d: [], "training: there are no images"),
        (
            lambda d: [(d.images, d.labels), (d.images[:0], d.labels[:0])],
            "training: the loader yields a batch without images",
        ),
        (
            lambda d: iter([(d.images, d.labels)]),
            "training: a pair of tensors (images, labels), or a loader that "
            "yields such pairs and can be iterated over many times, is expected, not a list_iterator, which can be "
            "iterated over once",
        ),
        (
            lambda d: TensorDataset(d.images, d.labels),
            "training: a pair of tensors (images, labels), or a loader that "
            "yields such pairs and can be iterated over many times, is expected, not a TensorDataset; wrap a "
            "Dataset in a DataLoader",
        ),
        (
            lambda d: [{"x": d.images, "z": d.labels}],
            "training: a batch must be (images, labels), two tensors, or several inputs and labels, as a tuple with "
            "the labels last, a dict with 'labels', or (inputs, labels), not a dict of 'x', 'z'",
        ),
        (lambda d: [(d.images, d.labels + 7)], "training: there is a label 9, and the network has 3 classes"),
    ],
)
def test_loaders_that_are_refused(tiny, blobs, make, line):
    with pytest.raises(UserError) as error:
        fit(tiny, make(blobs), SGD, seed=0, quiet=True)
    assert str(error.value) == line


def test_an_image_alone_in_its_batch(blobs):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    loader = [(blobs.images[:9], blobs.labels[:9]), (blobs.images[9:10], blobs.labels[9:10])]
    with pytest.raises(UserError, match="an image is alone in its batch; choose another batch size"):
        fit(network, loader, SGD, seed=0, quiet=True)


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (
            lambda y, t: F.cross_entropy(y, t, reduction="none"),
            "training: loss must return one number for a batch, a tensor, not one of shape (100,)",
        ),
        (
            lambda y, t: F.cross_entropy(y, t).item(),
            "training: loss must return one number for a batch, a tensor, not one of type float",
        ),
        (
            lambda y, t: F.cross_entropy(y.detach(), t),
            "training: loss has no gradient; compute it from the outputs, without detach() or no_grad()",
        ),
        (
            lambda y, t: y.sum() * float("nan"),
            "training: the loss is not finite in epoch 1; lower the learning rate or beta",
        ),
    ],
)
def test_losses_that_are_none(tiny, blobs, loss, line):
    with pytest.raises(UserError) as error:
        fit(tiny, blobs, Training(epochs=1, batch=100), seed=0, hooks=Hooks(loss=loss), quiet=True)
    assert str(error.value) == line
