import copy

import pandas as pd
import pytest
import torch
from torch import nn

from correctnet.crossbar.convert import convert
from correctnet.crossbar.layers import crossbar_layers
from correctnet.datasets.base import Split
from correctnet.devices.lognormal import LogNormalVariation
from correctnet.errors import UserError
from correctnet.evaluation.montecarlo import clean_accuracy, evaluate, simulate
from correctnet.evaluation.results import COLUMNS, Result
from correctnet.evaluation.simulation import Simulation
from correctnet.methods import candidates
from correctnet.methods.candidates import Sweep, executed, find_candidates, sensitivity, sweep
from correctnet.networks.building import build

SILENT, FROM_NINE = Simulation(progress=False), Simulation(start=9, progress=False)


def curve(accuracies, threshold=0.95, original=1.0):
    """A Sweep whose layer i has the mean accuracy accuracies[i - 1]."""
    results = {i + 1: Result(pd.DataFrame([(0, 0, 100, a, 0)], columns=COLUMNS)) for i, a in enumerate(accuracies)}
    names = tuple(f"layer{i + 1}" for i in range(len(accuracies)))
    return Sweep(results, names, original, threshold)


@pytest.mark.parametrize(
    ("accuracies", "count"),
    [
        ([0.5, 0.6, 0.9, 0.94, 0.96, 0.99], 4),
        ([0.96, 0.97, 0.99], 0),  # no candidate at all is a result
        ([0.1, 0.1, 0.1], 3),
        ([0.94, 0.96, 0.96], 1),
        ([0.96, 0.94, 0.96], 2),  # from the last layer backwards the first to fall short is the second
        ([0.95, 0.96], 0),  # "lower than 95 %"
    ],
)
def test_candidates_are_the_first_layers(accuracies, count):
    assert curve(accuracies).candidates == tuple(f"layer{i + 1}" for i in range(count))


def test_the_threshold_is_relative_to_the_original_accuracy():
    assert curve([0.65, 0.67, 0.69], original=0.70).candidates == ("layer1",)
    assert curve([0.65, 0.67, 0.69], original=0.70, threshold=0.97).candidates == ("layer1", "layer2")


def test_variation_reaches_from_layer_i_to_the_last(tiny, blobs):
    analog = convert(tiny, LogNormalVariation(0.5))
    found = sweep(analog, blobs, original=1.0, chips=3, simulation=FROM_NINE)
    assert found.names == ("0.layer", "3.layer", "4")
    for i in (1, 2, 3):
        expected = evaluate(analog, blobs, 3, start=9, first_layer=i - 1, progress=False)
        pd.testing.assert_frame_equal(found.results[i].table, expected.table)
    table = found.table()
    assert list(table["layer"]) == [1] * 3 + [2] * 3 + [3] * 3
    assert set(table["sample"]) == {9, 10, 11}
    assert found.summary()["candidates"] == list(found.candidates)


class HeadFirst(nn.Module):
    """A network that registers its layers in another order than it runs them in, one of them twice."""

    def __init__(self):
        super().__init__()
        self.head, self.late, self.early = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(64, 8)

    def forward(self, x):
        x = torch.relu(self.early(x.flatten(1)))
        return self.head(torch.relu(self.late(torch.relu(self.late(x)))))


def test_layers_are_counted_as_they_are_run_and_keep_their_addresses(blobs):
    torch.manual_seed(1)
    network, variation = HeadFirst().train(), LogNormalVariation(0.8)
    for p in network.parameters():
        nn.init.normal_(p) if p.dim() > 1 else nn.init.zeros_(p)
    blobs = Split(blobs.images, network(blobs.images).argmax(1))
    addresses = {"head": 0, "late": 1, "early": 2}  # of registration
    analog = convert(network, variation, seed=5)
    found = sweep(analog, blobs, original=1.0, chips=4, simulation=FROM_NINE)
    assert found.names == ("early", "late", "head")
    assert list(found.table().groupby("layer")["name"].first()) == ["early", "late", "head"]
    for i in (1, 2, 3):
        for row in found.results[i].table.to_dict("records"):
            chip = copy.deepcopy(network).eval()
            for name in ("early", "late", "head")[i - 1 :]:
                layer = chip.get_submodule(name)
                layer.weight.data = variation.sample(layer.weight.data, 5, addresses[name], row["sample"])
            assert row["accuracy"] == clean_accuracy(chip, blobs)
    assert len({r.mean for r in found.results.values()}) == 3
    alone = sensitivity(network, blobs, variation, chips=2, seed=5, simulation=SILENT)
    assert list(alone["name"]) == ["early", "early", "late", "late", "head", "head"]
    assert [type(m).__name__ for m in (analog.head, network.head)] == ["AnalogLinear", "Linear"], "neither was changed"


@pytest.mark.parametrize("name", ["lenet5", "vgg16"])
def test_the_built_in_networks_run_their_layers_as_they_are_registered(name):
    model = build(name, 10, 3).train()
    images = torch.rand(4, 3, 32, 32)
    for data in ((images, torch.zeros(4)), [(images, torch.zeros(4))], Split(images, torch.zeros(4))):
        assert executed(model, data) == [n for n, _ in crossbar_layers(model)]
    assert all(module.training for module in model.modules()), "as it was"


def test_a_layer_that_is_never_called_is_refused(tiny, blobs):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.used = nn.Linear(2, 2), tiny

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UserError, match=r"^spare is not used"):
        sweep(convert(Spare(), LogNormalVariation(0.5)), blobs, original=1.0, simulation=SILENT)


def test_sensitivity_is_variation_in_one_layer_alone(tiny, blobs):
    variation = LogNormalVariation(1.0)
    found = sensitivity(tiny, blobs, variation, chips=2, seed=3, simulation=FROM_NINE)
    assert list(found["layer"]) == [1, 1, 2, 2, 3, 3]
    assert list(found["sample"]) == [9, 10] * 3
    assert set(found["clean"]) == {clean_accuracy(tiny, blobs)}
    for row in found.to_dict("records"):
        chip = copy.deepcopy(tiny)
        layer = dict(crossbar_layers(chip))[row["name"]]
        assert row["weights"] == layer.weight.numel()
        layer.weight.data = variation.sample(layer.weight.data, 3, row["layer"] - 1, row["sample"])
        assert row["accuracy"] == clean_accuracy(chip, blobs)
    assert found["accuracy"].nunique() > 1


def test_bad_calls(tiny, blobs):
    with pytest.raises(UserError, match="original accuracy"):
        sweep(convert(tiny, LogNormalVariation(0.5)), blobs, original=0.0)
    with pytest.raises(UserError, match="the threshold is a fraction"):
        sweep(convert(tiny, LogNormalVariation(0.5)), blobs, original=1.0, threshold=95)


class Reading(nn.Module):
    """Computes with a layer's weight without calling it; registered in another order than it is run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.middle, self.first = nn.Linear(32, 10), nn.Linear(16, 32), nn.Linear(20, 16)

    def forward(self, x):
        return self.head(torch.relu(nn.functional.linear(torch.relu(self.first(x)), self.middle.weight)))


@pytest.mark.filterwarnings("ignore::correctnet.evaluation.montecarlo.EngineWarning")
def test_a_layer_whose_weight_is_read_is_run():
    model, x = Reading().eval(), torch.randn(60, 20, generator=torch.Generator().manual_seed(1))
    data, half = (x, model(x).argmax(1)), LogNormalVariation(0.5)
    assert executed(model, data) == executed(convert(model, half), data) == ["first", "middle", "head"]
    found = sweep(convert(model, half), data, 1.0, chips=3, simulation=SILENT)
    table = sensitivity(model, data, half, chips=3, simulation=SILENT)
    for i, name in enumerate(found.names, start=1):
        wanted = []
        for chip in range(3):
            varied = copy.deepcopy(model)
            for index, (other, layer) in enumerate(crossbar_layers(varied)):
                if other in found.names[i - 1 :]:
                    layer.weight.data = half.sample(layer.weight.data, 0, index, chip)
            wanted.append(int((varied(x).argmax(1) == data[1]).sum()))
        assert found.results[i].table["correct"].tolist() == wanted
        assert len(table[table["name"] == name]) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: (x, y[:3]), "300 images and 3 labels"),
        (lambda x, y: x, "not a tensor of shape"),
        (lambda x, y: None, "not a NoneType"),
        (lambda x, y: [], "no images"),
        (lambda x, y: (x[:0], y[:0]), "no images"),
        (lambda x, y: ((x, y) for _ in range(1)), "iterated over once"),
        (lambda x, y: (x.repeat(1, 2, 1, 1), y), "the network cannot run on images of shape"),
        (lambda x, y: (x.numpy(), y.numpy()), "two tensors, .*not a ndarray"),
    ],
)
def test_data_that_are_refused(tiny, blobs, make, message):
    images, labels = blobs.images, blobs.labels
    for call in (
        lambda data: sweep(convert(tiny, LogNormalVariation(0.5)), data, 1.0, chips=1, simulation=SILENT),
        lambda data: sensitivity(tiny, data, LogNormalVariation(0.5), chips=1, simulation=SILENT),
        lambda data: find_candidates(tiny, data, LogNormalVariation(0.5), original=1.0, chips=1, progress=False),
    ):
        with pytest.raises(UserError, match=message):
            call(make(images, labels))


@pytest.mark.parametrize("original", ["network", "number", None])
def test_candidates_of_a_network_are_those_of_the_sweep_by_hand(tiny, blobs, original):
    other = copy.deepcopy(tiny)
    torch.nn.init.zeros_(other[4].weight)  # one class for all images: accuracy 1/3
    given = {"network": other, "number": clean_accuracy(other, blobs), None: None}[original]
    half = LogNormalVariation(0.5)
    found = find_candidates(tiny, blobs, half, original=given, threshold=1.0, chips=3, seed=2, progress=False)
    accuracy = clean_accuracy(tiny if original is None else other, blobs)
    wanted = sweep(
        convert(tiny, half, 2),
        blobs,
        accuracy,
        1.0,
        chips=3,
        simulation=Simulation(start=2 << 28, progress=False),  # the third purpose of chips
    )
    pd.testing.assert_frame_equal(found.table(), wanted.table())
    assert found.candidates == wanted.candidates


def test_a_loader_is_read_twice_whatever_the_number_of_layers(tiny, blobs):
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            yield from zip(blobs.images.split(50), blobs.labels.split(50), strict=True)

    half = LogNormalVariation(0.5)
    found = find_candidates(tiny, Loader(), half, chips=2, progress=False)
    assert len(passes) == 2, "the second pass checks that it yields the same images"
    table = sensitivity(tiny, Loader(), half, chips=2, progress=False)
    assert len(passes) == 4
    pd.testing.assert_frame_equal(found.table(), find_candidates(tiny, blobs, half, chips=2, progress=False).table())
    pd.testing.assert_frame_equal(table, sensitivity(tiny, blobs, half, chips=2, progress=False))


def test_images_and_labels_in_a_list(tiny, blobs):
    assert executed(tiny, [blobs.images, blobs.labels]) == executed(tiny, blobs)


def test_a_sweep_that_was_stopped_is_continued(tiny, blobs, tmp_path, monkeypatch):
    calls = []

    def stopping(*args, **options):
        calls.append(options["title"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return simulate(*args, **options)

    monkeypatch.setattr(candidates, "simulate", stopping)

    def call():
        return find_candidates(tiny, blobs, LogNormalVariation(0.5), chips=3, work=tmp_path, progress=False)

    with pytest.raises(KeyboardInterrupt):
        call()
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["3.csv"]
    saved = pd.read_csv(folder / "3.csv")
    saved.loc[0, ["correct", "accuracy"]] = [7, 7 / 300]  # a file that is read instead of evaluating again shows it
    saved.to_csv(folder / "3.csv", index=False)
    found = call()
    assert found.results[3].table["correct"].tolist() == saved["correct"].tolist()
    whole = find_candidates(tiny, blobs, LogNormalVariation(0.5), chips=3, progress=False)
    for i in (1, 2):
        pd.testing.assert_frame_equal(found.results[i].table, whole.results[i].table)
