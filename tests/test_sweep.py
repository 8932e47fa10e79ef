import copy

import pandas as pd
import pytest

from correctnet.analog import convert, crossbar_layers
from correctnet.errors import UserError
from correctnet.montecarlo import clean_accuracy, evaluate
from correctnet.results import COLUMNS, Result
from correctnet.sweep import Sweep, sensitivity, sweep
from correctnet.variation import LogNormalVariation


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
    found = sweep(analog, blobs, original=1.0, chips=3, start=9, progress=False)
    assert found.names == ("0.layer", "3.layer", "4")
    for i in (1, 2, 3):
        expected = evaluate(analog, blobs, 3, start=9, first_layer=i - 1, progress=False)
        pd.testing.assert_frame_equal(found.results[i].table, expected.table)
    table = found.table()
    assert list(table["layer"]) == [1] * 3 + [2] * 3 + [3] * 3
    assert set(table["sample"]) == {9, 10, 11}
    assert found.summary()["candidates"] == list(found.candidates)


def test_sensitivity_is_variation_in_one_layer_alone(tiny, blobs):
    variation = LogNormalVariation(1.0)
    found = sensitivity(tiny, variation, 3, blobs, chips=2, start=9, progress=False)
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
    with pytest.raises(UserError, match="without `exclude`"):
        sweep(convert(tiny, LogNormalVariation(0.5), exclude=["4"]), blobs, original=1.0)
