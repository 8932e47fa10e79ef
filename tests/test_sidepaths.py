"""Digital paths beside analog layers: what they compute, what they cost, and what is trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import correctnet
from correctnet import LogNormalVariation, convert, evaluate, program
from correctnet.errors import UserError
from correctnet.methods.sidepaths import add_side_paths, side_parameters, side_paths
from correctnet.networks.building import build
from correctnet.pipeline import stages
from correctnet.pipeline.models import read_network
from correctnet.pipeline.runtime import Runtime
from correctnet.settings import PATHS, Settings, Training
from correctnet.training.loop import fit

CIFAR = {"classes": 10, "channels": 3, "widths": (64, 128, 384, 192)}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


def images(n=8, seed=1):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def randomised(model):
    """The model with random numbers in its paths."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in side_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("path", PATHS)
def test_untrained_paths_change_nothing(path):
    net = network()
    sided = add_side_paths(net, path, 2)
    assert len(side_paths(sided)) == 3
    assert torch.equal(sided(images()), net(images()))
    analog, with_paths = (convert(m, LogNormalVariation(0.5), seed=3) for m in (net, sided))
    for own in (analog, with_paths):
        program(own, 7)
    assert torch.equal(with_paths.eval()(images()), analog.eval()(images())), "the chips are the same"


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_one_matrix_beside_the_unrolled_layer(path):
    """Of a convolution: the matrix that follows from the factors, times the columns that torch unfolds; float64."""
    sided = randomised(add_side_paths(network(), path, 2)).double()
    for name, x in (("0", images().double()), ("6", torch.randn(5, 16, dtype=torch.float64))):
        beside = sided.get_submodule(name)
        own = beside.path
        if path == "lora":
            matrix = own[1].weight.flatten(1) @ own[0].weight.flatten(1)
        elif path == "vera":
            matrix = own.b.flatten()[:, None] * (
                own.up.weight.flatten(1) @ (own.d.flatten()[:, None] * own.down.weight.flatten(1))
            )
        else:
            matrix = own.layer.weight.flatten(1)
        assert matrix.abs().max() > 0.1
        if name == "6":
            wanted = beside.original(x) + x @ matrix.T
        else:
            wanted = beside.original(x) + (matrix @ F.unfold(x, 3, padding=1, stride=2)).view(8, 6, 4, 4)
        assert torch.allclose(beside(x), wanted, atol=1e-10)


def test_the_weights_that_paths_store():
    """Numbers of LeNet-5 with the widths of the CIFAR-10 pair: rank 1 has 6,229, two vectors a layer 778 + 5 r."""
    net = build("lenet5", **CIFAR)
    total = sum(p.numel() for p in net.parameters())
    for rank in (1, 4):
        assert correctnet.side_share(add_side_paths(net, "lora", rank)) == pytest.approx(6229 * rank / total)
        assert correctnet.side_share(add_side_paths(net, "vera", rank)) == pytest.approx((778 + 5 * rank) / total)
    masks = correctnet.protected_weights(net, 0.01, "magnitude")
    sparse = correctnet.side_share(add_side_paths(net, "sparse", masks=masks))
    assert sparse == pytest.approx(round(0.01 * 1_514_048) / total)


def test_the_multiplications_of_paths():
    net = build("lenet5", classes=10, channels=1, widths=(6, 16, 120, 84))
    x = torch.zeros(1, 1, 32, 32)
    counts = correctnet.multiplications(net, x)
    whole = sum(counts.values())
    # Rank 2: the windows of A once a position, and B for each output of it.
    positions = (28**2, 10**2, 1, 1, 1)
    inputs, outputs = (25, 150, 400, 120, 84), (6, 16, 120, 84, 10)
    wanted = sum(n * 2 * (i + o) for n, i, o in zip(positions, inputs, outputs, strict=True))
    found = correctnet.digital_multiplications(add_side_paths(net, "lora", 2), x)
    assert found == pytest.approx(wanted / whole)
    masks = {
        name: torch.zeros_like(m.weight, dtype=torch.bool) for name, m in net.named_modules() if hasattr(m, "weight")
    }
    masks["conv1.layer"].view(-1)[:3] = True
    found = correctnet.digital_multiplications(add_side_paths(net, "sparse", masks=masks), x)
    assert found == pytest.approx(3 * 28**2 / whole)


def test_all_layers_share_the_projections():
    own = [m.path for m in side_paths(add_side_paths(build("lenet5", **CIFAR), "vera", 3, seed=4)).values()]
    small, large = own[3], own[2]  # linear2 has 384 inputs, linear1 3,200
    assert torch.allclose(small.down.weight * 384**0.5, large.down.weight[:, :384] * 3200**0.5, atol=1e-6)
    assert torch.allclose(small.up.weight, large.up.weight[: len(small.up.weight)])
    assert not small.down.weight.requires_grad


@pytest.fixture(scope="module")
def data():
    """Two classes that a linear layer tells apart, images of 4 pixels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    return x, (x @ torch.tensor([1.0, -2.0, 0.5, 1.5]) > 0).long()


@pytest.fixture(scope="module")
def trained(data):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    fit(net, data, Training(epochs=20, batch=32, learning_rate=1e-2), 0, stage="fit", quiet=True)
    return net.eval()


@pytest.mark.parametrize("path", PATHS)
def test_only_the_paths_are_trained_and_the_loss_under_variation_falls(path, trained, data, tmp_path):
    variation = LogNormalVariation(0.8)
    masks = correctnet.protected_weights(trained, 0.4, "magnitude")
    options = {"path": path, "rank": 4, "epochs": 30, "learning_rate": 2e-2, "masks": masks, "progress": False}
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    sided = correctnet.fit_side_paths(trained, data, variation, **options)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]), "the network is left alone"
        place, _, key = name.rpartition(".")
        assert torch.equal(sided.state_dict()[f"{place}.original.{key}"], value), "the analog weights are as before"
    untrained = add_side_paths(trained, path, 4, masks=masks)

    def loss(model):
        analog, total = convert(model, variation, seed=9), 0.0
        with torch.no_grad():
            for chip in range(60):
                program(analog, chip)
                total += float(F.cross_entropy(analog(data[0]), data[1]))
        return total / 60

    assert loss(sided) < loss(untrained)
    if path == "sparse":
        for name, own in side_paths(sided).items():
            assert not own.path.layer.weight[~masks[name]].any(), "weights outside of the mask stay 0"
            assert own.path.layer.weight[masks[name]].any()
    again = correctnet.fit_side_paths(trained, data, variation, work=tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), sided.state_dict().values(), strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_the_core_runs_them_or_torch_does_alike(path, data, trained):
    masks = correctnet.protected_weights(trained, 0.4, "magnitude")
    sided = randomised(add_side_paths(trained, path, 2, masks=masks))
    analog = convert(sided, LogNormalVariation(0.5))
    with pytest.warns() if path == "vera" else torch.no_grad():
        fast = evaluate(analog, data, chips=3, progress=False)
    slow = evaluate(analog, data, chips=3, engine="torch", progress=False)
    assert (fast.table["correct"] - slow.table["correct"]).abs().max() <= 1


def test_digital_layers_have_none(trained, data):
    sided = correctnet.fit_side_paths(
        trained, data, LogNormalVariation(0.5), exclude="0", epochs=1, rank=1, progress=False
    )
    assert list(side_paths(sided)) == ["2"]


def test_mistakes(trained, data):
    variation = LogNormalVariation(0.5)
    with pytest.raises(UserError, match="a sparse path needs masks"):
        correctnet.fit_side_paths(trained, data, variation, path="sparse")
    with pytest.raises(UserError, match="path"):
        correctnet.fit_side_paths(trained, data, variation, path="dense")
    with pytest.raises(UserError, match="carries variation"):
        correctnet.fit_side_paths(convert(trained, variation), data, variation)
    with pytest.raises(UserError, match="has digital paths or compensation already"):
        add_side_paths(add_side_paths(trained, "lora"), "lora")
    with pytest.raises(UserError, match="no layer 'x'"):
        add_side_paths(trained, "lora", layers=["x"])
    with pytest.raises(UserError, match="at least 1, not 0"):
        add_side_paths(trained, "lora", 0)
    with pytest.raises(UserError, match="ConvTranspose2d, which can have none"):
        add_side_paths(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), "lora")


@pytest.mark.parametrize("path", PATHS)
def test_a_stage_trains_them_and_its_model_is_evaluated(path, tmp_path):
    settings = Settings.model_validate(
        {
            "network": {"name": "lenet5"},
            "pretrain": {"epochs": 1, "batch": 64},
            "sidepath": {"path": path, "rank": 2, "fraction": 0.02, "epochs": 1, "batch": 256, "select_images": 50},
            "evaluate": {"images": 40},
        }
    )
    runtime = Runtime(quiet=True)
    stages.pretrain(settings, tmp_path / "p", runtime)
    stages.sidepath(settings, tmp_path / "p", tmp_path / "s", runtime)
    model, description = read_network(tmp_path / "s")
    assert len(side_paths(model)) == 5
    assert description["overhead"] == correctnet.side_share(model) > 0
    assert [step["stage"] for step in description["history"]] == ["pretrain", "sidepath"]
    original, _ = read_network(tmp_path / "p")
    for name, value in original.state_dict().items():
        place, _, key = name.rpartition(".")
        assert torch.equal(model.state_dict()[f"{place}.original.{key}"], value)
    assert any(p.abs().max() > 0 for p in side_parameters(model))
    result = stages.evaluate_chips(settings, tmp_path / "s", tmp_path / "r.csv", runtime, chips=2)
    assert result.table["overhead"].iloc[0] == pytest.approx(description["overhead"])
    assert 0 < result.table["digital_macs"].iloc[0] < 1
    with pytest.raises(UserError, match=r"inject: .* has digital paths"):
        stages.inject(settings, tmp_path / "s", tmp_path / "i", runtime)


def test_paths_are_trained_beside_layers_with_converters(tmp_path):
    settings = Settings.model_validate(
        {
            "pretrain": {"epochs": 1, "batch": 64},
            "sidepath": {"path": "lora", "rank": 1, "epochs": 1, "batch": 512},
            "converters": {"dac_bits": 6, "adc_bits": 6, "images": 64},
            "evaluate": {"images": 40},
        }
    )
    runtime = Runtime(quiet=True)
    stages.pretrain(settings, tmp_path / "p", runtime)
    stages.sidepath(settings, tmp_path / "p", tmp_path / "s", runtime)
    model, description = read_network(tmp_path / "s")
    assert description["converters"]["dac_bits"] == 6
    assert len(description["converters"]["ranges"]) == len(side_paths(model)) == 5
    result = stages.evaluate_chips(settings, tmp_path / "s", tmp_path / "r.csv", runtime, chips=2)
    assert set(result.table["adc_bits"]) == {6}
