"""`correctnet.suppress` on networks and data of the caller."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stopping import Stopped, stopping_loss
from torch import nn

from correctnet import Device, LogNormalVariation, UserError, Variation, compensate, convert, suppress
from correctnet.methods.suppression import bound, spectral_norms, weight_matrix
from correctnet.settings import Suppress
from correctnet.training.loop import learning_rate

HALF = LogNormalVariation(0.5)
WAN = Device.preset("rram-wan-2022", time="1d")
FEW = {"epochs": 2, "batch": 60, "optimizer": "sgd", "learning_rate": 0.05, "beta": 1e-2}


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3), **options).eval()


def state(model):
    return copy.deepcopy(model.state_dict())


def bound_by_hand(device, layer):
    """lambda of a layer whose weights are Gaussian, from mean and deviation of the weights on chips."""
    w, (mean, std) = layer.weight.detach().double().ravel(), device.chip_moments(layer.weight.detach())
    return 1 / ((w @ mean.ravel()) / (w @ w) + 3 * std.norm() / w.norm()).item()


@pytest.mark.parametrize("device", [HALF, WAN], ids=["lognormal", "measured"])
@pytest.mark.parametrize("own", [None, lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1)])
def test_it_is_sgd_on_the_loss_and_the_regulariser(blobs, own, device):
    loader = list(zip(blobs.images.split(60), blobs.labels.split(60), strict=True))
    model = network()
    before = state(model)
    found = suppress(model, loader, device, loss=own, progress=False, **FEW)
    assert not found.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items()), "it was copied"
    by_hand = copy.deepcopy(model).train()
    layers = by_hand[0], by_hand[3]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    for step in range(10):
        images, labels = loader[step % 5]
        optimizer.param_groups[0]["lr"] = learning_rate(step, 10, 0.05, Suppress().warmup)
        optimizer.zero_grad()
        loss = (own or F.cross_entropy)(by_hand(images), labels)
        if step % 5 == 0:
            lams = [bound(HALF) if device is HALF else bound_by_hand(device, layer) for layer in layers]
        for layer, lam in zip(layers, lams, strict=True):
            w = weight_matrix(layer.weight)
            loss = loss + 1e-2 * (w.t() @ w - lam**2 * torch.eye(w.shape[1])).square().sum()
        loss.backward()
        optimizer.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_norms_are_pulled_to_the_bound(blobs):
    before = spectral_norms(network())
    found = suppress(
        network(),
        (blobs.images, blobs.labels),
        HALF,
        epochs=10,
        batch=10,
        learning_rate=1e-2,
        beta=10.0,
        progress=False,
    )
    lam = bound(HALF)
    for name, norm in spectral_norms(found).items():
        assert abs(norm - lam) < abs(before[name] - lam) / 5


def test_a_call_that_was_stopped_is_continued(blobs, tmp_path):
    data = blobs.images, blobs.labels
    whole = suppress(network(), data, HALF, progress=False, **FEW)

    stopping, calls = stopping_loss(at=8)  # five batches an epoch

    with pytest.raises(Stopped):
        suppress(network(), data, HALF, loss=stopping, work=tmp_path, progress=False, **FEW)
    kept = list(tmp_path.iterdir())
    assert [path.suffix for path in kept] == [".safetensors"]
    resumed = suppress(network(), data, HALF, loss=stopping, work=tmp_path, progress=False, **FEW)
    assert len(calls) == 8 + 5, "the first epoch is not repeated"
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    suppress(network(), data, HALF, loss=stopping, work=tmp_path, progress=False, **FEW)
    assert len(calls) == 13, "a finished call is not repeated"
    assert list(tmp_path.iterdir()) == kept


@pytest.mark.parametrize(
    "change",
    [
        {"variation": LogNormalVariation(0.4)},
        {"seed": 1},
        {"beta": 1e-3},
        {"network": lambda: network().double()},
        {"train": lambda d: (d.images, d.labels.roll(1))},
        {"train": lambda d: (d.images.roll(3, 0), d.labels.roll(3))},
    ],
)
def test_other_work_is_not_continued(blobs, tmp_path, change):
    def call(work, *, network=network, train=lambda d: (d.images, d.labels), variation=HALF, **options):
        images, labels = train(blobs)
        model = network()
        images = images.to(next(model.parameters()).dtype)
        return suppress(model, (images, labels), variation, work=work, progress=False, **{**FEW, **options})

    call(tmp_path)
    wanted, found = call(None, **change), call(tmp_path, **change)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in wanted.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 2


class Plain(Variation):
    """A device that does not give its moments."""

    def sample(self, weight, seed, layer, sample):
        return weight

    def describe(self):
        return {"model": "plain"}


@pytest.mark.parametrize(
    ("make", "options", "line"),
    [
        (
            network,
            {"start": "scratch"},
            "suppress: start: the weights of the network are the start; initialise them to start from scratch",
        ),
        (network, {"epoch": 3}, "suppress: epoch: unknown key (did you mean 'epochs'?)"),
        (network, {"seed": 0.5}, "suppress: the seed must be a whole number, not 0.5"),
        (
            lambda: convert(network(), HALF),
            {},
            "suppress: the network carries variation; give the one that was converted",
        ),
        (
            lambda: compensate(network(), {"0": 2}),
            {},
            "suppress: the network is compensated already; suppress it first, then compensate it",
        ),
        (
            network,
            {"variation": Plain()},
            "suppress: Plain does not give the moments of its weights, from which the "
            "bound (10) is made; go without suppression",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
            {},
            "training: there is a label 2, and the network has 2 classes",
        ),
        (network, {"work": 3}, "suppress: work is the path of a folder, not a int"),
    ],
)
def test_bad_calls(blobs, make, options, line):
    variation = options.pop("variation", HALF) if "variation" in options else HALF
    with pytest.raises(UserError) as error:
        suppress(make(), (blobs.images, blobs.labels), variation, progress=False, **options)
    assert str(error.value) == line


def test_work_that_is_a_file(blobs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; the name of a folder is expected"):
        suppress(network(), (blobs.images, blobs.labels), HALF, work=tmp_path / "file", progress=False)
